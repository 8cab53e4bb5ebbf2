"""qk_norm_rope: every backend against float64, what published models do, caches, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from backends import ALL, KERNELS
from qk_norm_rope_cases import DTYPES, NORMS, ROTATIONS, heads, in_double, run, settings_of, tables

from diffusion_runtime import ops
from diffusion_runtime.nn import apply_rotary, rotary_table
from diffusion_runtime.testing import assert_as_accurate


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_agrees_with_float64(backend, dtype, norm):
    for style, head_dim, rotary_dim in ROTATIONS:
        query, key = heads(2, 3, 5, head_dim, dtype), heads(2, 1, 5, head_dim, dtype)
        cos, sin = tables(5, rotary_dim)
        settings = settings_of(norm, head_dim, dtype) | {"style": style, "rotary_dim": rotary_dim}
        got = run(query, key, None, cos, sin, backend=backend, **settings)
        same = ops.qk_norm_rope(query, key, None, cos, sin, backend="reference", **settings)
        doubled = [in_double(x) for x in (query, key, None, cos, sin)]
        truth = ops.qk_norm_rope(*doubled, backend="reference", **{k: in_double(v) for k, v in settings.items()})
        for one, yardstick, exact in zip(got, same, truth, strict=True):
            assert one.dtype == dtype
            assert one.transpose(1, 2).is_contiguous()
            assert_as_accurate(one, yardstick, exact)


@pytest.mark.parametrize("backend", ALL)
class TestMeaning:
    def test_pairs(self, backend):
        x = heads(1, 2, 3, 12, torch.float32)
        cos, sin = tables(3, 8)
        pairs = {
            "half": [(i, i + 4) for i in range(4)],
            "interleaved": [(2 * i, 2 * i + 1) for i in range(4)],
            "proportional": [(i, i + 6) for i in range(4)],
        }
        for style, which in pairs.items():
            got, _ = run(x, x, None, cos, sin, style=style, rotary_dim=8, backend=backend)
            expected = x.clone()
            for i, (a, b) in enumerate(which):
                expected[..., a] = x[..., a] * cos[:, i] - x[..., b] * sin[:, i]
                expected[..., b] = x[..., b] * cos[:, i] + x[..., a] * sin[:, i]
            torch.testing.assert_close(got, expected)

    @pytest.mark.parametrize("norm", ["plain", "Qwen", "Gemma"])
    def test_is_norm_then_rotation(self, backend, norm):
        query, key = heads(2, 4, 6, 32, torch.float32), heads(2, 2, 6, 32, torch.float32)
        settings = settings_of(norm, 32, torch.float32)
        table = rotary_table(6, 32, 1e4, torch.device("cpu"))
        got = run(query, key, None, *table, backend=backend, **settings)
        weights = [settings.pop("query_weight"), settings.pop("key_weight")]
        for one, x, weight in zip(got, (query, key), weights, strict=True):
            expected = apply_rotary(ops.rms_norm(x, weight, backend="reference", **settings), table)
            torch.testing.assert_close(one, expected)

    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
    def test_rounds_the_norm_where_it_is_told(self, backend, dtype):
        query = heads(2, 4, 6, 32, dtype)
        settings = settings_of("Qwen", 32, dtype)
        table = rotary_table(6, 32, 1e4, torch.device("cpu"))
        got, _ = run(query, query, None, *table, backend=backend, **settings)
        weight = settings["query_weight"]
        norm = ops.rms_norm(query, weight, eps=1e-6, round_before_weight=True, backend="reference")
        assert (got == apply_rotary(norm, table)).float().mean() > 0.98
        once = ops.rms_norm(query.float(), weight.float(), eps=1e-6, backend="reference")
        assert (got == apply_rotary(once, table).to(dtype)).float().mean() < 0.9

    def test_positions_are_rows_of_the_tables(self, backend):
        query, key = heads(3, 2, 5, 16, torch.float32), heads(3, 2, 5, 16, torch.float32)
        for leading in ((), (1,), (3,)):
            cos, sin = tables(20, 16, *leading)
            shared = torch.tensor([3, 19, 0, 3, 7])
            own = torch.stack([shared, shared.flip(0), torch.arange(5)])
            for positions in (shared, own, own.t().contiguous().t()):
                got = run(query, key, None, cos, sin, positions=positions, backend=backend)
                chosen = []
                for table in (cos, sin):
                    full = table.expand(3, 20, 8) if leading else table[None].expand(3, 20, 8)
                    rows = positions.expand(3, 5)
                    chosen.append(torch.stack([full[b][rows[b]] for b in range(3)]))
                expected = run(query, key, None, *chosen, backend=backend)
                assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    def test_tables_of_any_strides_and_dtype(self, backend):
        query = heads(2, 2, 5, 16, torch.bfloat16)
        cos, sin = tables(5, 16)
        expected = run(query, query, None, cos, sin, backend=backend)
        both = torch.cat((cos, sin), -1)
        for c, s in (
            (torch.cat((cos, cos), -1)[:, :8], torch.cat((sin, sin), -1)[:, :8]),
            (both[:, :8], both[:, 8:]),
            (cos.t().contiguous().t(), sin),
            (cos.double(), sin),
            (cos[None].expand(2, 5, 8), sin[None].repeat(2, 1, 1)),
        ):
            got = run(query, query, None, c, s, backend=backend)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    def test_any_strides(self, backend):
        base = torch.randn(2, 6, 5, 80)
        cos, sin = tables(5, 24)
        weight = torch.randn(32)
        settings = {"eps": 1e-6, "query_weight": weight, "key_weight": weight, "rotary_dim": 24, "backend": backend}
        for x in (
            base[..., 3:35],
            base[:, ::2, :, 8:40],
            base.transpose(0, 1)[1:3, :, :, :32],
            base[..., ::2][..., :32],
        ):
            dense = x.transpose(1, 2).contiguous().transpose(1, 2)
            got = run(x, x[:, :1], None, cos[: x.shape[2]], sin[: x.shape[2]], **settings)
            expected = run(dense, dense[:, :1], None, cos[: x.shape[2]], sin[: x.shape[2]], **settings)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    def test_a_row_depends_on_itself_alone(self, backend):
        for dtype in DTYPES:
            for style, head_dim, rotary_dim in ROTATIONS[:8:3]:
                query, key = heads(4, 3, 9, head_dim, dtype), heads(4, 1, 9, head_dim, dtype)
                cos, sin = tables(9, rotary_dim)
                settings = settings_of("plain", head_dim, dtype) | {"style": style, "rotary_dim": rotary_dim}
                every = run(query, key, None, cos, sin, backend=backend, **settings)
                some = run(query[2:3, :2, 4:7], key[2:3, :, 4:7], None, cos[4:7], sin[4:7], backend=backend, **settings)
                assert torch.equal(some[0], every[0][2:3, :2, 4:7])
                assert torch.equal(some[1], every[1][2:3, :, 4:7])
                query[:, 1], key[1] = math.nan, math.inf
                company = run(query, key, None, cos, sin, backend=backend, **settings)
                assert torch.equal(company[0][:, ::2], every[0][:, ::2])
                assert torch.equal(company[1][2:], every[1][2:])

    @pytest.mark.parametrize(("batch", "num_heads", "length"), [(0, 2, 3), (2, 2, 0), (1, 0, 3)])
    def test_empty(self, backend, batch, num_heads, length):
        query, key = heads(batch, num_heads, length, 8, torch.float32), heads(batch, 1, length, 8, torch.float32)
        got = run(query, key, None, *tables(length, 8), eps=1e-6, backend=backend)
        assert [x.shape for x in got] == [query.shape, key.shape]
        assert not got[1].isnan().any()


@pytest.mark.parametrize("backend", ALL)
class TestCache:
    @pytest.mark.parametrize("norm", ["Qwen", "rotation only"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_is_written_where_it_is_told(self, backend, dtype, norm):
        query, key, value = (heads(2, n, 4, 24, dtype) for n in (6, 2, 2))
        cos, sin = tables(4, 16)
        settings = settings_of(norm, 24, dtype) | {"rotary_dim": 16, "backend": backend}
        expected = run(query, key, None, cos, sin, **settings)
        dense = torch.zeros(2, 2, 9, 24, dtype=dtype)
        shared = torch.tensor([8, 0, 3, 4])
        for like in (dense, dense.transpose(1, 2).contiguous().transpose(1, 2), torch.zeros(2, 2, 9, 40)[..., 7:31]):
            for slots in (shared, torch.stack([shared, shared.flip(0)])):
                around = torch.full((2, 2, 2, 9, 48), 7.0, dtype=dtype)
                caches = [
                    around[i].as_strided((2, 2, 9, 24), like.stride(), around[i].storage_offset()) for i in range(2)
                ]
                before = around.clone()
                query_out, key_out = run(
                    query, key, value, cos, sin, **settings, cache_key=caches[0], cache_value=caches[1],
                    cache_positions=slots,
                )  # fmt: skip
                assert key_out is None
                assert torch.equal(query_out, expected[0])
                for cache, new in zip(caches, (expected[1], value), strict=True):
                    for b in range(2):
                        rows = slots.expand(2, 4)[b]
                        assert torch.equal(cache[b][:, rows], new[b])
                written = (around != before).sum()
                assert written <= 2 * 2 * 2 * 4 * 24
                for cache in caches:
                    rest = torch.ones(2, 9, dtype=torch.bool).scatter(1, slots.expand(2, 4), False)
                    assert (cache.transpose(1, 2)[rest] == 7).all()

    def test_places_that_do_not_exist(self, backend):
        query, key, value = (heads(1, 1, 3, 8, torch.float32) for _ in range(3))
        cos, sin = tables(6, 8)
        caches = torch.full((2, 1, 1, 5, 8), 7.0)
        call = {"cache_key": caches[0], "cache_value": caches[1], "backend": backend}
        for bad in (-1, 5):
            slots = torch.tensor([1, bad, 2])
            if backend == "cuda":
                run(query, key, value, cos[:3], sin[:3], cache_positions=slots, **call)
                assert (caches[:, :, :, [0, 3, 4]] == 7).all()
                continue
            with pytest.raises(ValueError, match=f"cache_positions must be from 0 to 4, got {bad}"):
                run(query, key, value, cos[:3], sin[:3], cache_positions=slots, **call)
            assert (caches == 7).all()
        for bad in (-2, 6):
            positions = torch.tensor([1, bad, 2])
            if backend == "cuda":
                got, _ = run(query, key, None, cos, sin, positions=positions, backend=backend)
                assert got[:, :, 1].isnan().all()
                continue
            with pytest.raises(ValueError, match=f"positions must be from 0 to 5, got {bad}"):
                run(query, key, None, cos, sin, positions=positions, backend=backend)


GOOD = {
    "query": torch.zeros(2, 4, 3, 8),
    "key": torch.zeros(2, 2, 3, 8),
    "value": None,
    "cos": torch.ones(3, 4),
    "sin": torch.ones(3, 4),
}
CACHE = {
    "value": torch.zeros(2, 2, 3, 8),
    "cache_key": torch.zeros(2, 2, 9, 8),
    "cache_value": torch.zeros(2, 2, 9, 8),
    "cache_positions": torch.arange(3),
}
REJECTED = [
    ({"query": torch.zeros(2, 4, 3, 8, dtype=torch.int64)}, TypeError, "query must be a floating-point tensor"),
    ({"query": torch.zeros(4, 3, 8)}, ValueError, r"query must be \[batch, heads, length, head_dim\]"),
    ({"key": torch.zeros(2, 2, 4, 8)}, ValueError, r"got \(2, 4, 3, 8\) and \(2, 2, 4, 8\)"),
    ({"key": torch.zeros(2, 2, 3, 8).half()}, TypeError, "key must be torch.float32, got torch.float16"),
    ({"style": "neox"}, ValueError, "style must be one of half, interleaved, proportional, got 'neox'"),
    ({"rotary_dim": 3}, ValueError, "rotary_dim must be even and from 0 to 8, the size of a head, got 3"),
    ({"rotary_dim": 10}, ValueError, "rotary_dim must be even and from 0 to 8"),
    ({"cos": torch.ones(3, 8)}, ValueError, r"cos must be \[3, 4\] or \[2, 3, 4\] on cpu, got \(3, 8\)"),
    ({"sin": torch.ones(4, 4)}, ValueError, r"sin must be \[3, 4\] or \[2, 3, 4\] on cpu, got \(4, 4\)"),
    ({"sin": torch.ones(3, 3, 4)}, ValueError, r"sin must be \[3, 4\] or \[2, 3, 4\] on cpu, got \(3, 3, 4\)"),
    ({"cos": torch.ones(3, 4, dtype=torch.int32)}, TypeError, "cos must be a floating-point tensor"),
    ({"cos": torch.ones(3, 4, requires_grad=True)}, ValueError, "cos and sin take no gradients"),
    ({"query_weight": torch.ones(8)}, ValueError, "query_weight and key_weight need eps"),
    ({"query_weight": torch.ones(4), "eps": 1e-6}, ValueError, r"query_weight must be \(8,\) on cpu, got \(4,\)"),
    ({"weight_offset": 1.0, "eps": 1e-6}, ValueError, "there is none: got 1.0 and False"),
    ({"round_before_weight": True}, ValueError, "there is none: got 0.0 and True"),
    ({"positions": torch.zeros(3)}, TypeError, "positions must be an int64 tensor, got torch.float32"),
    ({"positions": torch.zeros(2, dtype=torch.int64)}, ValueError, r"positions must be \(3,\) or \(2, 3\) on cpu"),
    ({"value": torch.zeros(2, 2, 3, 8)}, ValueError, "cache_key, cache_value, cache_positions is missing"),
    (CACHE | {"value": None}, ValueError, "come together, for a cache: value is missing"),
    (CACHE | {"value": torch.zeros(2, 4, 3, 8)}, ValueError, r"value must be \(2, 2, 3, 8\) on cpu"),
    (CACHE | {"cache_key": torch.zeros(2, 4, 9, 8)}, ValueError, r"cache_key must be \(2, 2, 9, 8\) on cpu"),
    (CACHE | {"cache_value": torch.zeros(2, 2, 8, 8)}, ValueError, r"cache_value must be \(2, 2, 9, 8\) on cpu"),
    (CACHE | {"cache_value": torch.zeros(2, 2, 9, 8).half()}, TypeError, "cache_value must be torch.float32"),
    (CACHE | {"cache_key": torch.zeros(2, 2, 8, 9).mT}, ValueError, "cache_key must have stride 1 along head_dim"),
    (CACHE | {"query": torch.zeros(2, 4, 3, 8, requires_grad=True)}, ValueError, "no gradients through a cache"),
    (CACHE | {"cache_key": torch.zeros(2, 2, 9, 8, requires_grad=True)}, ValueError, "no gradients through a cache"),
    ({"backend": "cuda"}, ops.BackendUnavailableError, "cuda takes cuda tensors, got cpu"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REJECTED)
def test_rejects(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.qk_norm_rope(**(GOOD | arguments))


def test_accepts_what_those_were_made_of():
    ops.qk_norm_rope(**GOOD)
    ops.qk_norm_rope(**(GOOD | CACHE))
    with torch.no_grad():
        ops.qk_norm_rope(**(GOOD | CACHE | {"query": torch.zeros(2, 4, 3, 8, requires_grad=True)}))
