"""The kernel of ``soft_embedding``: logits of a tile of the vocabulary to probabilities, the logsumexp being known."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from diffusion_runtime.kernels._common import (
    LOG2E,
    inverse_temperature,
    load_logits,
    row_pointers,
    row_setting,
    rows_of_block,
    softcapped,
)
from diffusion_runtime.kernels.row_parts import pointer_or_value
from torch import Tensor


@triton.jit(do_not_specialize=["num_rows", "inner"])
def _weigh_kernel(
    logits_ptr,  # [outer, inner, num_tokens]
    masked_ptr,  # [rows] bool, or None
    temperature_ptr,  # [rows] float32, or None
    temperature,
    softcap,  # or None
    logsumexp_ptr,  # [rows] float32 or float64
    out_ptr,  # [rows, num_tokens]
    num_rows,
    inner,
    num_tokens,
    stride_outer,
    stride_inner,
    stride_out,
    BLOCK_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    num_chunks = (num_tokens - 1) // CHUNK + 1
    first = tl.program_id(0).to(tl.int64) % num_chunks * CHUNK
    rows, exist, live = rows_of_block(tl.program_id(0) // num_chunks, masked_ptr, num_rows, BLOCK_ROWS)
    row_ptr = row_pointers(logits_ptr, rows, inner, stride_outer, stride_inner)
    y = softcapped(load_logits(row_ptr, tl.full(rows.shape, 0, tl.int64) + first, num_tokens, live, CHUNK), softcap)
    inverse = inverse_temperature(row_setting(temperature_ptr, temperature, rows, live, tl.float32))[:, None]
    logsumexp = tl.load(logsumexp_ptr + rows, mask=live, other=0.0).to(tl.float32)[:, None]

    # y / temperature - logsumexp with one rounding, of the difference: the quotient's own may be 1e-3 at large logits.
    scale = inverse.to(tl.float32)
    rest = (inverse - scale.to(tl.float64)).to(tl.float32)
    log_weight = tl.fma(y, tl.broadcast_to(scale, y.shape), tl.broadcast_to(-logsumexp, y.shape))
    # Far below 0 it makes no difference, and infinite terms would cancel. NaN stays.
    near = log_weight > -200.0
    log_weight = tl.where(near, tl.fma(y, tl.broadcast_to(rest, y.shape), log_weight), log_weight)
    weight = tl.exp2(log_weight * LOG2E)  # 0 in rows that are not live: their logits read as -inf

    column = first + tl.arange(0, CHUNK)[None, :]
    at = out_ptr + rows[:, None] * stride_out + column
    tl.store(at, weight.to(out_ptr.dtype.element_ty), mask=exist[:, None] & (column < num_tokens))


_INTERPRETED = not isinstance(_weigh_kernel, triton.JITFunction)
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


def _launch_config(num_tokens: int) -> dict[str, int]:
    """16 logits a thread, as in ``sample_tokens.py``; the interpreter pays by the program."""
    most_rows, most_logits = (64, 65536) if _INTERPRETED else (8, 4096)
    chunk = min(4096, max(128, triton.next_power_of_2(num_tokens)))
    return {"CHUNK": chunk, "BLOCK_ROWS": min(most_rows, most_logits // chunk)}


def weigh(
    logits: Tensor,  # [outer, inner, num_tokens], stride 1 along the tokens
    masked: Tensor | None,  # [rows]
    temperature: Tensor | float,  # [rows] or one
    softcap: float,  # 0: none
    logsumexp: Tensor,  # [rows] float32 or float64
    out: Tensor,  # [rows, num_tokens], stride 1 along the tokens
) -> None:
    """Fill ``out`` with exp(softcap(logits) / temperature - logsumexp); 0 in rows that are not masked."""
    outer, inner, num_tokens = logits.shape
    num_rows = outer * inner
    config = _launch_config(num_tokens)
    grid = (triton.cdiv(num_rows, config["BLOCK_ROWS"]) * triton.cdiv(num_tokens, config["CHUNK"]),)
    with torch.cuda.device_of(logits):
        _weigh_kernel[grid](
            logits, masked, *pointer_or_value(temperature, 0.0), softcap or None, logsumexp, out,
            num_rows, inner, num_tokens, logits.stride(0), logits.stride(1), out.stride(0),
            **config, **_OPTIONS,
        )  # fmt: skip


def ahead_of_time() -> list[tuple[Any, ...]]:
    """Logits and probabilities of each dtype, aligned rows or not, all pointers or none."""
    pointers = {"masked_ptr": "*i1:16", "temperature_ptr": "*fp32:16", "logsumexp_ptr": "*fp32:16"}
    values = {"temperature": "fp32", "softcap": "fp32", "num_rows": "i32", "inner": "i32"}
    compilations = []
    for dtype, out, num_tokens, none in (
        ("bf16", "bf16", 126_464, ("masked_ptr", "temperature_ptr", "softcap")),
        ("bf16", "bf16", 262_144, ()),
        ("fp16", "fp16", 50_257, ("temperature_ptr",)),
        ("fp32", "fp32", 126_464, ()),
        ("fp32", "bf16", 300, ("masked_ptr",)),
    ):
        shape = ("num_tokens", "stride_outer", "stride_inner", "stride_out")
        types = pointers | values | dict.fromkeys(shape, "i32" if num_tokens % 16 else "i32:16")
        signature = {"logits_ptr": f"*{dtype}:16", "out_ptr": f"*{out}:16"}
        signature |= {name: kind for name, kind in types.items() if name not in none}
        constants = _launch_config(num_tokens) | dict.fromkeys(none)
        name = f"{dtype} to {out} {num_tokens}{'' if none else ' settings'}"
        compilations.append((name, _weigh_kernel, signature, constants, _OPTIONS))
    return compilations
