"""The interpreter computes in bfloat16 as torch does, once patched."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted", allow_module_level=True)


@triton.jit
def _multiply_kernel(x_ptr, y_ptr, out_ptr, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out_ptr + i, tl.load(x_ptr + i) * tl.load(y_ptr + i))


@triton.jit
def _dot_kernel(x_ptr, y_ptr, out_ptr, n: tl.constexpr):
    i = tl.arange(0, n)
    at = i[:, None] * n + i[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at)))


@triton.jit
def _narrow_kernel(x_ptr, out_ptr, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16))


@triton.jit
def _count_kernel(out_ptr, n):
    total = 0
    for i in range(n):
        total += i
    tl.store(out_ptr, total)


def test_products_equal_those_of_torch():
    x, y = (torch.randn(4096).bfloat16() for _ in range(2))
    out = torch.empty_like(x)
    _multiply_kernel[(1,)](x, y, out, n=4096)
    assert torch.equal(out, x * y)


def test_dot_equals_the_float32_product():
    x, y = (torch.randn(64, 64).bfloat16() for _ in range(2))
    out = torch.empty(64, 64)
    _dot_kernel[(1,)](x, y, out, n=64)
    torch.testing.assert_close(out, x.float() @ y.float(), rtol=0, atol=1e-4)


def test_narrowing_rounds_to_nearest_even():
    infinity, largest = float("inf"), torch.finfo(torch.float32).max
    special = torch.tensor([infinity, -infinity, float("nan"), 0.0, -0.0, largest, 1.00390625, 1.01171875])
    x = torch.cat([special, torch.randn(4096 - len(special))])
    out = torch.empty(4096, dtype=torch.bfloat16)
    _narrow_kernel[(1,)](x, out, n=4096)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_a_loop_bound_may_be_a_runtime_value():
    out = torch.empty(1, dtype=torch.int64)
    _count_kernel[(1,)](out, 5)
    assert out.item() == 10
