"""scaled_dot_product_attention against torch's: its own sample inputs, every form of its arguments, its errors."""

from __future__ import annotations

import sys
import unittest
import warnings
from functools import cache
from importlib.util import find_spec
from random import Random
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from diffusion_runtime import ops
from diffusion_runtime.ops import scaled_dot_product_attention
from diffusion_runtime.testing import assert_as_accurate

# what an element may differ by beside twice torch's own error: two bfloat16 roundings lie an ulp apart
FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-7}
DTYPES = list(FLOOR)


@cache
def _op_info():
    """torch's own description of the function; its home imports expecttest, of which nothing is used here."""
    if find_spec("expecttest") is None:
        stub = ModuleType("expecttest")
        stub.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stub
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    (info,) = [op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention"]
    return info


def _run(function, tensors, kwargs, wide=False):
    """The output and the gradient of every tensor, mask included; dropout drawn from seed 0."""
    leaves = [(x.double() if wide else x).detach().requires_grad_(x.is_floating_point()) for x in tensors]
    mask = kwargs.get("attn_mask")
    if isinstance(mask, torch.Tensor) and mask.is_floating_point():
        mask = (mask.double() if wide else mask).detach().requires_grad_()
        kwargs = {**kwargs, "attn_mask": mask}
        leaves.append(mask)
    torch.manual_seed(0)
    out = function(*leaves[:3], **kwargs)
    weight = torch.linspace(-1, 1, max(1, out.numel()))[: out.numel()].reshape(out.shape).to(out.dtype)
    gradients = torch.autograd.grad(out, leaves, weight, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True))]


def _check(tensors, kwargs, floor=None):
    got = _run(scaled_dot_product_attention, tensors, kwargs)
    same, truth = _run(torch_attention, tensors, kwargs), _run(torch_attention, tensors, kwargs, wide=True)
    for ours, torchs, exact in zip(got, same, truth, strict=True):
        assert ours.dtype == torchs.dtype
        if kwargs.get("dropout_p"):
            assert torch.equal(ours, torchs)
        else:
            assert_as_accurate(ours, torchs, exact, floor=floor or max(FLOOR[ours.dtype], FLOOR[tensors[0].dtype]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchs_sample_inputs(dtype):
    samples = list(_op_info().sample_inputs("cpu", dtype, requires_grad=False))
    assert len(samples) >= 25  # 25 in torch 2.13; none is left out
    # scores in the hundreds and values of 9: the first is torch's own tolerance for them; a bfloat16 gradient comes
    # from the sum of 8 products with an output of up to 9 that is rounded already, times keys of up to 9
    floor = {torch.float32: 5e-5, torch.bfloat16: 2**-3}
    for sample in samples:
        _check((sample.input, *sample.args), sample.kwargs, floor.get(dtype))


SHAPES = {
    "two dimensions": ((3, 8), (5, 8), (5, 4)),
    "two beside four": ((3, 8), (2, 4, 5, 8), (2, 4, 5, 8)),
    "three dimensions": ((4, 3, 8), (4, 5, 8), (4, 5, 6)),
    "three beside four": ((4, 3, 8), (2, 4, 5, 8), (1, 4, 5, 8)),
    "other size of values": ((2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 6)),
    "one key head": ((2, 4, 3, 8), (2, 1, 5, 8), (2, 1, 5, 8)),
    "one value head": ((2, 4, 3, 8), (2, 4, 5, 8), (2, 1, 5, 8)),
    "one query head": ((2, 1, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8)),
    "one batch of queries": ((1, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8)),
    "one batch of keys": ((2, 4, 3, 8), (1, 4, 5, 8), (1, 4, 5, 8)),
    "five dimensions": ((2, 3, 4, 3, 8), (2, 3, 4, 5, 8), (2, 3, 4, 5, 8)),
    "five, broadcast": ((2, 1, 4, 3, 8), (3, 1, 5, 8), (3, 4, 5, 8)),
    "more queries than keys": ((1, 2, 6, 8), (1, 2, 3, 8), (1, 2, 3, 8)),
    "no keys": ((2, 4, 3, 8), (2, 4, 0, 8), (2, 4, 0, 8)),
    "no queries": ((2, 4, 0, 8), (2, 4, 5, 8), (2, 4, 5, 8)),
    "no batch": ((0, 4, 3, 8), (0, 4, 5, 8), (0, 4, 5, 8)),
    "no heads": ((2, 0, 3, 8), (2, 0, 5, 8), (2, 0, 5, 8)),
    "no head size": ((2, 4, 3, 0), (2, 4, 5, 0), (2, 4, 5, 8)),
    "no value size": ((2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 0)),
}


def _tensors(shapes, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float", "float of every score", "scale"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_shapes(shapes, mask):
    query, key, value = _tensors(shapes)
    size = (query.shape[-2], key.shape[-2])
    full = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    kwargs = {
        "none": {},
        "causal": {"is_causal": True},
        # the first query may attend to nothing
        "bool": {"attn_mask": (torch.rand(size) > 0.4) & (torch.arange(size[0])[:, None] > 0)},
        "float": {"attn_mask": torch.randn(size)},
        "float of every score": {"attn_mask": torch.randn(*full, *size)},
        "scale": {"scale": -0.7},
    }[mask]
    _check((query, key, value), kwargs)


@pytest.mark.parametrize("shape", [(2, 3, 1, 3, 5), (1, 3, 4, 1, 5), (1, 1, 1, 3, 5), (4, 3, 5), (3, 1, 1, 1)])
def test_masks_broadcast_over_many_dimensions(shape):
    _check(_tensors(SHAPES["five dimensions"]), {"attn_mask": torch.randn(shape)})
    _check(_tensors(SHAPES["five, broadcast"]), {"attn_mask": torch.randn(shape)})


def test_a_mask_for_all_is_not_copied():
    tensors, mask = _tensors(SHAPES["five dimensions"]), torch.randn(3, 5)
    module = sys.modules["diffusion_runtime.ops._scaled_dot_product_attention"]
    with patch.object(module, "attention", side_effect=ops.attention) as attention:
        scaled_dot_product_attention(*tensors, mask)
    passed = attention.call_args.kwargs["mask"]
    assert passed.numel() == mask.numel()
    assert passed.data_ptr() == mask.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(4, 2, 2), (4, 4, 4), (4, 1, 1), (6, 2, 3), (4, 4, 1)], ids=str)
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)], ids=str)
def test_grouped_heads(leading, heads, dtype):
    shapes = [(*leading, h, n, 8) for h, n in zip(heads, (3, 5, 5), strict=True)]
    for kwargs in ({}, {"is_causal": True}, {"attn_mask": torch.rand(heads[0], 3, 5) > 0.3}):
        _check(_tensors(shapes, dtype), {"enable_gqa": True, **kwargs})


def test_grouped_heads_beside_other_batches():
    _check(_tensors(((4, 3, 8), (2, 2, 5, 8), (2, 2, 5, 8))), {"enable_gqa": True})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_a_float32_mask(dtype):
    query, key, value = (x.transpose(1, 2) for x in _tensors(((2, 7, 4, 8),) * 3, dtype))
    _check((query, key, value), {"attn_mask": torch.randn(7, 7)})


@pytest.mark.parametrize("size", [(4, 4), (3, 7), (7, 3)])
@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
@pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs")
def test_causal_bias(bias, size):
    query, key, value = _tensors(((2, 4, size[0], 8), (2, 4, size[1], 8), (2, 4, size[1], 8)))
    mask = bias(*size)
    got = scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(got, torch_attention(query, key, value, mask._materialize()))


def test_autocast():
    query, key, value = _tensors(((2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8)))
    with torch.autocast("cpu", torch.bfloat16):
        for tensors in ((query, key, value), (query, key.bfloat16(), value)):
            got, expected = scaled_dot_product_attention(*tensors), torch_attention(*tensors)
            assert got.dtype == expected.dtype == torch.bfloat16
            exact = torch_attention(*(x.bfloat16().double() for x in tensors))
            assert_as_accurate(got, expected, exact, floor=2**-7)
        wide = [x.double() for x in (query, key, value)]
        torch.testing.assert_close(scaled_dot_product_attention(*wide), torch_attention(*wide))


def test_dropout_draws_as_torch_does():
    query, key, value = _tensors(((2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8)))
    _check((query, key, value), {"dropout_p": 0.4, "attn_mask": torch.rand(3, 5) > 0.3})
    assert not scaled_dot_product_attention(query, key, value, dropout_p=1.0).any()
    with pytest.raises(ops.BackendUnavailableError, match="torch alone runs dropout"):
        scaled_dot_product_attention(query, key, value, dropout_p=0.4, backend="cpp")


def test_may_take_torchs_place():
    query, key, value = _tensors(((2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 8)))
    with patch("torch.nn.functional.scaled_dot_product_attention", scaled_dot_product_attention):
        got = torch.nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=1.0)
    assert not got.any()


X = torch.zeros(2, 4, 3, 8)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((X, X.double(), X), {}, "share one floating-point dtype, got torch.float32, torch.float64"),
        ((X.int(), X.int(), X.int()), {}, "share one floating-point dtype"),
        ((X[0, 0, 0], X, X), {}, "two dimensions or more"),
        ((X, X[..., :5], X), {}, "same last dimension"),
        ((X[:, :3], X, X), {}, None),
        ((X[:, :3], X[:, :2], X[:, :2]), {"enable_gqa": True}, "must divide those of query, got 2 and 2 for 3"),
        ((X[:, :2], X, X), {"enable_gqa": True}, "must divide"),
        ((X, X, X), {"attn_mask": X[0, 0, :, :3].half()}, "bool, float32 or torch.float32"),
        ((X, X, X), {"attn_mask": X[0, 0, :, :3].int()}, "bool, float32"),
        ((X, X, X), {"attn_mask": X[0, 0, :, :4]}, r"broadcast to \(2, 4, 3, 3\)"),
        ((X, X, X), {"attn_mask": torch.zeros(5, 1, 1, 3, 3)}, r"broadcast to \(2, 4, 3, 3\)"),
        ((X, X, X), {"dropout_p": 1.5}, "dropout_p must be from 0 to 1, got 1.5"),
        ((X, X, X), {"dropout_p": -0.5}, "dropout_p"),
        ((X, X, X), {"attn_mask": causal_lower_right(3, 7)}, r"CausalBias for \(3, 7\)"),
        # torch's kernel for the CPU lets these two pass, against its documentation
        ((X, X[:, :, :2], X), {}, "equally many keys"),
        ((X, X, X), {"attn_mask": X[0, 0, :, :3], "is_causal": True}, "exclude each other"),
    ],
    ids=str,
)
def test_refuses_what_torch_refuses(args, kwargs, message):
    with pytest.raises(RuntimeError, match=message):
        scaled_dot_product_attention(*args, **kwargs)
    if message not in ("equally many keys", "exclude each other"):
        with pytest.raises(RuntimeError):
            torch_attention(*args, **kwargs)


def test_refuses_other_kinds():
    for function in (scaled_dot_product_attention, torch_attention):
        with pytest.raises(TypeError, match=r"must be a? ?Tensor, (got|not) list"):
            function([1], X, X)
        with pytest.raises(TypeError, match="positional arguments"):
            function(X, X, X, None, 0.0, False, 0.5)
        with pytest.raises(ValueError, match=r"CausalBias|exclude"):
            function(X, X, X, causal_upper_left(3, 3), is_causal=True)


def _random_call(random):
    """Any sizes, some of them 0, some broadcast, some wrong."""
    full = [random.choice([1, 2, 3]) for _ in range(random.choice([0, 1, 2, 2, 3]))] + [random.choice([1, 2, 4])]
    length, num_keys, size = random.choice([0, 1, 3, 4]), random.choice([0, 1, 3, 5]), random.choice([1, 4, 8])

    def tensor(*last):
        dims = random.choice([len(full)] * 4 + [len(full) - 1, 0])
        return torch.randn(*(random.choice([x, x, x, 1]) for x in full[len(full) - dims :]), *last)

    more = random.random() < 0.03
    tensors = [tensor(length, size), tensor(num_keys, size), tensor(num_keys + more, random.choice([1, 4, 8]))]
    kwargs = {"enable_gqa": random.random() < 0.3, "is_causal": random.random() < 0.3}
    if not kwargs["is_causal"] and random.random() < 0.6:
        wanted = [*full, length, num_keys]
        shape = [random.choice([x, x, 1]) for x in wanted][-random.choice([1, 2, 3, len(wanted)]) :]
        shape += [7] if random.random() < 0.05 else []
        kwargs["attn_mask"] = torch.randn(shape) if random.random() < 0.5 else torch.rand(shape) > 0.4
    return tensors, kwargs | ({"scale": random.choice([0.0, -1.0, 2.0])} if random.random() < 0.2 else {})


def test_2000_random_calls():
    """What torch's own formula gives, ours gives; what it refuses, ours refuses."""
    random, refused = Random(0), 0
    for _ in range(2000):
        tensors, kwargs = _random_call(random)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                expected = torch_attention(*tensors, **kwargs)
        except (RuntimeError, IndexError):  # the second is of torch counting dimensions
            refused += 1
            with pytest.raises((RuntimeError, IndexError)):
                scaled_dot_product_attention(*tensors, **kwargs)
        else:
            got = scaled_dot_product_attention(*tensors, **kwargs)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert 100 < refused < 700
