"""Parts of attention, each over some of the keys: how they are put together and stored."""

from __future__ import annotations

import triton
import triton.language as tl
from diffusion_runtime.kernels._attention_rows import weights_of
from diffusion_runtime.kernels._common import INF


@triton.jit
def fold(total_top, total_mass, top, mass, scale):
    """Top and mass of what came before and a chunk, and what the values of each are to be multiplied with."""
    both = tl.maximum(total_top, top)
    old, new = weights_of(total_top, both, scale), weights_of(top, both, scale)
    return both, total_mass * old + mass * new, old[:, None], new[:, None]


@triton.jit
def columns(part_ptr, first, WIDTH: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Pointers at some columns of a part [ROWS, SIZE]: as many as the registers hold."""
    return part_ptr + tl.arange(0, ROWS)[:, None] * SIZE + (first + tl.arange(0, WIDTH))[None, :]


@triton.jit
def store_out(out_at, exist, first, values, mass, size):
    """Columns of ``out`` from ``first`` on; 0 where a query saw nothing."""
    dims = first + tl.arange(0, values.shape[1])
    nothing = (mass == 0)[:, None]
    out = tl.where(nothing, 0.0, values / tl.where(nothing, 1.0, mass[:, None]))
    at = out_at[:, None] + dims[None, :]
    tl.store(at, out.to(out_at.dtype.element_ty), mask=exist[:, None] & (dims < size)[None, :])


@triton.jit
def store_logsumexp(at, exist, top, mass, scale):
    tl.store(at, tl.where(mass == 0, -INF, top * scale + tl.log(tl.where(mass == 0, 1.0, mass))), mask=exist)
