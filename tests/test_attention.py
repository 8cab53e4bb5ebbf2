"""attention's reference: what it must equal, and what it refuses. Its kernels come with their own tests."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from diffusion_runtime import ops
from diffusion_runtime.nn import RMSNorm, apply_rotary, rotary_table
from diffusion_runtime.testing import assert_as_accurate


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_torch(dtype, heads):
    query = torch.randn(2, 7, heads[0], 16, dtype=dtype).transpose(1, 2)
    key, value = (torch.randn(2, heads[1], 11, 16, dtype=dtype) for _ in range(2))
    got = ops.attention(query, key, value, scale=0.3)
    wide = [x.double() for x in (query, key, value)]
    truth = scaled_dot_product_attention(*wide, scale=0.3, enable_gqa=True)
    same = scaled_dot_product_attention(query, key, value, scale=0.3, enable_gqa=True)
    assert got.dtype == dtype
    assert_as_accurate(got, same, truth)


def test_gradients_flow():
    inputs = [torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(ops.attention, inputs)


def test_no_keys_give_zeros():
    empty = torch.zeros(1, 2, 0, 4)
    assert torch.equal(ops.attention(torch.randn(1, 2, 3, 4), empty, empty), torch.zeros(1, 2, 3, 4))


@pytest.mark.parametrize(
    ("shapes", "error", "message"),
    [
        (((2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)), ValueError, r"query must be \[batch, heads, length, head_dim\]"),
        (((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 5, 4)), ValueError, r"value must be \[1, 2, 3"),
        (((1, 3, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)), ValueError, "a divisor of 3"),
        (((1, 2, 3, 4), (1, 2, 3, 8), (1, 2, 3, 8)), ValueError, "to fit query"),
    ],
)
def test_rejects_shapes(shapes, error, message):
    with pytest.raises(error, match=message):
        ops.attention(*(torch.zeros(shape) for shape in shapes))


def test_rejects_other_dtypes_and_backends():
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(TypeError, match=r"share one floating-point dtype, got key torch.float64"):
        ops.attention(x, x.double(), x)
    with pytest.raises(ops.BackendUnavailableError, match="attention has no cpp implementation"):
        ops.attention(x, x, x, backend="cpp")


def test_rms_norm_rounds_before_the_weight():
    norm = RMSNorm(8, 1e-5).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 8))
    x = torch.randn(3, 8).bfloat16()
    wide = x.float()
    expected = (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).bfloat16() * norm.weight
    assert (norm(x) - expected).abs().max() <= 2**-7


def test_rotary_preserves_relative_angles():
    table = rotary_table(50, 16, 10000.0, torch.device("cpu"))
    query, key = torch.randn(16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    rotated_query, rotated_key = (apply_rotary(x.expand(1, 1, 50, 16), table)[0, 0] for x in (query, key))
    products = rotated_query @ rotated_key.T
    for offset in (0, 3, 20):  # the product depends on the distance alone
        diagonal = products.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotated_query[0], query)
