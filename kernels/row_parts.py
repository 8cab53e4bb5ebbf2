"""The first pass of ``sample_tokens`` over rows of logits: a few numbers for each part, which ``_common.py`` describes.

It also has what the kernels on such parts share: how rows are cut, how they are launched and compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from diffusion_runtime.kernels._common import (
    INF,
    TILE,
    exponent,
    inverse_temperature,
    load_logits,
    row_pointers,
    row_setting,
    rows_of_block,
    softcapped,
    top_value,
)
from torch import Tensor


@triton.jit(do_not_specialize=["num_rows", "inner", "allowed_stride"])
def _row_parts_kernel(
    logits_ptr,  # [outer, inner, vocab]
    masked_ptr,  # [rows] bool, or None
    temperature_ptr,  # [rows] float32, or None
    temperature,
    statistics_temperature_ptr,  # [rows] float32, or None
    statistics_temperature,
    softcap,  # or None
    allowed_ptr,  # [rows, words] int32, or None: every token
    allowed_stride,
    cutoff_ptr,  # [rows] float32: smaller logits count for nothing; or None
    uncut_ptr,  # the parts of the same rows without the cutoff, or None
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
    if allowed_ptr is not None:
        allowed_ptr += rows * allowed_stride
    cutoff, reached = None, live
    if cutoff_ptr is not None:
        cutoff = tl.load(cutoff_ptr + rows, mask=live, other=INF)
        # what is cut altogether need not be read
        reached = live & (tl.load(uncut_ptr + rows * num_parts + part, mask=live, other=-INF) >= cutoff)
    x = load_logits(
        row_ptr, tl.full(rows.shape, 0, tl.int64) + part * CHUNK, vocab, reached, CHUNK, allowed_ptr, cutoff
    )
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


_INTERPRETED = not isinstance(_row_parts_kernel, triton.JITFunction)


class Launch(NamedTuple):
    num_parts: int
    parts: dict[str, int]  # constants of a program for some rows of one part
    rows: dict[str, int]  # of one for all parts of some rows
    search: dict[str, int]  # and of one that searches a row, each for its own time


def launch_config(vocab: int) -> Launch:
    """The cut depends on ``vocab`` alone: a row must not get other sums of floats in another batch.

    16 logits a thread on sm_80 and sm_90, and few rows in a program, because each of its threads may hold the float64
    numbers of every row. Triton's interpreter pays by the program, whatever its size, and takes many rows.
    """
    most_rows, most_logits = (64, 65536) if _INTERPRETED else (8, 4096)
    chunk = min(4096, max(TILE.value, triton.next_power_of_2(vocab)))
    num_parts = triton.cdiv(vocab, chunk)
    parts = {"CHUNK": chunk, "BLOCK_ROWS": min(most_rows, most_logits // chunk)}
    rows = parts | {"BLOCK_PARTS": min(64, triton.next_power_of_2(num_parts))}
    return Launch(num_parts, parts, rows, rows if _INTERPRETED else rows | {"BLOCK_ROWS": 1})


# Products and sums stay apart where the code does not say fma. Fused, softcap * tanh(...) - top would not be 0 for the
# best token, and the rounding of a row would be the compiler's choice.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
# Without a limit of its own the assembler spills a few of 90 registers to fit more programs on a core.
ROW_OPTIONS = {**OPTIONS, "maxnreg": 255}


def row_parts(
    logits: Tensor,  # [outer, inner, vocab]
    masked: Tensor | None,  # [rows]
    temperature: Tensor | float,  # [rows] or one
    statistics_temperature: Tensor | float,  # [rows] or one
    softcap: float,  # 0: none
    allowed: Tensor | None,  # [rows, words]
    cutoff: Tensor | None = None,  # [rows]
    uncut: Tensor | None = None,  # the parts without it
) -> Tensor:
    """The parts ``[4, rows, num_parts]`` of the tokens that are allowed and not below the cutoff."""
    outer, inner, vocab = logits.shape
    config = launch_config(vocab)
    num_blocks = triton.cdiv(outer * inner, config.parts["BLOCK_ROWS"])
    parts = torch.empty(4, outer * inner, config.num_parts, dtype=torch.float32, device=logits.device)
    _row_parts_kernel[(num_blocks * config.num_parts,)](
        logits, masked, *pointer_or_value(temperature, 0.0), *pointer_or_value(statistics_temperature, 0.0),
        softcap or None, *words_and_stride(allowed), cutoff, uncut, parts,
        outer * inner, inner, vocab, logits.stride(0), logits.stride(1), **config.parts, **OPTIONS,
    )  # fmt: skip
    return parts


def pointer_or_value(setting: Any, unused: Any) -> tuple[Tensor | None, Any]:
    return (setting, unused) if isinstance(setting, Tensor) else (None, setting)


def signed_word(value: int) -> int:
    """The low 32 bits with a sign: one kernel for all values, because Triton picks an int's type by its value."""
    return (value & 0xFFFFFFFF ^ 0x80000000) - 0x80000000


def words_and_stride(allowed: Tensor | None) -> tuple[Tensor | None, int]:
    return (None, 0) if allowed is None else (allowed, allowed.stride(0))


_SETTINGS = {"masked_ptr": "*i1:16", "temperature_ptr": "*fp32:16", "temperature": "fp32"}
_SETTINGS |= {"statistics_temperature_ptr": "*fp32:16", "statistics_temperature": "fp32", "softcap": "fp32"}
_SETTINGS |= {"seed_ptr": "*i64:16", "seed_low": "i32", "seed_high": "i32"}
_SETTINGS |= {"position_ptr": "*i64:16", "step_ptr": "*i64:16", "step": "i32", "top_k_ptr": "*i64:16", "top_k": "i32"}
_SETTINGS |= {"top_p_ptr": "*fp32:16", "top_p": "fp32", "min_p_ptr": "*fp32:16", "min_p": "fp32"}
_BUFFERS = dict.fromkeys(("parts_ptr", "gathered_ptr", "statistics_ptr"), "*fp32:16") | {"ids_ptr": "*i64:16"}
_LIMITS = dict.fromkeys(("cutoff_ptr", "uncut_ptr", "drawn_parts_ptr"), "*fp32:16") | {"allowed_ptr": "*i32:16"}
_TYPES = _SETTINGS | _BUFFERS | _LIMITS | {"allowed_stride": "i32", "num_rows": "i32", "inner": "i32"}
# what may be None
SETTINGS = (*(name for name in _SETTINGS if name.endswith("_ptr")), "softcap")
LIMITS = tuple(_LIMITS)


def compilation(
    kernel: Any, what: str, dtype: str, vocab: int, none: Sequence[str], constants: dict[str, int],
    options: dict[str, Any],
) -> tuple[Any, ...]:  # fmt: skip
    """An entry of ``ahead_of_time``: a kernel of rows for a dtype and a vocabulary, without the arguments ``none``."""
    types = _TYPES | dict.fromkeys(("vocab", "stride_outer", "stride_inner"), "i32" if vocab % 16 else "i32:16")
    types["logits_ptr"] = f"*{dtype}:16"
    runtime = [name for name in kernel.arg_names if name not in constants]
    signature = {name: types[name] for name in runtime if name not in none}
    absent = {name: None for name in runtime if name in none}
    return (f"{dtype} {vocab}{what}", kernel, signature, constants | absent, options)


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
        ("bf16", 126_464, " allowed", (*SETTINGS, "cutoff_ptr", "uncut_ptr")),
        ("bf16", 126_464, " cut", (*SETTINGS, "allowed_ptr")),
        ("fp32", 50_257, " settings allowed cut", ()),
        ("fp32", 300, " settings allowed cut", ()),
    ):
        config = launch_config(vocab)
        compilations.append(compilation(_row_parts_kernel, what, dtype, vocab, none, config.parts, OPTIONS))
    return compilations
