"""``qk_norm_rope``: each head's row is normalised, rotated and stored, those of keys and values in a cache if any.

One launch: programs for the rows of the query come first, then those of the key, then those of the value. The partner
of an element is loaded again, from the first-level cache, rather than exchanged between threads.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from diffusion_runtime.kernels.rms_norm import inverse_root, normed
from torch import Tensor

INTERLEAVED = tl.constexpr(1)
PROPORTIONAL = tl.constexpr(2)


@triton.jit
def _place(places_ptr, batch, row, stride_batch, stride_row, exist):
    """The position of each row: that of ``places_ptr`` [batch, length] int64, or the place along the length."""
    place = row
    if places_ptr is not None:
        place = tl.load(places_ptr + batch * stride_batch + row * stride_row, mask=exist, other=0)
    return place


@triton.jit
def _rows(block, num_rows, heads, length, BLOCK_ROWS: tl.constexpr):
    """Batch, head and row [BLOCK_ROWS] int64, heads of one position beside each other, and which of them exist."""
    number = block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    return number // heads // length, number % heads, number // heads % length, number < num_rows


@triton.jit
def _rope_rows(
    block, x_ptr, weight_ptr, out_ptr, cos_ptr, sin_ptr, positions_ptr, slots_ptr, num_rows, heads, length, capacity,
    table_rows, head_dim, pairs, eps, weight_offset, stride_batch, stride_head, stride_row, out_batch, out_head,
    out_row, table_batch, table_row, positions_batch, positions_row, slots_batch, slots_row,
    NORMALIZED: tl.constexpr, ROUND_BEFORE_WEIGHT: tl.constexpr, STYLE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    batch, head, row, exist = _rows(block, num_rows, heads, length, BLOCK_ROWS)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    row_ptr = (x_ptr + batch * stride_batch + head * stride_head + row * stride_row)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    inside = i < head_dim
    if STYLE == INTERLEAVED:
        first = (i < 2 * pairs) & (i % 2 == 0)
        second = (i < 2 * pairs) & (i % 2 == 1)
        pair = i // 2
        distance = 1
    else:
        distance = pairs
        if STYLE == PROPORTIONAL:
            distance = head_dim // 2
        first = i < pairs
        second = (i >= distance) & (i < distance + pairs)
        pair = tl.where(first, i, i - distance)
    turns = first | second
    partner = tl.where(first, i + distance, tl.where(second, i - distance, i))

    x = tl.load(row_ptr + i, mask=exist[:, None] & inside, other=0.0).to(tl.float32)
    other = tl.load(row_ptr + partner, mask=exist[:, None] & inside & turns, other=0.0).to(tl.float32)
    if NORMALIZED:
        inverse = inverse_root(tl.sum(x * x, 1), head_dim, eps)[:, None]
        x = normed(x, inverse, weight_ptr, i, inside, weight_offset, ROUND_BEFORE_WEIGHT, DTYPE)
        other = normed(other, inverse, weight_ptr, partner, inside & turns, weight_offset, ROUND_BEFORE_WEIGHT, DTYPE)

    position = _place(positions_ptr, batch, row, positions_batch, positions_row, exist)
    known = (position >= 0) & (position < table_rows)
    at = (batch * table_batch + position * table_row)[:, None] + pair
    wanted = (exist & known)[:, None] & inside & turns
    cos = tl.load(cos_ptr + at, mask=wanted, other=float("nan"))
    sin = tl.load(sin_ptr + at, mask=wanted, other=float("nan"))
    y = tl.where(turns, x * cos + tl.where(first, -other, other) * sin, x)
    y = tl.where(known[:, None], y, float("nan"))

    to = row
    stored = exist
    if slots_ptr is not None:
        to = _place(slots_ptr, batch, row, slots_batch, slots_row, exist)
        stored = exist & (to >= 0) & (to < capacity)
    out = (out_ptr + batch * out_batch + head * out_head + to * out_row)[:, None]
    tl.store(out + i, y.to(DTYPE), mask=stored[:, None] & inside)


@triton.jit
def _copy_rows(
    block, x_ptr, out_ptr, slots_ptr, num_rows, heads, length, capacity, head_dim, stride_batch, stride_head,
    stride_row, out_batch, out_head, out_row, slots_batch, slots_row, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch, head, row, exist = _rows(block, num_rows, heads, length, BLOCK_ROWS)
    i = tl.arange(0, BLOCK)[None, :]
    row_ptr = (x_ptr + batch * stride_batch + head * stride_head + row * stride_row)[:, None]
    x = tl.load(row_ptr + i, mask=exist[:, None] & (i < head_dim), other=0.0)
    slot = _place(slots_ptr, batch, row, slots_batch, slots_row, exist)
    stored = exist & (slot >= 0) & (slot < capacity)
    out = (out_ptr + batch * out_batch + head * out_head + slot * out_row)[:, None]
    tl.store(out + i, x, mask=stored[:, None] & (i < head_dim))


@triton.jit(do_not_specialize=["batch", "length", "heads", "kv_heads", "capacity", "table_rows", "pairs"])
def _qk_norm_rope_kernel(
    query_ptr,  # [batch, heads, length, head_dim]
    key_ptr,  # [batch, kv_heads, length, head_dim]
    value_ptr,  # the same, or None: no cache
    query_weight_ptr,  # [head_dim], or None
    key_weight_ptr,
    query_out_ptr,  # [batch, heads, length, head_dim]
    key_out_ptr,  # [batch, kv_heads, length, head_dim], or the cache [batch, kv_heads, capacity, head_dim]
    cache_value_ptr,  # the cache of values, or None
    cos_ptr,  # [batch, table_rows, pairs] float32
    sin_ptr,
    positions_ptr,  # [batch, length] int64, or None
    slots_ptr,  # [batch, length] int64, or None
    batch, length, heads, kv_heads, capacity, table_rows, head_dim, pairs, eps, weight_offset,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    query_out_batch, query_out_head, query_out_row, key_out_batch, key_out_head, key_out_row,
    cache_value_batch, cache_value_head, cache_value_row, table_batch, table_row, positions_batch, positions_row,
    slots_batch, slots_row,
    NORMALIZED: tl.constexpr, ROUND_BEFORE_WEIGHT: tl.constexpr, STYLE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    query_rows, key_rows = batch * length * heads, batch * length * kv_heads
    query_blocks = (query_rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    key_blocks = (key_rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    block = tl.program_id(0)
    if block < query_blocks:
        _rope_rows(
            block, query_ptr, query_weight_ptr, query_out_ptr, cos_ptr, sin_ptr, positions_ptr, None, query_rows,
            heads, length, capacity, table_rows, head_dim, pairs, eps, weight_offset, query_batch, query_head,
            query_row, query_out_batch, query_out_head, query_out_row, table_batch, table_row, positions_batch,
            positions_row, 0, 0, NORMALIZED, ROUND_BEFORE_WEIGHT, STYLE, BLOCK_ROWS, BLOCK,
        )  # fmt: skip
    elif block < query_blocks + key_blocks:
        _rope_rows(
            block - query_blocks, key_ptr, key_weight_ptr, key_out_ptr, cos_ptr, sin_ptr, positions_ptr, slots_ptr,
            key_rows, kv_heads, length, capacity, table_rows, head_dim, pairs, eps, weight_offset, key_batch, key_head,
            key_row, key_out_batch, key_out_head, key_out_row, table_batch, table_row, positions_batch, positions_row,
            slots_batch, slots_row, NORMALIZED, ROUND_BEFORE_WEIGHT, STYLE, BLOCK_ROWS, BLOCK,
        )  # fmt: skip
    elif value_ptr is not None:
        _copy_rows(
            block - query_blocks - key_blocks, value_ptr, cache_value_ptr, slots_ptr, key_rows, kv_heads, length,
            capacity, head_dim, value_batch, value_head, value_row, cache_value_batch, cache_value_head,
            cache_value_row, slots_batch, slots_row, BLOCK_ROWS, BLOCK,
        )  # fmt: skip


_INTERPRETED = not isinstance(_qk_norm_rope_kernel, triton.JITFunction)
_OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


def _launch_config(head_dim: int) -> dict[str, int]:
    """8 elements a thread; the interpreter pays by the program. By the size of a head alone."""
    block = max(16, triton.next_power_of_2(head_dim))
    return {"BLOCK": block, "BLOCK_ROWS": max(1, (32768 if _INTERPRETED else 1024) // block)}


def qk_norm_rope(
    query: Tensor, key: Tensor, value: Tensor | None, cos: Tensor, sin: Tensor, query_weight: Tensor | None,
    key_weight: Tensor | None, positions: Tensor | None, cache_key: Tensor | None, cache_value: Tensor | None,
    cache_positions: Tensor | None, normalized: bool, eps: float, weight_offset: float, round_before_weight: bool,
    style: int, query_out: Tensor, key_out: Tensor | None,
) -> None:  # fmt: skip
    """Fill ``query_out``, and ``key_out`` or the caches, of which either is None; shapes as the kernel has them."""
    batch, heads, length, head_dim = query.shape
    kv_heads, pairs = key.shape[1], cos.shape[2]
    key_to = key_out if cache_key is None else cache_key
    assert key_to is not None
    config = _launch_config(head_dim)
    rows = [batch * length * x for x in (heads, kv_heads, 0 if value is None else kv_heads)]
    blocks = sum(triton.cdiv(x, config["BLOCK_ROWS"]) for x in rows)
    if not blocks or not head_dim:
        return

    def strides(x: Tensor | None, count: int) -> tuple[int, ...]:
        return (0,) * count if x is None else x.stride()[:count]

    table = (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1))
    with torch.cuda.device_of(query):
        _qk_norm_rope_kernel[blocks,](
            query, key, value, query_weight, key_weight, query_out, key_to, cache_value, cos, sin, positions,
            cache_positions, batch, length, heads, kv_heads, 0 if cache_key is None else cache_key.shape[2],
            cos.shape[1], head_dim, pairs, eps, weight_offset, *strides(query, 3), *strides(key, 3),
            *strides(value, 3), *strides(query_out, 3), *strides(key_to, 3), *strides(cache_value, 3), *table,
            *strides(positions, 2), *strides(cache_positions, 2), NORMALIZED=normalized,
            ROUND_BEFORE_WEIGHT=round_before_weight, STYLE=style, **config, **_OPTIONS,
        )  # fmt: skip


def ahead_of_time() -> list[tuple[Any, ...]]:
    """Each dtype and style, with and without a norm, a cache, positions."""
    pointers = ("query", "key", "value", "query_weight", "key_weight", "query_out", "key_out", "cache_value")
    others = ("batch", "length", "heads", "kv_heads", "capacity", "table_rows", "pairs")
    kinds = {f"{name}_ptr": "*fp32:16" for name in ("cos", "sin")} | dict.fromkeys(others, "i32")
    kinds |= {"positions_ptr": "*i64:16", "slots_ptr": "*i64:16", "eps": "fp32", "weight_offset": "fp32"}
    compilations = []
    for dtype, head_dim, style, normalized, cached in (
        ("bf16", 128, 0, True, True),
        ("bf16", 512, 2, True, False),
        ("fp16", 64, 1, False, False),
        ("fp32", 256, 0, True, True),
    ):
        none: tuple[str, ...] = () if normalized else ("query_weight_ptr", "key_weight_ptr")
        none += () if cached else ("value_ptr", "cache_value_ptr", "slots_ptr", "positions_ptr")
        rest = {name: "i32:16" for name in _qk_norm_rope_kernel.arg_names if name.islower() and name not in kinds}
        rest |= {f"{name}_ptr": f"*{dtype}:16" for name in pointers}
        signature = {name: kind for name, kind in (kinds | rest).items() if name not in none}
        constants: dict[str, Any] = _launch_config(head_dim) | dict.fromkeys(none)
        constants |= {"NORMALIZED": normalized, "ROUND_BEFORE_WEIGHT": normalized, "STYLE": style}
        name = f"{dtype} {head_dim} style {style}{' norm' if normalized else ''}{' cache' if cached else ''}"
        compilations.append((name, _qk_norm_rope_kernel, signature, constants, _OPTIONS))
    return compilations
