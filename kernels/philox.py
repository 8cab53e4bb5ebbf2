"""Philox4x32-10 (Salmon et al., SC 2011): the definition of ``diffusion_runtime/ops/_philox.py`` inside a kernel."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

DRAW_TOKEN = tl.constexpr(0)


@triton.jit
def philox_uniforms(seed, position, step, KIND: tl.constexpr):
    """Two independent float64 numbers in [0, 1) for each row, multiples of 2^-53.

    seed [rows] int64, read as 64 unsigned bits; position, step [rows] integers of which the low 32 bits count; KIND is
    what the draw is for.
    """
    # Triton's own tl.philox counts and keys differently, and has changed between versions.
    c0, c1 = position.to(tl.uint32), step.to(tl.uint32)
    c2, c3 = tl.full(c0.shape, KIND, tl.uint32), tl.full(c0.shape, 0, tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        a, b = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (b >> 32).to(tl.uint32) ^ c1 ^ k0,
            b.to(tl.uint32),
            (a >> 32).to(tl.uint32) ^ c3 ^ k1,
            a.to(tl.uint32),
        )
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return _uniform(c0, c1), _uniform(c2, c3)


@triton.jit
def _uniform(low, high):
    bits = ((high.to(tl.uint64) << 32) | low.to(tl.uint64)) >> 11
    return bits.to(tl.float64) * 1.1102230246251565e-16  # 2^-53


def ahead_of_time() -> list[tuple[Any, ...]]:
    """No kernel of its own: these functions are compiled into those that draw."""
    return []
