"""qk_norm_rope in torch's eyes: gradients, operators, compiled graphs; and beside transformers' own modules."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from qk_norm_rope_cases import DTYPES, NORMS, ROTATIONS, heads, in_double, settings_of, tables

from diffusion_runtime import ops
from diffusion_runtime.ops._qk_norm_rope_problem import STYLES, QKNormRope, reference
from diffusion_runtime.testing import assert_as_accurate

OPERATORS = torch.ops.diffusion_runtime


def problem_of(query, key, cos, sin, *, style="half", eps=None, query_weight=None, key_weight=None, **norm):
    norm = {"weight_offset": 0.0, "round_before_weight": False} | norm
    return QKNormRope(
        query, key, None, cos[None], sin[None], query_weight, key_weight, None, None, None, None, eps is not None,
        eps or 0.0, norm["weight_offset"], norm["round_before_weight"], STYLES.index(style),
    )  # fmt: skip


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("style", "rotary_dim"), [("half", 4), ("interleaved", 6), ("proportional", 4)])
def test_gradcheck(style, rotary_dim, norm):
    inputs = [heads(2, n, 3, 6, torch.float64).requires_grad_() for n in (2, 1)]
    cos, sin = (x.double() for x in tables(7, rotary_dim))
    settings = settings_of(norm, 6, torch.float64) | {"style": style, "rotary_dim": rotary_dim}
    settings |= {"positions": torch.tensor([6, 0, 3])}
    names = [name for name in ("query_weight", "key_weight") if name in settings]
    inputs += [settings.pop(name).requires_grad_() for name in names]

    def op(query, key, *weights):
        named = dict(zip(names, weights, strict=True))
        return ops.qk_norm_rope(query, key, None, cos, sin, backend="reference", **named, **settings)

    torch.autograd.gradcheck(op, inputs)
    torch.autograd.gradgradcheck(op, inputs)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_gradients_are_those_of_the_formula(backend, dtype, norm):
    for style, head_dim, rotary_dim in ROTATIONS[:8:2]:
        query, key = (heads(2, n, 3, head_dim, dtype).requires_grad_() for n in (2, 1))
        cos, sin = tables(3, rotary_dim)
        settings = settings_of(norm, head_dim, dtype) | {"style": style}
        inputs = [query, key, *(x.requires_grad_() for x in settings.values() if isinstance(x, torch.Tensor))]
        seeds = [torch.randn_like(query), torch.randn_like(key)]
        outputs = ops.qk_norm_rope(query, key, None, cos, sin, rotary_dim=rotary_dim, backend=backend, **settings)
        got = torch.autograd.grad(outputs, inputs, seeds)
        same = torch.autograd.grad(reference(problem_of(query, key, cos, sin, **settings)), inputs, seeds)
        doubles = [x.detach().double().requires_grad_() for x in inputs]
        wide = {k: in_double(v) for k, v in settings.items()}
        wide |= dict(zip(("query_weight", "key_weight"), doubles[2:], strict=False))
        truth = reference(problem_of(*doubles[:2], cos.double(), sin.double(), **wide))
        exact = torch.autograd.grad(truth, doubles, [x.double() for x in seeds])
        for one, yardstick, right in zip(got, same, exact, strict=True):
            assert one.dtype == dtype
            assert_as_accurate(one, yardstick, right)


def test_operator_registration():
    query, key = (heads(2, n, 3, 8, torch.float32).requires_grad_() for n in (2, 1))
    cos, sin = (x[None] for x in tables(5, 8))
    weight = torch.ones(8, requires_grad=True)
    positions, slots = torch.arange(3).expand(2, 3), torch.tensor([4, 0, 2]).expand(2, 3)
    norm = (True, 1e-6, 0.0, False, 0, "cpp")
    arguments = (query, key, None, cos, sin, weight, None, positions, None, None, None, *norm)
    torch.library.opcheck(OPERATORS.qk_norm_rope.default, arguments)
    query, key, weight = query.detach(), key.detach(), weight.detach()
    caches = [torch.zeros(2, 1, 6, 8) for _ in range(2)]
    arguments = (query, key, key * 2, cos, sin, weight, None, positions, *caches, slots, *norm)
    torch.library.opcheck(OPERATORS.qk_norm_rope_into_cache.default, arguments)


def test_compiles_without_a_graph_break():
    query, key = (heads(2, n, 3, 8, torch.float32) for n in (2, 1))
    cos, sin = tables(3, 8)
    weight = torch.randn(8)

    def step(query, key, weight):
        query, key = ops.qk_norm_rope(query * 2, key, None, cos, sin, eps=1e-6, query_weight=weight)
        return query + 1, key

    inputs = [query.requires_grad_(), key.requires_grad_(), weight.requires_grad_()]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), step(*inputs))
    gradients = [torch.autograd.grad([x.square().sum() for x in f(*inputs)], inputs) for f in (compiled, step)]
    torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_a_compiled_graph_writes_the_caches():
    query, key, value = (heads(2, n, 3, 8, torch.float32) for n in (2, 1, 1))
    cos, sin = tables(3, 8)

    def step(query, key, value, cache_key, cache_value):
        slots = torch.tensor([5, 0, 3])
        rotated, _ = ops.qk_norm_rope(
            query, key, value, cos, sin, eps=1e-6, cache_key=cache_key, cache_value=cache_value, cache_positions=slots
        )
        return rotated * 2, cache_key + 1

    found = []
    for f in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        caches = [torch.zeros(2, 1, 6, 8) for _ in range(2)]
        found.append((*f(query, key, value, *caches), *caches))
    torch.testing.assert_close(*found)
    assert torch.equal(found[0][3][:, :, 5], value[:, :, 0])


@pytest.mark.parametrize(("factor", "head_dim"), [(0.25, 512), (0.5, 64)])
def test_proportional_is_diffusion_gemmas(factor, head_dim):
    module = pytest.importorskip("transformers.models.diffusion_gemma.modeling_diffusion_gemma")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = SimpleNamespace(
        standardize_rope_params=lambda: None, head_dim=head_dim,
        rope_parameters={"rope_theta": 1e6, "partial_rotary_factor": factor},
    )  # fmt: skip
    frequency, _ = ROPE_INIT_FUNCTIONS["proportional"](config, torch.device("cpu"))
    angle = torch.outer(torch.arange(9.0), frequency)
    cos, sin = angle.cos(), angle.sin()  # their tables have these twice, beside each other
    norm = module.DiffusionGemmaRMSNorm(head_dim, 1e-6)
    torch.nn.init.normal_(norm.weight)
    x = heads(2, 3, 9, head_dim, torch.float32)
    with torch.no_grad():
        twice = [torch.cat((t, t), -1)[None] for t in (cos, sin)]
        expected = module.apply_rotary_pos_emb(norm(x), *twice, unsqueeze_dim=1)
        pairs = int(factor * head_dim) // 2
        for columns in (pairs, head_dim // 2):
            got, _ = ops.qk_norm_rope(
                x, x, None, cos[:, :columns], sin[:, :columns], eps=1e-6, query_weight=norm.weight,
                style="proportional", rotary_dim=2 * columns,
            )  # fmt: skip
            torch.testing.assert_close(got, expected)


@torch.no_grad()
def test_is_closer_to_the_exact_result_than_qwens():
    module = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    norm = module.Qwen3RMSNorm(64, 1e-6).bfloat16()
    torch.nn.init.normal_(norm.weight)
    x = heads(2, 3, 40, 64, torch.bfloat16)
    cos, sin = tables(40, 64)
    twice = [torch.cat((t, t), -1)[None] for t in (cos, sin)]
    settings = {"query_weight": norm.weight, "eps": 1e-6, "round_before_weight": True}
    wide = settings | {"query_weight": norm.weight.double(), "backend": "reference"}
    truth, _ = ops.qk_norm_rope(x.double(), x.double(), None, cos.double(), sin.double(), **wide)
    theirs, _ = module.apply_rotary_pos_emb(norm(x), norm(x), *(t.bfloat16() for t in twice))
    ours, _ = ops.qk_norm_rope(x, x, None, cos, sin, **settings)
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.06)
    error = [(one.double() - truth).abs().mean() for one in (ours, theirs)]
    assert error[0] < 0.9 * error[1]
