"""What is kept of a row's logits when they are made a tile at a time: one part for each logical tile of 128 tokens.

Rows are walked through in an order of their own, the ones to be read first; a row's place in it is its slot. Parts lie
in memory as [6, slots, num_tiles] float32. The first four are those of ``_common.py``: the largest logit, the sums of
2^z and z 2^z, the sum of 2^z for the draw. Then come the second largest logit and, as a float, the place in the tile of
the first token that has the largest.
"""

from __future__ import annotations

import triton
import triton.language as tl
from diffusion_runtime.kernels._common import (
    INF,
    TILE,
    exponent,
    inverse_temperature,
    row_setting,
    softcapped,
    top_value,
)

SECOND = tl.constexpr(4)
INDEX = tl.constexpr(5)
NUM_KINDS = 6


@triton.jit
def rows_of_slots(block, order_ptr, num_rows, BLOCK_ROWS: tl.constexpr):
    """Slots and row numbers [BLOCK_ROWS] int64, which of them exist, and which of those are to be read.

    order_ptr [rows + 1] int32: the row in each slot, then how many are to be read; None: every row in its own place.
    """
    slots = block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exist = slots < num_rows
    rows, live = slots, exist
    if order_ptr is not None:
        rows = tl.load(order_ptr + slots, mask=exist, other=0).to(tl.int64)
        live = exist & (slots < tl.load(order_ptr + num_rows))
    return slots, rows, exist, live


@triton.jit
def complete_logits(x, tokens, inside, rows, bias_ptr, allowed_ptr, stride_allowed):
    """Products x [rows, n] float32 to logits: with the bias, and -inf at a token that is not ``inside`` or not allowed.

    tokens [rows or 1, n] int64, rows [rows] int64; inside [rows, n] also says of which rows ``allowed`` may be read.
    """
    if bias_ptr is not None:
        x += tl.load(bias_ptr + tokens, mask=inside, other=0.0).to(tl.float32)
    if allowed_ptr is not None:
        words = tl.load(allowed_ptr + rows[:, None] * stride_allowed + tokens // 32, mask=inside, other=0)
        inside = inside & ((words >> (tokens % 32).to(tl.int32)) & 1 != 0)
    return tl.where(inside, x, -INF)


@triton.jit
def store_tile(
    x,  # [rows, TILE] float32 logits
    part_ptr,  # [rows]: where the part of each goes
    size,  # from one kind of number to the next
    rows,
    live,
    temperature_ptr,
    temperature,
    statistics_temperature_ptr,
    statistics_temperature,
    softcap,
):
    """Turn the logits of a tile into a part of each live row."""
    lane = tl.arange(0, TILE)[None, :]
    largest = tl.max(x, 1)
    largest = tl.where(largest == largest, largest, -INF)  # nothing but NaN: the mass will say so
    index = tl.min(tl.where(x == largest[:, None], lane, TILE - 1), 1)
    tl.store(part_ptr, largest, mask=live)
    tl.store(part_ptr + SECOND * size, tl.max(tl.where(lane == index[:, None], -INF, x), 1), mask=live)
    tl.store(part_ptr + INDEX * size, index.to(tl.float32), mask=live)

    top, y = top_value(largest, softcap), softcapped(x, softcap)
    inverse = inverse_temperature(
        row_setting(statistics_temperature_ptr, statistics_temperature, rows, live, tl.float32)
    )
    z = exponent(y, top, inverse)
    power = tl.exp2(z)
    mass = tl.sum(power, 1)
    draw_temperature = row_setting(temperature_ptr, temperature, rows, live, tl.float32)
    draw_inverse = inverse_temperature(tl.where(draw_temperature > 0, draw_temperature, 1.0))
    differs = live & (draw_temperature > 0) & (draw_inverse != inverse)
    tl.store(part_ptr + size, mass, mask=live)
    tl.store(part_ptr + 2 * size, tl.sum(z * power, 1), mask=live)
    tl.store(part_ptr + 3 * size, mass, mask=live)
    if tl.max(differs.to(tl.int32), 0) > 0:
        tl.store(part_ptr + 3 * size, tl.sum(tl.exp2(exponent(y, top, draw_inverse)), 1), mask=differs)
