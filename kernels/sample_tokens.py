"""``sample_tokens``: rows of logits to a candidate token and the statistics of each row, in two launches.

The first reads every logit once and leaves a few numbers for each part of a row. The second puts these together and
re-reads only the parts that hold the largest logit and the drawn token. ``tests/compile/compile_triton.py`` compiles
what ``ahead_of_time`` lists.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
from torch import Tensor


@triton.jit(do_not_specialize=["num_rows", "inner"])
def _row_parts_kernel(
    logits_ptr,  # [outer, inner, vocab]
    masked_ptr,  # [rows] bool, or None
    temperature_ptr,  # [rows] float32, or None
    temperature,
    statistics_temperature_ptr,  # [rows] float32, or None
    statistics_temperature,
    softcap,  # or None
    parts_ptr,  # [4, rows, num_parts] float32, as _common.py says
    num_rows,
    inner,
    vocab,
    stride_outer,
    stride_inner,
    BLOCK_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    num_parts = (vocab - 1) // CHUNK + 1
    part = tl.program_id(0) % num_parts
    rows, _, live = rows_of_block(tl.program_id(0) // num_parts, masked_ptr, num_rows, BLOCK_ROWS)
    if tl.max(live.to(tl.int32), 0) == 0:
        return
    row_ptr = row_pointers(logits_ptr, rows, inner, stride_outer, stride_inner)
    x = load_logits(row_ptr, tl.full(rows.shape, 0, tl.int64) + part * CHUNK, vocab, live, CHUNK)
    largest = tl.max(x, 1)
    largest = tl.where(largest == largest, largest, -INF)  # nothing but NaN: the mass will say so
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
    draw_mass = mass
    if tl.max(differs.to(tl.int32), 0) > 0:
        draw_mass = tl.where(differs, tl.sum(tl.exp2(exponent(y, top, draw_inverse)), 1), mass)

    part_ptr = parts_ptr + rows * num_parts + part
    size = num_rows.to(tl.int64) * num_parts
    tl.store(part_ptr, largest, mask=live)
    tl.store(part_ptr + size, mass, mask=live)
    tl.store(part_ptr + 2 * size, tl.sum(z * power, 1), mask=live)
    tl.store(part_ptr + 3 * size, draw_mass, mask=live)


@triton.jit
def _draw_token(row_ptr, part_ptr, drawn, vocab, part, target, softcap, inverse, uniform, CHUNK: tl.constexpr):
    """The tile of ``part`` at ``target``, then the token in it that ``uniform`` points at; and the token's y."""
    top = top_value(tl.load(part_ptr + part, mask=drawn, other=0.0), softcap)
    first = part.to(tl.int64) * CHUNK
    y = softcapped(load_logits(row_ptr, first, vocab, drawn, CHUNK), softcap)
    tiles = tl.reshape(tl.exp2(exponent(y, top, inverse)), [drawn.shape[0], CHUNK // TILE, TILE])
    tile, _, _ = pick_by_mass(tl.sum(tiles, 2).to(tl.float64), target)
    first += tile * TILE
    y = softcapped(load_logits(row_ptr, first, vocab, drawn, TILE), softcap)
    mass = tl.exp2(exponent(y, top, inverse)).to(tl.float64)
    index, _, _ = pick_by_mass(mass, uniform * tl.sum(mass, 1))
    picked = tl.arange(0, TILE)[None, :] == index[:, None]
    return first + index, tl.sum(tl.where(picked, y, 0.0), 1)


@triton.jit(do_not_specialize=["num_rows", "inner", "seed_low", "seed_high", "step"])
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
    parts_ptr,  # [4, rows, num_parts] float32
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

    first = winner.to(tl.int64) * CHUNK
    x = load_logits(row_ptr, first, vocab, valid, CHUNK)
    lane = tl.arange(0, CHUNK)[None, :]
    index = tl.min(tl.where(x == largest[:, None], lane, CHUNK), 1)
    second = softcapped(tl.maximum(second, tl.max(tl.where(lane == index[:, None], -INF, x), 1)), softcap)
    argmax = first + index

    token, candidate = argmax, top
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
            part_ptr, size, drawn, num_parts, top, softcap, draw_inverse, tile_uniform * draw_mass, BLOCK_PARTS
        )
        drawn_token, drawn_value = _draw_token(
            row_ptr, part_ptr, drawn, vocab, part, target, softcap, draw_inverse, token_uniform, CHUNK
        )
        token = tl.where(drawn, drawn_token, token)
        candidate = tl.where(drawn, drawn_value, candidate)

    tl.store(ids_ptr, tl.where(valid, token, -1), mask=live)
    tl.store(ids_ptr + wide_rows, tl.where(valid, argmax, -1), mask=live)
    store_statistics(statistics_ptr, wide_rows, live, valid, top, second, candidate, mass, moment, inverse)


_INTERPRETED = not isinstance(_finish_rows_kernel, triton.JITFunction)


class _Launch(NamedTuple):
    num_parts: int
    parts: dict[str, int]  # constants of the first kernel
    finish: dict[str, int]  # and of the second


def _launch_config(vocab: int) -> _Launch:
    """The cut depends on ``vocab`` alone: a row must not get other sums of floats in another batch.

    16 logits a thread on sm_80 and sm_90, and few rows in a program, because each of its threads may hold the float64
    numbers of every row. Triton's interpreter pays by the program, whatever its size, and takes many rows.
    """
    most_rows, most_logits = (64, 65536) if _INTERPRETED else (8, 4096)
    chunk = min(4096, max(TILE.value, triton.next_power_of_2(vocab)))
    num_parts = triton.cdiv(vocab, chunk)
    parts = {"CHUNK": chunk, "BLOCK_ROWS": min(most_rows, most_logits // chunk)}
    return _Launch(num_parts, parts, parts | {"BLOCK_PARTS": min(64, triton.next_power_of_2(num_parts))})


# Products and sums stay apart where the code does not say fma. Fused, softcap * tanh(...) - top would not be 0 for the
# best token, and the rounding of a row would be the compiler's choice.
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
# Without a limit of its own the assembler spills a few of the finish's 90 registers to fit more programs on a core.
_FINISH_OPTIONS = {**_OPTIONS, "maxnreg": 255}


def sample_tokens(
    logits: Tensor,  # [outer, inner, vocab]
    masked: Tensor | None,  # [rows]
    temperature: Tensor | float,  # [rows] or one
    seed: Tensor | int,  # [rows] or one
    position: Tensor | None,  # [rows]
    step: Tensor | int,  # [rows] or one
    statistics_temperature: Tensor | float,  # [rows] or one
    softcap: float,  # 0: none
    ids: Tensor,  # [2, rows]
    statistics: Tensor,  # [5, rows]
) -> None:
    """Fill ``ids`` and ``statistics``, as ``csrc/cpu/sample_tokens.h`` says."""
    outer, inner, vocab = logits.shape
    num_rows = outer * inner
    config = _launch_config(vocab)
    num_blocks = triton.cdiv(num_rows, config.parts["BLOCK_ROWS"])
    parts = torch.empty(4, num_rows, config.num_parts, dtype=torch.float32, device=logits.device)
    shape = (num_rows, inner, vocab, logits.stride(0), logits.stride(1))
    draw = _pointer_or_value(temperature, 0.0)
    measure = (*_pointer_or_value(statistics_temperature, 0.0), softcap or None)
    seed_ptr, seed_value = _pointer_or_value(seed, 0)
    seeds = (seed_ptr, _signed_word(seed_value), _signed_word(seed_value >> 32))
    step_ptr, step_value = _pointer_or_value(step, 0)
    places = (position, step_ptr, _signed_word(step_value))
    with torch.cuda.device_of(logits):
        _row_parts_kernel[(num_blocks * config.num_parts,)](
            logits, masked, *draw, *measure, parts, *shape, **config.parts, **_OPTIONS
        )
        _finish_rows_kernel[(num_blocks,)](
            logits, masked, *draw, *seeds, *places, *measure, parts, ids, statistics, *shape,
            **config.finish, **_FINISH_OPTIONS,
        )  # fmt: skip


def _pointer_or_value(setting: Any, unused: Any) -> tuple[Tensor | None, Any]:
    return (setting, unused) if isinstance(setting, Tensor) else (None, setting)


def _signed_word(value: int) -> int:
    """The low 32 bits with a sign: one kernel for all values, because Triton picks an int's type by its value."""
    return (value & 0xFFFFFFFF ^ 0x80000000) - 0x80000000


def ahead_of_time() -> list[tuple[Any, ...]]:
    """What ``tests/compile/compile_triton.py`` compiles: each dtype, aligned rows or not, all pointers or none."""
    draw = {"temperature_ptr": "*fp32:16", "temperature": "fp32"}
    measure = {"statistics_temperature_ptr": "*fp32:16", "statistics_temperature": "fp32", "softcap": "fp32"}
    places = {"seed_ptr": "*i64:16", "seed_low": "i32", "seed_high": "i32"}
    places |= {"position_ptr": "*i64:16", "step_ptr": "*i64:16", "step": "i32"}
    results = {"parts_ptr": "*fp32:16", "ids_ptr": "*i64:16", "statistics_ptr": "*fp32:16"}
    every = {"masked_ptr": "*i1:16", **draw, **places, **measure, **results, "num_rows": "i32", "inner": "i32"}
    optional = [*(name for name in (draw | places | measure) if name.endswith("_ptr")), "masked_ptr", "softcap"]
    compilations = []
    for dtype, vocab, none in (
        ("bf16", 126_464, optional),
        ("fp32", 126_464, optional),
        ("fp16", 126_464, []),
        ("bf16", 50_257, optional),
        ("fp32", 300, ["softcap"]),
        ("fp32", 128, []),
    ):
        types = every | dict.fromkeys(("vocab", "stride_outer", "stride_inner"), "i32" if vocab % 16 else "i32:16")
        config = _launch_config(vocab)
        for kernel, constants, options in (
            (_row_parts_kernel, config.parts, _OPTIONS),
            (_finish_rows_kernel, config.finish, _FINISH_OPTIONS),
        ):
            known = {name: kind for name, kind in types.items() if name in kernel.arg_names}
            signature = {"logits_ptr": f"*{dtype}:16"} | {k: kind for k, kind in known.items() if k not in none}
            absent = {name: None for name in known if name in none}
            name = f"{kernel.__name__} {dtype} {vocab}{'' if none else ' settings'}"
            compilations.append((name, kernel, signature, constants | absent, options))
    return compilations
