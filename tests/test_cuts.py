"""Where the C++ kernel cuts a row: to the last bit, a cut row is the row with the other logits at -inf."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from backends import sample_tokens

from diffusion_runtime import ops
from diffusion_runtime.ops._restriction import kept

BACKENDS = ["cpp-avx512", "cpp-avx2", "cpp-portable"]
STATISTICS = ["logprob", "confidence", "margin", "entropy", "logsumexp"]
CUTS = [
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 1500},  # more than there are tiles
    {"top_p": 0.9},
    {"top_p": 1e-4},
    {"min_p": 0.03},
    {"top_k": 50, "top_p": 0.9},
    {"top_k": 3000, "top_p": 0.99, "min_p": 0.002},
    {"top_p": 0.7, "min_p": 0.002},
]


@cache
def awkward_rows(vocab, dtype=torch.float32):
    """Noise, flat, equal and tied rows, a dominant token, half at -inf, large and huge logits, a row below zero."""
    x = torch.randn(9, vocab, generator=torch.Generator().manual_seed(vocab)) * 2.5
    x[1] *= 1e-3
    x[2] = 0.25
    x[3] = x[3].round()
    x[4, vocab // 3] = 25.0
    x[5, vocab // 2 :] = -math.inf
    x[6] += 1e4
    x[7] *= 2e37 if dtype != torch.float16 else 5e3
    x[8] = -x[8].abs() - 3
    return x.to(dtype)


def which_stay(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, allowed=None, softcap=None):
    """By the definition, and ``top_p`` moved into the middle of the share of the token at the cut."""
    x = logits.double()
    y = x if softcap is None else torch.where(x == -math.inf, x, softcap * (x / softcap).tanh())

    def per_row(value, dtype=torch.float64):
        return torch.as_tensor(value, dtype=dtype).expand(len(x))

    temperature, top_k, min_p = per_row(temperature), per_row(top_k, torch.int64), per_row(min_p)
    if top_p < 1:
        left = kept(x, y, temperature, allowed, top_k, per_row(1.0), per_row(0.0))
        share = (y / temperature[:, None]).masked_fill(~left, -math.inf).softmax(-1).sort(-1, descending=True)[0]
        mass = share.cumsum(-1)
        at = (mass >= top_p).to(torch.uint8).argmax(-1, keepdim=True)
        top_p = (mass - share / 2).gather(-1, at)[:, 0].float()
    return kept(x, y, temperature, allowed, top_k, per_row(top_p), min_p), per_row(top_p, torch.float32)


def assert_cut_is_a_mask(logits, keep, backend, temperature=1.0, softcap=None, **restrictions):
    plain = {"temperature": temperature, "seed": 11, "softcap": softcap, "statistics_temperature": 0.8}
    cut = sample_tokens(logits, backend=backend, statistics="restricted", **plain, **restrictions)
    expected = sample_tokens(logits.masked_fill(~keep, -math.inf), backend=backend, **plain)
    for name, got, want in zip(cut._fields, cut, expected, strict=True):
        assert torch.equal(got, want), f"{name}: {got} instead of {want}"
    unrestricted = sample_tokens(logits, backend=backend, **plain, **restrictions)
    assert torch.equal(unrestricted.token, expected.token)
    for name in ("argmax", *STATISTICS[1:]):
        assert torch.equal(getattr(unrestricted, name), getattr(sample_tokens(logits, backend=backend, **plain), name))


@pytest.mark.parametrize("backend", BACKENDS)
class TestCuts:
    @pytest.mark.parametrize("cut", CUTS, ids=str)
    @pytest.mark.parametrize("vocab", [1, 6, 130, 2049, 131_072])
    def test_of_awkward_rows(self, backend, vocab, cut):
        logits = awkward_rows(vocab)[: 9 if vocab > 1 else 5]
        keep, top_p = which_stay(logits, **cut)
        assert_cut_is_a_mask(logits, keep, backend, **(cut | {"top_p": top_p}))

    @pytest.mark.parametrize(
        ("dtype", "temperature", "softcap"),
        [
            (torch.bfloat16, 1.0, None),
            (torch.float16, 0.7, None),
            (torch.float32, 1.3, 8.0),
            (torch.bfloat16, 1.0, 8.0),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("cut", [{"top_k": 50, "top_p": 0.9}, {"top_k": 1}, {"min_p": 0.03}], ids=str)
    def test_under_other_settings(self, backend, dtype, temperature, softcap, cut):
        logits = awkward_rows(9000, dtype)[:6]
        keep, top_p = which_stay(logits, temperature, softcap=softcap, **cut)
        assert_cut_is_a_mask(logits, keep, backend, temperature, softcap, **(cut | {"top_p": top_p}))

    def test_of_tokens_that_are_allowed(self, backend):
        vocab = 9000
        logits = awkward_rows(vocab)
        mask = torch.rand(9, vocab, generator=torch.Generator().manual_seed(1)) < 0.5
        mask[:, 2048:4096] = True  # a chunk of the kernel with all its tokens, one with none, rows with a few
        mask[:, 4096:6144] = False
        mask[3], mask[4] = False, True
        mask[3, [5, 6, 8999]], mask[4, 7777] = True, False
        allowed = ops.pack_allowed(mask)
        for cut in ({}, {"top_k": 20}, {"top_p": 0.6}, {"min_p": 0.05}, {"top_k": 200, "top_p": 0.8}):
            keep, top_p = which_stay(logits, allowed=allowed, **cut)
            assert_cut_is_a_mask(logits, keep, backend, allowed=allowed, **(cut | {"top_p": top_p}))
        assert_cut_is_a_mask(logits, mask & (logits > -math.inf), backend, 0.0, allowed=allowed, top_k=3)

    @pytest.mark.parametrize("top_k", [1, 2, 9, 10, 11, 700, 1279, 1280])
    def test_any_float_at_any_top_k(self, backend, top_k):
        bits = torch.randint(-(2**31), 2**31, (20, 1280), generator=torch.Generator().manual_seed(3))
        logits = bits.to(torch.int32).view(torch.float32)
        logits = torch.where(logits.isfinite(), logits, 0.5)  # twice: a tie
        keep, _ = which_stay(logits, top_k=top_k)
        assert_cut_is_a_mask(logits, keep, backend, top_k=top_k)

    def test_neighbouring_floats_and_both_zeros(self, backend):
        near = torch.arange(-150, 150, dtype=torch.int32)
        logits = torch.stack(
            [
                (near + torch.tensor(3.7).view(torch.int32)).view(torch.float32),
                near * torch.finfo(torch.float32).tiny,
                near * 1e-45,  # subnormal
                torch.tensor([0.0, -0.0, -1.0]).repeat(100),
                torch.tensor([-0.0, 0.0, 1.0]).repeat(100),
            ]
        )[:, torch.randperm(300)]
        for top_k in (1, 90, 100, 101, 149, 150, 151, 200, 299):
            keep, _ = which_stay(logits, top_k=top_k)
            assert_cut_is_a_mask(logits, keep, backend, top_k=top_k)

    @pytest.mark.parametrize("spread", [1, 128, 130])
    def test_the_largest_in_one_tile_or_one_each(self, backend, spread):
        logits = torch.randn(1, 10 * 128 + 60)
        logits[0, (torch.arange(10) * spread) + 3] += 20
        for top_k in (9, 10, 11, 12):
            assert_cut_is_a_mask(logits, which_stay(logits, top_k=top_k)[0], backend, top_k=top_k)

    def test_top_p_at_its_ends(self, backend):
        logits = torch.randn(6, 40_000)
        logits[3] = 1.0
        logits[4, :2] = logits[4].max() + 2
        for top_p in (0.0, 1e-30):
            keep = logits == logits.amax(-1, keepdim=True)
            assert_cut_is_a_mask(logits, keep, backend, top_p=top_p)
        keep, top_p = which_stay(logits[:3, :900], top_p=0.9995)
        assert_cut_is_a_mask(logits[:3, :900], keep, backend, top_p=top_p)
        nearly = sample_tokens(
            logits, backend=backend, temperature=1.0, seed=1, statistics="restricted", top_p=1 - 2**-24
        )
        everything = sample_tokens(logits, backend=backend, temperature=1.0, seed=1)
        torch.testing.assert_close(nearly.logsumexp, everything.logsumexp, rtol=0, atol=1e-5)

    def test_top_p_a_little_more_or_less_than_the_first_token(self, backend):
        logits = torch.zeros(1, 1000)
        logits[0, 700] = 5.0
        first = math.exp(5) / (math.exp(5) + 999)
        assert_cut_is_a_mask(logits, logits > 1, backend, top_p=first - 1e-5)
        assert_cut_is_a_mask(logits, logits > -1, backend, top_p=first + 1e-5)

    @pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-42])
    def test_a_tiny_temperature_leaves_top_k_its_count(self, backend, temperature):
        logits = torch.randn(4, 5000)
        keep = logits >= logits.sort(-1, descending=True)[0][:, 6:7]
        assert_cut_is_a_mask(logits, keep, backend, temperature, top_k=7)
        best = logits == logits.amax(-1, keepdim=True)
        for cut in ({"top_p": 0.99}, {"min_p": 1e-30}, {"top_k": 7, "top_p": 0.5}):
            assert_cut_is_a_mask(logits, best, backend, temperature, **cut)

    def test_min_p_of_one_keeps_ties(self, backend):
        logits = torch.randn(3, 700)
        logits[:, [5, 600]] = 9.0
        assert_cut_is_a_mask(logits, logits == 9.0, backend, min_p=1.0)
        # under the softcap both are 1, so equally probable; among logits they are not equal
        logits = torch.tensor([[30.0, 0.0, 40.0, 0.9]])
        for cut, keep in (
            ({"min_p": 1.0}, [[True, False, True, False]]),
            ({"top_k": 1}, [[False, False, True, False]]),
        ):
            assert_cut_is_a_mask(logits, torch.tensor(keep), backend, softcap=1.0, **cut)

    def test_a_row_depends_on_nothing_but_itself(self, backend):
        logits = torch.randn(7, 9001) * 2
        settings = {"temperature": 0.8, "seed": 5, "top_k": 300, "top_p": 0.9, "statistics": "restricted"}
        position = torch.arange(7)
        together = sample_tokens(logits, position=position, backend=backend, suppress=[8, 5000], **settings)
        wide = torch.full((7, 9004), math.nan)[:, 3:]  # rows at other alignments
        wide[:] = logits
        order = torch.randperm(7)
        moved = sample_tokens(wide[order], position=position[order], backend=backend, suppress=[8, 5000], **settings)
        assert all(torch.equal(a[order], b) for a, b in zip(together, moved, strict=True))

    @pytest.mark.parametrize("vocab", [5, 77, 2048 + 40])
    def test_bits_behind_the_vocabulary_do_not_matter(self, backend, vocab):
        logits = awkward_rows(vocab)[:6]
        words = ops.pack_allowed(torch.arange(vocab) % 5 != 1)
        more = words.clone()
        more[-1] |= -1 << vocab % 32
        for statistics in ("unrestricted", "restricted"):
            arguments = {"temperature": 1.0, "seed": 1, "top_k": 4, "statistics": statistics, "backend": backend}
            expected = sample_tokens(logits, allowed=words, **arguments)
            got = sample_tokens(logits, allowed=more, **arguments)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            with pytest.raises(ValueError, match=r"row \[0\] has no token that may be drawn"):
                sample_tokens(logits, allowed=more & ~words, **arguments)

    def test_words_of_any_row_stride(self, backend):
        logits = awkward_rows(300)[:6].view(2, 3, 300)
        mask = torch.rand(2, 3, 300, generator=torch.Generator().manual_seed(2)) < 0.3
        mask[..., 0] = True
        wide = torch.zeros(2, 3, 17, dtype=torch.int32)
        wide[..., 4:14] = ops.pack_allowed(mask)
        for allowed in (wide[..., 4:14], wide[:1, :, 4:14], wide[:, 1:2, 4:14], wide[1, 2, 4:14]):
            per_row = allowed.expand(2, 3, 10).contiguous()
            got, expected = (
                sample_tokens(logits, allowed=a, temperature=1.0, seed=3, statistics="restricted", backend=backend)
                for a in (allowed, per_row)
            )
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("top_k", [None, 3])
    def test_a_row_without_a_distribution(self, backend, value, top_k):
        logits = torch.zeros(2, 9000)
        mask = torch.arange(9000) % 2 == 0
        arguments = {
            "temperature": 1.0, "seed": 1, "allowed": ops.pack_allowed(mask), "top_k": top_k, "backend": backend
        }  # fmt: skip
        what = {math.nan: "holds NaN", math.inf: "holds inf", -math.inf: "is all -inf"}[value]
        logits[1, 4444 if value != -math.inf else mask] = value
        for statistics in ("unrestricted", "restricted"):
            with pytest.raises(ValueError, match=rf"row \[1\] of the logits {what}"):
                sample_tokens(logits, statistics=statistics, **arguments)
        logits[1, mask], logits[1, 4445] = 0.0, value
        samples = sample_tokens(logits, statistics="restricted", **arguments)
        torch.testing.assert_close(samples.confidence, torch.tensor([1 / 4500] * 2))
        if value != -math.inf:
            with pytest.raises(ValueError, match=rf"row \[1\] of the logits {what}"):
                sample_tokens(logits, statistics="unrestricted", **arguments)


def test_results_do_not_depend_on_threads():
    logits = awkward_rows(131_072)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            arguments = {"top_k": torch.arange(9) * 500, "top_p": 0.9, "min_p": 0.01, "suppress": [3, 70_000]}
            results.append(ops.sample_tokens(logits, temperature=1.0, seed=1, backend="cpp", **arguments))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_denormals_that_compare_as_zero_do_no_harm():
    logits = torch.arange(-3000, 3000) * 1e-42
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot")
    try:
        for top_k in (1, 10, 2000, 5999):
            samples = ops.sample_tokens(
                logits.expand(50, -1), temperature=1.0, seed=1, top_k=top_k, top_p=0.7, backend="cpp"
            )
            assert (samples.token >= 0).all()
            assert (samples.token < 6000).all()
    finally:
        torch.set_flush_denormal(False)
