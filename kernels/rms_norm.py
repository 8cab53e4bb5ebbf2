"""``rms_norm``: rows over the last dimension, several small ones or one long one to a program."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def normed(x, inverse, weight_ptr, at, inside, weight_offset, ROUND_BEFORE_WEIGHT: tl.constexpr, DTYPE: tl.constexpr):
    """x [rows, n] float32, times ``inverse`` [rows, 1] and the weight's elements ``at``; all in float32."""
    y = x * inverse
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32) + weight_offset
        if ROUND_BEFORE_WEIGHT:
            y = y.to(DTYPE).to(tl.float32)
        y = y * weight
        if ROUND_BEFORE_WEIGHT:
            y = y.to(DTYPE).to(tl.float32)
    return y


@triton.jit
def inverse_root(squares, size, eps):
    """1 / sqrt(squares / size + eps), rounded as the other backends do."""
    mean = tl.div_rn(squares, tl.full(squares.shape, size, tl.float32))
    return tl.div_rn(tl.full(mean.shape, 1.0, tl.float32), tl.sqrt_rn(mean + eps))


@triton.jit(do_not_specialize=["num_rows", "middle", "inner"])
def _rms_norm_kernel(
    x_ptr,  # [outer, middle, inner, size]
    weight_ptr,  # [size], or None
    out_ptr,  # [num_rows, size]
    num_rows,
    middle,
    inner,
    size,
    stride_outer,
    stride_middle,
    stride_inner,
    eps,
    weight_offset,
    ROUND_BEFORE_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exist = rows[:, None] < num_rows
    at = rows // inner // middle * stride_outer + rows // inner % middle * stride_middle + rows % inner * stride_inner
    row_ptr = (x_ptr + at)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    x = tl.load(row_ptr + column, mask=exist & (column < size), other=0.0).to(tl.float32)
    sums = x * x
    for first in range(BLOCK, size, BLOCK):
        more = tl.load(row_ptr + first + column, mask=exist & (first + column < size), other=0.0).to(tl.float32)
        sums += more * more
    inverse = inverse_root(tl.sum(sums, 1), size, eps)[:, None]
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    to = (out_ptr + rows * size)[:, None]
    y = normed(x, inverse, weight_ptr, column, column < size, weight_offset, ROUND_BEFORE_WEIGHT, DTYPE)
    tl.store(to + column, y.to(DTYPE), mask=exist & (column < size))
    for first in range(BLOCK, size, BLOCK):
        here = first + column
        more = tl.load(row_ptr + here, mask=exist & (here < size), other=0.0).to(tl.float32)
        y = normed(more, inverse, weight_ptr, here, here < size, weight_offset, ROUND_BEFORE_WEIGHT, DTYPE)
        tl.store(to + here, y.to(DTYPE), mask=exist & (here < size))


_INTERPRETED = not isinstance(_rms_norm_kernel, triton.JITFunction)


def _launch_config(size: int) -> dict[str, int]:
    """At most 8192 elements of a row in registers, a longer row is read again; the interpreter pays by the program.

    By the size alone: a row's sum must not depend on how many rows there are.
    """
    block = min(8192, max(16, triton.next_power_of_2(size)))
    most = 65536 if _INTERPRETED else 1024
    return {"BLOCK": block, "BLOCK_ROWS": max(1, min(64, most // block))}


def _options(size: int) -> dict[str, Any]:
    """8 to 32 elements a thread; products are not fused with sums, as nowhere else."""
    return {"num_warps": 8 if size > 4096 else 4, "enable_fp_fusion": False}


def rms_norm(
    x: Tensor,  # [..., size] with at most three leading dimensions, stride 1 along size
    weight: Tensor | None,  # [size]
    eps: float,
    weight_offset: float,
    round_before_weight: bool,
    out: Tensor,  # contiguous, as many elements
) -> None:
    """Fill ``out`` with ``x / sqrt(mean(x ** 2) + eps) * (weight_offset + weight)``."""
    x = x.view((1,) * (4 - x.ndim) + x.shape)
    outer, middle, inner, size = x.shape
    num_rows = outer * middle * inner
    if not num_rows or not size:
        return
    config = _launch_config(size)
    with torch.cuda.device_of(x):
        _rms_norm_kernel[triton.cdiv(num_rows, config["BLOCK_ROWS"]),](
            x, weight, out, num_rows, middle, inner, size, *x.stride()[:3], eps, weight_offset,
            ROUND_BEFORE_WEIGHT=round_before_weight, **config, **_options(size),
        )  # fmt: skip


def ahead_of_time() -> list[tuple[Any, ...]]:
    """Each dtype, with and without a weight, short, long and very long rows, aligned or not."""
    values = {"num_rows": "i32", "middle": "i32", "inner": "i32", "eps": "fp32", "weight_offset": "fp32"}
    compilations = []
    for dtype, weight, size, rounded in (
        ("bf16", "bf16", 128, True),
        ("bf16", "fp32", 4096, False),
        ("fp16", None, 2816, False),
        ("fp32", "fp32", 5120, False),
        ("bf16", "bf16", 16384, True),
        ("fp32", "fp32", 77, False),
    ):
        multiple = "i32" if size % 16 else "i32:16"
        shape = dict.fromkeys(("size", "stride_outer", "stride_middle", "stride_inner"), multiple)
        signature = {"x_ptr": f"*{dtype}:16", "out_ptr": f"*{dtype}:16"} | values | shape
        constants: dict[str, Any] = _launch_config(size) | {"ROUND_BEFORE_WEIGHT": rounded}
        if weight is None:
            constants["weight_ptr"] = None
        else:
            signature["weight_ptr"] = f"*{weight}:16"
        name = f"{dtype} {size} weight {weight}{' rounded' if rounded else ''}"
        compilations.append((name, _rms_norm_kernel, signature, constants, _options(size)))
    return compilations
