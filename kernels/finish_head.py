"""The second launch of ``sample_from_hidden``: parts of rows to tokens and statistics, and the logits of a draw again.

A program for each row: it reads a few numbers for each tile and, where the row is drawn, the weights of one tile.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from diffusion_runtime.kernels._common import (
    INF,
    TILE,
    draw_part,
    exponent,
    inverse_temperature,
    largest_of_parts,
    pick_by_mass,
    row_setting,
    row_totals,
    softcapped,
    store_statistics,
    top_value,
)
from diffusion_runtime.kernels._tile_parts import INDEX, SECOND, complete_logits, rows_of_slots
from diffusion_runtime.kernels.philox import DRAW_TOKEN, philox_uniforms
from diffusion_runtime.kernels.row_parts import pointer_or_value, signed_word
from torch import Tensor


@triton.jit
def _tile_products(
    hidden_ptr, weight_ptr, rows, tokens, inside, dim, stride_hidden, stride_weight,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[rows, TILE] float32: the hidden state of each row times the weights of its own tokens [rows, TILE]."""
    hidden_ptr += rows[:, None] * stride_hidden
    weight_ptr += tokens[:, :, None] * stride_weight
    shape: tl.constexpr = [rows.shape[0], TILE, BLOCK_K]
    total = tl.full(shape, 0, tl.float32)
    read = tl.max(inside.to(tl.int32), 1) != 0
    for first in tl.range(0, dim, BLOCK_K, num_stages=STAGES):
        k = first + tl.arange(0, BLOCK_K)
        h = tl.load(hidden_ptr + k[None, :], mask=read[:, None] & (k < dim)[None, :], other=0.0).to(tl.float32)
        known = inside[:, :, None] & (k < dim)[None, None, :]
        w = tl.load(weight_ptr + k[None, None, :], mask=known, other=0.0).to(tl.float32)
        total = tl.fma(tl.broadcast_to(h[:, None, :], shape), w, total)
    return tl.sum(total, 2)


@triton.jit(do_not_specialize=["num_rows", "seed_low", "seed_high", "step", "stride_allowed"])
def _finish_head_kernel(
    hidden_ptr,  # [rows, dim]
    weight_ptr,  # [vocab, dim]
    bias_ptr,  # [vocab], or None
    order_ptr,  # [rows + 1] int32, or None
    allowed_ptr,  # [rows, words] int32, or None
    temperature_ptr,  # [rows] float32, or None
    temperature,
    statistics_temperature_ptr,  # [rows] float32, or None
    statistics_temperature,
    softcap,  # or None
    parts_ptr,  # [6, slots, num_tiles] float32
    seed_ptr,  # [rows] int64, or None
    seed_low,
    seed_high,
    position_ptr,  # [rows] int64
    step_ptr,  # [rows] int64, or None
    step,
    ids_ptr,  # [2, rows] int64: token, argmax
    statistics_ptr,  # [5, rows] float32: logprob, confidence, margin, entropy, logsumexp
    num_rows,
    dim,
    vocab,
    stride_hidden,
    stride_weight,
    stride_allowed,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    slots, rows, exist, live = rows_of_slots(tl.program_id(0), order_ptr, num_rows, BLOCK_ROWS)
    wide_rows = num_rows.to(tl.int64)
    ids_ptr += rows
    statistics_ptr += rows
    if order_ptr is not None:
        unread = exist & ~live
        for i in tl.static_range(2):
            tl.store(ids_ptr + i * wide_rows, -1, mask=unread)
        for i in tl.static_range(5):
            tl.store(statistics_ptr + i * wide_rows, 0.0, mask=unread)
    if tl.max(live.to(tl.int32), 0) == 0:
        return

    num_tiles = (vocab - 1) // TILE + 1
    size = wide_rows * num_tiles
    part_ptr = parts_ptr + slots * num_tiles
    largest, winner, second = largest_of_parts(part_ptr, live, num_tiles, BLOCK_PARTS)
    top = top_value(largest, softcap)
    inverse = inverse_temperature(
        row_setting(statistics_temperature_ptr, statistics_temperature, rows, live, tl.float32)
    )
    draw_temperature = row_setting(temperature_ptr, temperature, rows, live, tl.float32)
    draw_inverse = inverse_temperature(tl.where(draw_temperature > 0, draw_temperature, 1.0))
    finite = live & (tl.abs(largest) < INF)
    mass, moment, draw_mass = row_totals(
        part_ptr, size, finite, num_tiles, top, softcap, inverse, draw_inverse, BLOCK_PARTS
    )
    valid = finite & (mass == mass)
    second = tl.maximum(second, tl.load(part_ptr + SECOND * size + winner, mask=valid, other=-INF))
    second = softcapped(second, softcap)
    index = tl.load(part_ptr + INDEX * size + winner, mask=valid, other=0.0)
    argmax = winner.to(tl.int64) * TILE + index.to(tl.int64)

    token, candidate = argmax, top
    drawn = valid & (draw_temperature > 0)
    if tl.max(drawn.to(tl.int32), 0) > 0:
        key = (seed_high.to(tl.int64) << 32) | (seed_low.to(tl.int64) & 0xFFFFFFFF)
        seed = row_setting(seed_ptr, key, rows, live, tl.int64)
        position = tl.load(position_ptr + rows, mask=live, other=0)
        step_of_row = row_setting(step_ptr, step, rows, live, tl.int64)
        tile_uniform, token_uniform = philox_uniforms(seed, position, step_of_row, DRAW_TOKEN)
        tile, _ = draw_part(
            part_ptr, size, drawn, num_tiles, top, softcap, draw_inverse, tile_uniform * draw_mass, BLOCK_PARTS
        )
        lane = tl.arange(0, TILE)[None, :]
        tokens = tile.to(tl.int64)[:, None] * TILE + lane
        inside = drawn[:, None] & (tokens < vocab)
        x = _tile_products(
            hidden_ptr, weight_ptr, rows, tokens, inside, dim, stride_hidden, stride_weight, BLOCK_K, STAGES
        )
        y = softcapped(complete_logits(x, tokens, inside, rows, bias_ptr, allowed_ptr, stride_allowed), softcap)
        # relative to their own top: these sums are rounded in another order than those the part was made of
        weight = tl.exp2(exponent(y, top_value(tl.max(y, 1), None), draw_inverse)).to(tl.float64)
        picked, _, _ = pick_by_mass(weight, token_uniform * tl.sum(weight, 1))
        value = tl.sum(tl.where(lane == picked[:, None], y, 0.0), 1)
        token = tl.where(drawn, tile.to(tl.int64) * TILE + picked, token)
        candidate = tl.where(token == argmax, top, tl.minimum(value, top))

    tl.store(ids_ptr, tl.where(valid, token, -1), mask=live)
    tl.store(ids_ptr + wide_rows, tl.where(valid, argmax, -1), mask=live)
    store_statistics(statistics_ptr, wide_rows, live, valid, top, second, candidate, mass, moment, inverse)


_INTERPRETED = not isinstance(_finish_head_kernel, triton.JITFunction)
# Without a limit of its own the assembler spills a few registers to fit two programs on a core.
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False, "maxnreg": 255}


def _launch_config(vocab: int) -> dict[str, int]:
    """A row for each program of a GPU: a draw reads 128 rows of weights, as fast as one core can."""
    block_parts = min(1024, triton.next_power_of_2(triton.cdiv(vocab, TILE.value)))
    return {"BLOCK_ROWS": 16 if _INTERPRETED else 1, "BLOCK_PARTS": block_parts, "BLOCK_K": 64, "STAGES": 3}


def finish_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    allowed: Tensor | None,
    temperature: Tensor | None,
    temperature_value: float,
    statistics_temperature: Tensor | None,
    statistics_temperature_value: float,
    softcap: float | None,
    parts: Tensor,  # [6, slots, num_tiles]
    stride_allowed: int,
    seed: Tensor | int,
    position: Tensor,
    step: Tensor | int,
    ids: Tensor,  # [2, rows]
    statistics: Tensor,  # [5, rows]
) -> None:
    """Fill ``ids`` and ``statistics`` from the parts; the arguments are those of ``sample_from_hidden``."""
    num_rows, (vocab, dim) = len(hidden), weight.shape
    config = _launch_config(vocab)
    seed_ptr, seed_value = pointer_or_value(seed, 0)
    step_ptr, step_value = pointer_or_value(step, 0)
    _finish_head_kernel[(triton.cdiv(num_rows, config["BLOCK_ROWS"]),)](
        hidden, weight, bias, order, allowed,
        temperature, temperature_value, statistics_temperature, statistics_temperature_value, softcap, parts,
        seed_ptr, signed_word(seed_value), signed_word(seed_value >> 32),
        position, step_ptr, signed_word(step_value), ids, statistics,
        num_rows, dim, vocab, hidden.stride(0), weight.stride(0), stride_allowed,
        **config, **_OPTIONS,
    )  # fmt: skip


def ahead_of_time() -> list[tuple[Any, ...]]:
    """Each dtype, aligned weights or not, all pointers or none."""
    types = {"order_ptr": "*i32:16", "allowed_ptr": "*i32:16", "temperature_ptr": "*fp32:16", "temperature": "fp32"}
    types |= {"statistics_temperature_ptr": "*fp32:16", "statistics_temperature": "fp32", "softcap": "fp32"}
    types |= {"parts_ptr": "*fp32:16", "seed_ptr": "*i64:16", "seed_low": "i32", "seed_high": "i32"}
    types |= {"position_ptr": "*i64:16", "step_ptr": "*i64:16", "step": "i32", "ids_ptr": "*i64:16"}
    types |= {"statistics_ptr": "*fp32:16", "num_rows": "i32", "stride_allowed": "i32"}
    needed = ("parts_ptr", "position_ptr", "ids_ptr", "statistics_ptr")
    bare = (*(name for name in types if name.endswith("_ptr") and name not in needed), "bias_ptr", "softcap")
    compilations = []
    for dtype, vocab, dim, none in (
        ("bf16", 126_464, 4096, bare),
        ("bf16", 262_144, 2816, ()),
        ("fp16", 126_464, 4096, ()),
        ("fp16", 50_257, 100, bare),
        ("fp32", 126_464, 4096, bare),
        ("fp32", 300, 64, ()),
    ):
        shape = dict.fromkeys(("dim", "stride_hidden", "stride_weight"), "i32" if dim % 16 else "i32:16")
        every = types | shape | {f"{name}_ptr": f"*{dtype}:16" for name in ("hidden", "weight", "bias")}
        every |= {"vocab": "i32" if vocab % 16 else "i32:16"}
        signature = {name: kind for name, kind in every.items() if name not in none}
        constants = _launch_config(vocab) | dict.fromkeys(none)
        name = f"{dtype} {vocab} x {dim}{'' if none else ' settings'}"
        compilations.append((name, _finish_head_kernel, signature, constants, _OPTIONS))
    return compilations
