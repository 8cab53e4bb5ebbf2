"""attention in C++, with each instruction set."""

from __future__ import annotations

import attention_cases
import pytest
import torch
from attention_cases import Case, check, run
from backends import instruction_set

from diffusion_runtime import ops
from diffusion_runtime.testing import assert_as_accurate

HALVES = [torch.bfloat16, torch.float16]
OF_HALVES = ["square", "long", "one-query", "value-dim", "strided", "float-mask", "softcap", "paged:", "left:window"]


@pytest.fixture(params=["avx512", "avx2", "portable"], autouse=True)
def _set(request):
    with instruction_set(request.param):
        yield


@pytest.mark.parametrize("name", attention_cases.NAMES)
def test_equals_the_reference(name):
    check(attention_cases.case(name), "cpp")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", OF_HALVES)
def test_widens_halves(name, dtype):
    check(attention_cases.case(name, dtype), "cpp")


@pytest.mark.parametrize("mask", [None, *list(attention_cases.MASKS.values())[:9]], ids=str)
def test_company_changes_no_bit(mask):
    attention_cases.check_invariant("cpp", mask, torch.float32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_company_changes_no_bit_of_halves(dtype):
    attention_cases.check_invariant("cpp", ops.SlidingWindow(5, 3), dtype, dim=24)


def _joint(dim, value_dim, before, length, heads=4, kv_heads=2):
    """A prefix and keys that both end inside of a block of 256, 128 or 64."""
    query, key = torch.randn(1, heads, length, dim), torch.randn(1, kv_heads, length, dim)
    prefix = ops.Prefix(torch.randn(1, kv_heads, before, dim), torch.randn(1, kv_heads, before, value_dim))
    return query, key, torch.randn(1, kv_heads, length, value_dim), prefix


@pytest.mark.parametrize("mask", [None, ops.SlidingWindow(90, 17), ops.BlockCausal(32)], ids=str)
@pytest.mark.parametrize(
    ("dim", "value_dim"), [(1, 1), (5, 3), (64, 72), (80, 100), (128, 16), (130, 256), (257, 9), (16, 512)]
)
def test_heads_of_any_size_over_several_blocks(dim, value_dim, mask):
    query, key, value, prefix = _joint(dim, value_dim, 270, 81)
    check(Case(query, key, value, {"prefix": prefix, "mask": mask}), "cpp")


@pytest.mark.parametrize("mask", [None, ops.SlidingWindow(290, 30), ops.BlockCausal(48)], ids=str)
def test_blocks_begin_at_logical_places(mask):
    query, key, value, prefix = _joint(40, 40, 300, 290)
    expected = run(Case(query, key, value, {"prefix": prefix, "mask": mask}), "cpp")

    def padded(x, left, right):
        return torch.nn.functional.pad(x, (0, 0, left, right), value=torch.nan)

    moved = [padded(x, 37, 5) for x in (query.nan_to_num(), key, value)]
    longer = ops.Prefix(padded(prefix.key, 0, 99), padded(prefix.value, 0, 99), torch.tensor([300]))
    lengths = torch.tensor([37]), torch.tensor([37 + 290])
    for other in (longer, attention_cases.paged(longer, 7), attention_cases.paged(longer, 128)):
        got = run(Case(*moved, {"prefix": other, "mask": mask, "lengths": lengths}), "cpp")
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a[:, :, 37 : 37 + 290], b)


@pytest.mark.parametrize("dim", [24, 64])  # few queries of 64 read values in place, others a copy
def test_a_query_alone_gets_the_same_bits(dim):
    query, key, value, prefix = _joint(dim, dim, 300, 61)
    out, logsumexp = run(Case(query, key, value, {"prefix": prefix}), "cpp")
    for rows in (slice(0, 1), slice(17, 20), slice(30, 61)):
        alone = run(Case(query[:, :, rows], key, value, {"prefix": prefix}), "cpp")
        assert torch.equal(alone[0], out[:, :, rows])
        assert torch.equal(alone[1], logsumexp[:, :, rows])
    one_head = ops.Prefix(prefix.key[:, 1:], prefix.value[:, 1:])
    alone = run(Case(query[:, 3:], key[:, 1:], value[:, 1:], {"prefix": one_head}), "cpp")
    assert torch.equal(alone[0], out[:, 3:])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_window_alone_gets_the_same_bits(dtype):
    attention_cases.check_windows("cpp", dtype)


def test_threads_change_no_bit():
    query, key, value, prefix = _joint(16, 16, 100, 150)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run(Case(query, key, value, {"prefix": prefix, "mask": ops.Causal()}), "cpp"))
    finally:
        torch.set_num_threads(before)
    for out, logsumexp in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(logsumexp, found[0][1])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_keys_that_a_query_does_not_see_are_not_touched(poison):
    query, key, value, prefix = _joint(32, 32, 40, 300)
    case = Case(query, key, value, {"prefix": prefix, "mask": ops.SlidingWindow(20, 10)})
    expected = run(case, "cpp")
    key[:, :, 260], value[:, :, 260], prefix.value[:, :, 7] = poison, poison, poison
    sees = torch.zeros(300, dtype=torch.bool)
    sees[250:281] = True  # 260 - 10 to 260 + 20; key 7 of the prefix is seen by nobody
    for a, b in zip(run(case, "cpp"), expected, strict=True):
        assert torch.equal(a[:, :, ~sees], b[:, :, ~sees])
        assert not a[:, :, sees].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32], ids=str)
def test_masks_with_any_strides(dtype):
    query, key, value = (torch.randn(2, 4, n, 16).bfloat16() for n in (21, 290, 290))
    shown = torch.rand(290, 2, 21) < 0.7
    shown[:, 1, 4] = False
    mask = shown if dtype == torch.bool else torch.randn(290, 2, 21).to(dtype).masked_fill(~shown, -torch.inf)
    mask = mask.permute(1, 2, 0)[:, None]  # [2, 1, 21, 290]
    check(Case(query, key, value, {"mask": mask, "lengths": (torch.tensor([0, 3]), torch.tensor([290, 280]))}), "cpp")


def test_scores_far_from_zero():
    query, key, value = (torch.randn(1, 2, n, 64) for n in (40, 300, 300))
    key += 100 * query.mean(2, keepdim=True)  # about 1e3 times the head's size, all alike
    check(Case(query, key, value, {"scale": 1.0}), "cpp")


@pytest.mark.parametrize(
    "kwargs", [{}, {"softcap": 2.0, "mask": ops.BlockCausal(8)}, {"lengths": torch.tensor([20, 9])}], ids=str
)
def test_gradients(kwargs):
    tensors = [torch.randn(2, h, n, 16) for h, n in ((4, 20), (2, 20), (2, 20), (2, 33), (2, 33))]

    def gradients(backend, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in tensors]
        query, key, value, *prefix = inputs
        out, logsumexp = ops.attention(
            query, key, value, prefix=ops.Prefix(*prefix), return_logsumexp=True, backend=backend, **kwargs
        )
        return torch.autograd.grad(out.sin().sum() + logsumexp.cos().sum(), inputs)

    found, same = gradients("cpp", torch.float32), gradients("reference", torch.float32)
    for a, b, c in zip(found, same, gradients("reference", torch.float64), strict=True):
        assert_as_accurate(a, b, c, floor=5e-6)


def test_parts_merge_into_the_whole():
    query, key, value, prefix = _joint(32, 32, 70, 40)
    whole = Case(query, key, value, {"prefix": prefix})
    parts = [run(Case(query, *x, {}), "cpp") for x in ((key, value), (prefix.key, prefix.value))]
    out, logsumexp = ops.merge_attention(*zip(*parts, strict=True))
    for got, same, truth in zip(
        (out, logsumexp),
        run(whole, "reference"),
        run(Case(*attention_cases.mapped(lambda x: x.double(), tuple(whole))), "reference"),
        strict=True,
    ):
        assert_as_accurate(got, same, truth)


def test_the_binding_reads_nothing_that_is_not_there():
    kernel = pytest.importorskip("diffusion_runtime._C")
    x, sums = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    none, rule = [None] * 10, [-1, -1, 1, -1, 0, 3, 1.0, 0.0]
    for key, out in ((torch.zeros(1, 2, 3, 5), x), (x, torch.zeros(1, 2, 3, 5)), (x.double(), x)):
        with pytest.raises(ValueError, match=r"size in dimension 3|must have the dtype"):
            kernel.attention(x, key, x, *none, *rule, out, sums, kernel.instruction_sets()[0])
