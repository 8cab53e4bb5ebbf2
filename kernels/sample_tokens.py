"""``sample_tokens``: rows of logits to a candidate token and the statistics of each row, in two launches.

The first, in ``row_parts.py``, reads every logit once and leaves a few numbers for each part of a row. The second puts
these together and re-reads only the parts that hold the largest logit and the drawn token. A draw among some of the
tokens takes the parts of these tokens, for which ``row_cutoff.py`` says how small a logit top_k, top_p and min_p leave.
``tests/compile/compile_triton.py`` compiles what ``ahead_of_time`` lists.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from diffusion_runtime.kernels._common import (
    INF,
    TILE,
    draw_part,
    exponent,
    inverse_temperature,
    largest_of_parts,
    load_logits,
    pick_by_mass,
    row_pointers,
    row_setting,
    row_totals,
    rows_of_block,
    softcapped,
    store_statistics,
    top_value,
)
from diffusion_runtime.kernels.philox import DRAW_TOKEN, philox_uniforms
from diffusion_runtime.kernels.row_cutoff import may_cut, row_cutoff
from diffusion_runtime.kernels.row_parts import (
    LIMITS,
    ROW_OPTIONS,
    SETTINGS,
    compilation,
    launch_config,
    pointer_or_value,
    row_parts,
    signed_word,
    words_and_stride,
)
from torch import Tensor


@triton.jit
def _best_token(row_ptr, part, largest, live, vocab, allowed_ptr, cutoff, CHUNK: tl.constexpr):
    """The first token of ``part`` whose logit is ``largest``, and the largest other logit of the part."""
    first = part.to(tl.int64) * CHUNK
    x = load_logits(row_ptr, first, vocab, live, CHUNK, allowed_ptr, cutoff)
    lane = tl.arange(0, CHUNK)[None, :]
    index = tl.min(tl.where(x == largest[:, None], lane, CHUNK), 1)
    return first + index, tl.max(tl.where(lane == index[:, None], -INF, x), 1)


@triton.jit
def _draw_token(
    row_ptr, part_ptr, drawn, vocab, part, target, softcap, inverse, uniform, allowed_ptr, cutoff, CHUNK: tl.constexpr
):
    """The tile of ``part`` at ``target``, then the token in it that ``uniform`` points at; and the token's y."""
    top = top_value(tl.load(part_ptr + part, mask=drawn, other=0.0), softcap)
    first = part.to(tl.int64) * CHUNK
    y = softcapped(load_logits(row_ptr, first, vocab, drawn, CHUNK, allowed_ptr, cutoff), softcap)
    tiles = tl.reshape(tl.exp2(exponent(y, top, inverse)), [drawn.shape[0], CHUNK // TILE, TILE])
    tile, _, _ = pick_by_mass(tl.sum(tiles, 2).to(tl.float64), target)
    first += tile * TILE
    y = softcapped(load_logits(row_ptr, first, vocab, drawn, TILE, allowed_ptr, cutoff), softcap)
    mass = tl.exp2(exponent(y, top, inverse)).to(tl.float64)
    index, _, _ = pick_by_mass(mass, uniform * tl.sum(mass, 1))
    picked = tl.arange(0, TILE)[None, :] == index[:, None]
    return first + index, tl.sum(tl.where(picked, y, 0.0), 1)


@triton.jit(do_not_specialize=["num_rows", "inner", "seed_low", "seed_high", "step", "allowed_stride"])
def _finish_rows_kernel(
    logits_ptr,  # [outer, inner, vocab]
    masked_ptr,  # [rows] bool, or None
    temperature_ptr,  # [rows] float32, or None
    temperature,
    seed_ptr,  # [rows] int64, or None
    seed_low,
    seed_high,
    position_ptr,  # [rows] int64, or None: the index along inner
    step_ptr,  # [rows] int64, or None
    step,
    statistics_temperature_ptr,  # [rows] float32, or None
    statistics_temperature,
    softcap,  # or None
    allowed_ptr,  # [rows, words] int32, or None: every token
    allowed_stride,
    cutoff_ptr,  # [rows] float32, or None: the smallest logit that may be drawn
    parts_ptr,  # [4, rows, num_parts] float32: of the tokens whose statistics are asked for
    drawn_parts_ptr,  # the same of the tokens that may be drawn, or None: they are the same tokens
    ids_ptr,  # [2, rows] int64: token, argmax
    statistics_ptr,  # [5, rows] float32: logprob, confidence, margin, entropy, logsumexp
    num_rows,
    inner,
    vocab,
    stride_outer,
    stride_inner,
    BLOCK_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    rows, exist, live = rows_of_block(tl.program_id(0), masked_ptr, num_rows, BLOCK_ROWS)
    wide_rows = num_rows.to(tl.int64)
    ids_ptr += rows
    statistics_ptr += rows
    if masked_ptr is not None:
        unread = exist & ~live
        for i in tl.static_range(2):
            tl.store(ids_ptr + i * wide_rows, -1, mask=unread)
        for i in tl.static_range(5):
            tl.store(statistics_ptr + i * wide_rows, 0.0, mask=unread)
    if tl.max(live.to(tl.int32), 0) == 0:
        return

    num_parts = (vocab - 1) // CHUNK + 1
    size = wide_rows * num_parts
    part_ptr = parts_ptr + rows * num_parts
    row_ptr = row_pointers(logits_ptr, rows, inner, stride_outer, stride_inner)
    if allowed_ptr is not None:
        allowed_ptr += rows * allowed_stride
    cutoff = None
    if cutoff_ptr is not None:
        cutoff = tl.load(cutoff_ptr + rows, mask=live, other=INF)
    largest, winner, second = largest_of_parts(part_ptr, live, num_parts, BLOCK_PARTS)
    top = top_value(largest, softcap)
    inverse = inverse_temperature(
        row_setting(statistics_temperature_ptr, statistics_temperature, rows, live, tl.float32)
    )
    draw_temperature = row_setting(temperature_ptr, temperature, rows, live, tl.float32)
    draw_inverse = inverse_temperature(tl.where(draw_temperature > 0, draw_temperature, 1.0))
    finite = live & (tl.abs(largest) < INF)
    mass, moment, draw_mass = row_totals(
        part_ptr, size, finite, num_parts, top, softcap, inverse, draw_inverse, BLOCK_PARTS
    )
    valid = finite & (mass == mass)

    if drawn_parts_ptr is None:
        argmax, other = _best_token(row_ptr, winner, largest, valid, vocab, allowed_ptr, cutoff, CHUNK)
        token, best, draw_part_ptr = argmax, top, part_ptr
    else:
        argmax, other = _best_token(row_ptr, winner, largest, valid, vocab, None, None, CHUNK)
        draw_part_ptr = drawn_parts_ptr + rows * num_parts
        draw_largest, winner, _ = largest_of_parts(draw_part_ptr, live, num_parts, BLOCK_PARTS)
        valid = valid & (draw_largest > -INF)
        best = top_value(draw_largest, softcap)
        token, _ = _best_token(row_ptr, winner, draw_largest, valid, vocab, allowed_ptr, cutoff, CHUNK)
        _, _, draw_mass = row_totals(
            draw_part_ptr, size, valid, num_parts, best, softcap, draw_inverse, draw_inverse, BLOCK_PARTS
        )
    second = softcapped(tl.maximum(second, other), softcap)

    candidate = best
    drawn = valid & (draw_temperature > 0)
    if tl.max(drawn.to(tl.int32), 0) > 0:
        key = (seed_high.to(tl.int64) << 32) | (seed_low.to(tl.int64) & 0xFFFFFFFF)
        seed = row_setting(seed_ptr, key, rows, live, tl.int64)
        position = rows % inner
        if position_ptr is not None:
            position = tl.load(position_ptr + rows, mask=live, other=0)
        step_of_row = row_setting(step_ptr, step, rows, live, tl.int64)
        tile_uniform, token_uniform = philox_uniforms(seed, position, step_of_row, DRAW_TOKEN)
        part, target = draw_part(
            draw_part_ptr, size, drawn, num_parts, best, softcap, draw_inverse, tile_uniform * draw_mass, BLOCK_PARTS
        )
        drawn_token, drawn_value = _draw_token(
            row_ptr, draw_part_ptr, drawn, vocab, part, target, softcap, draw_inverse, token_uniform,
            allowed_ptr, cutoff, CHUNK,
        )  # fmt: skip
        token = tl.where(drawn, drawn_token, token)
        candidate = tl.where(drawn, drawn_value, candidate)

    tl.store(ids_ptr, tl.where(valid, token, -1), mask=live)
    tl.store(ids_ptr + wide_rows, tl.where(valid, argmax, -1), mask=live)
    store_statistics(statistics_ptr, wide_rows, live, valid, top, second, candidate, mass, moment, inverse)


def sample_tokens(
    logits: Tensor,  # [outer, inner, vocab]
    masked: Tensor | None,  # [rows]
    temperature: Tensor | float,  # [rows] or one
    seed: Tensor | int,  # [rows] or one
    position: Tensor | None,  # [rows]
    step: Tensor | int,  # [rows] or one
    statistics_temperature: Tensor | float,  # [rows] or one
    softcap: float,  # 0: none
    allowed: Tensor | None,  # [rows, words]
    top_k: Tensor | int,  # [rows] or one; 0: none
    top_p: Tensor | float,  # [rows] or one; 1: none
    min_p: Tensor | float,  # [rows] or one; 0: none
    restricted: bool,  # the statistics are those of the tokens that may be drawn
    ids: Tensor,  # [2, rows]
    statistics: Tensor,  # [5, rows]
) -> None:
    """Fill ``ids`` and ``statistics``, as ``csrc/cpu/sample_tokens.h`` says."""
    outer, inner, vocab = logits.shape
    num_rows = outer * inner
    config = launch_config(vocab)
    seed_ptr, seed_value = pointer_or_value(seed, 0)
    seeds = (seed_ptr, signed_word(seed_value), signed_word(seed_value >> 32))
    step_ptr, step_value = pointer_or_value(step, 0)
    places = (position, step_ptr, signed_word(step_value))
    measure = (*pointer_or_value(statistics_temperature, 0.0), softcap or None)
    rows = (logits, masked, temperature, statistics_temperature, softcap)
    with torch.cuda.device_of(logits):
        measured = row_parts(*rows, allowed if restricted else None)
        drawn = measured if restricted or allowed is None else row_parts(*rows, allowed)
        cutoff = None
        if may_cut(vocab, temperature, top_k, top_p, min_p):
            cutoff = row_cutoff(logits, masked, temperature, softcap, allowed, top_k, top_p, min_p, drawn)
            drawn = row_parts(*rows, allowed, cutoff, drawn)
            measured = drawn if restricted else measured
        _finish_rows_kernel[(triton.cdiv(num_rows, config.rows["BLOCK_ROWS"]),)](
            logits, masked, *pointer_or_value(temperature, 0.0), *seeds, *places, *measure,
            *words_and_stride(allowed), cutoff, measured, None if drawn is measured else drawn, ids, statistics,
            num_rows, inner, vocab, logits.stride(0), logits.stride(1), **config.rows, **ROW_OPTIONS,
        )  # fmt: skip


def ahead_of_time() -> list[tuple[Any, ...]]:
    """What ``tests/compile/compile_triton.py`` compiles: each dtype, aligned rows or not, all settings or none."""
    compilations = []
    for dtype, vocab, what, none in (
        ("bf16", 126_464, "", SETTINGS + LIMITS),
        ("fp32", 126_464, "", SETTINGS + LIMITS),
        ("fp16", 126_464, " settings", LIMITS),
        ("bf16", 50_257, "", SETTINGS + LIMITS),
        ("fp32", 300, " settings", ("softcap", *LIMITS)),
        ("fp32", 128, " settings", LIMITS),
        ("bf16", 126_464, " restricted", ("drawn_parts_ptr",)),
        ("fp32", 126_464, " unrestricted", ()),
        ("bf16", 50_257, " unrestricted", ()),
        ("fp32", 300, " unrestricted", ()),
    ):
        config = launch_config(vocab)
        compilations.append(compilation(_finish_rows_kernel, what, dtype, vocab, none, config.rows, ROW_OPTIONS))
    return compilations
