"""``commit_step``: which positions of a canvas keep their candidate, and the tokens after it, in one launch.

One program for each row. Nothing is sorted: a position's number in the order of the scores is how many come before it,
counted over blocks of positions, as is the sum of their scores.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from diffusion_runtime.kernels.philox import philox_uniforms
from diffusion_runtime.kernels.row_parts import signed_word
from torch import Tensor

DRAW_NOISE = tl.constexpr(2)
QUOTA = tl.constexpr(0)
THRESHOLD = tl.constexpr(1)
FACTOR = tl.constexpr(2)
ENTROPY_BOUND = tl.constexpr(3)


@triton.jit
def _standing(masked_ptr, score_ptr, length, rule, place, score, BLOCK: tl.constexpr):
    """How many masked positions come before each of ``place`` [BLOCK], and the float64 sum of their entropies."""
    before = tl.full([BLOCK], 0, tl.int32)
    total = tl.full([BLOCK], 0, tl.float64)
    for first in range(0, length, BLOCK):
        other = first + tl.arange(0, BLOCK)
        counts = tl.load(masked_ptr + other, mask=other < length, other=0).to(tl.int1)
        theirs = tl.load(score_ptr + other, mask=counts, other=0.0)
        # entropies: the lowest first
        a, b = theirs[None, :], score[:, None]
        better = tl.where(rule == ENTROPY_BOUND, a < b, a > b) | ((a == a) & (b != b))
        ties = (a == b) | ((a != a) & (b != b))
        comes = counts[None, :] & (better | (ties & (other[None, :] < place[:, None])))
        before += tl.sum(comes.to(tl.int32), 1)
        # only entropies are summed: other scores may be infinite either way
        total += tl.sum(tl.where(comes & (rule == ENTROPY_BOUND), a.to(tl.float64), 0.0), 1)
    return before, total


@triton.jit(do_not_specialize=["length", "rule", "vocab", "seed_low", "seed_high", "step"])
def _commit_step_kernel(
    masked_ptr,  # [batch, length] bool
    score_ptr,  # [batch, length] float32, or None: nothing is committed
    rule,
    bound_ptr,  # [batch] int64 or float32, or None
    bound,
    tokens_ptr,  # [batch, length] int64, or None
    candidates_ptr,  # [batch, length] int64, or None: tokens stay
    vocab,  # 0: positions that are not committed keep their token
    seed_ptr,  # [batch, length] int64, or None
    seed_low,
    seed_high,
    position_ptr,  # [batch, length] int64, or None: the place along the length
    step_ptr,  # [batch, length] int64, or None
    step,
    commit_mask_ptr,  # [batch, length] bool, contiguous; written if there are scores
    after_ptr,  # [batch, length] int64, contiguous; written if there are tokens
    length,
    stride_masked,
    stride_score,
    stride_bound,
    stride_tokens,
    stride_candidates,
    stride_seed,
    stride_seed_length,
    stride_position,
    stride_position_length,
    stride_step,
    stride_step_length,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    masked_ptr += row * stride_masked
    last = 0
    if score_ptr is not None:
        scores = score_ptr + row * stride_score
        # in float32 first, as scores are: the interpreter hands on a number as it is
        bound_of_row = tl.full([BLOCK], bound, tl.float32).to(tl.float64)
        if bound_ptr is not None:
            bound_of_row = tl.full([BLOCK], 0, tl.float64) + tl.load(bound_ptr + row * stride_bound).to(tl.float64)
        if rule != QUOTA:
            last = 1
        for first in range(0, length, BLOCK):
            place = first + tl.arange(0, BLOCK)
            here = tl.load(masked_ptr + place, mask=place < length, other=0).to(tl.int1)
            score = tl.load(scores + place, mask=here, other=0.0)
            before, total = _standing(masked_ptr, scores, length, rule, place, score, BLOCK)
            number = before + 1
            wide = score.to(tl.float64)
            holds = total <= bound_of_row
            holds = tl.where(rule == QUOTA, number.to(tl.float64) <= bound_of_row, holds)
            holds = tl.where(rule == THRESHOLD, wide >= bound_of_row, holds)
            holds = tl.where(rule == FACTOR, (number + 1).to(tl.float64) * (1.0 - wide) < bound_of_row, holds)
            last = tl.maximum(last, tl.max(tl.where(here & holds, number, 0), 0))

    for first in range(0, length, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < length
        here = tl.load(masked_ptr + place, mask=inside, other=0).to(tl.int1)
        committed = tl.full([BLOCK], 0, tl.int1)
        at = row * length + place
        if score_ptr is not None:
            row_scores = score_ptr + row * stride_score
            score = tl.load(row_scores + place, mask=here, other=0.0)
            before, _ = _standing(masked_ptr, row_scores, length, rule, place, score, BLOCK)
            committed = here & (before < last)
            tl.store(commit_mask_ptr + at, committed, mask=inside)
        if tokens_ptr is not None:
            token = tl.load(tokens_ptr + row * stride_tokens + place, mask=inside, other=0)
            if vocab > 0:
                noise = _noise(
                    seed_ptr, seed_low, seed_high, position_ptr, step_ptr, step, row, place, inside, vocab,
                    stride_seed, stride_seed_length, stride_position, stride_position_length, stride_step,
                    stride_step_length,
                )  # fmt: skip
                token = tl.where(here & ~committed, noise, token)
            if candidates_ptr is not None:
                candidate = tl.load(candidates_ptr + row * stride_candidates + place, mask=committed, other=0)
                token = tl.where(committed, candidate, token)
            tl.store(after_ptr + at, token, mask=inside)


@triton.jit
def _noise(
    seed_ptr, seed_low, seed_high, position_ptr, step_ptr, step, row, place, inside, vocab,
    stride_seed, stride_seed_length, stride_position, stride_position_length, stride_step, stride_step_length,
):  # fmt: skip
    """Uniform tokens below ``vocab`` for the positions ``place`` of ``row``."""
    seed = tl.full(place.shape, (seed_high.to(tl.int64) << 32) | (seed_low.to(tl.int64) & 0xFFFFFFFF), tl.int64)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr + row * stride_seed + place * stride_seed_length, mask=inside, other=0)
    position = place.to(tl.int64)
    if position_ptr is not None:
        position = tl.load(position_ptr + row * stride_position + place * stride_position_length, mask=inside, other=0)
    steps = tl.full(place.shape, step, tl.int64)
    if step_ptr is not None:
        steps = tl.load(step_ptr + row * stride_step + place * stride_step_length, mask=inside, other=0)
    uniform, _ = philox_uniforms(seed, position, steps, DRAW_NOISE)
    return (uniform * vocab.to(tl.float64)).to(tl.int64)


_INTERPRETED = not isinstance(_commit_step_kernel, triton.JITFunction)


def _launch_config(length: int) -> dict[str, int]:
    """Blocks of 64 by 64 positions are 32 comparisons a thread; the interpreter pays by the block, not by its size."""
    most = 512 if _INTERPRETED else 64
    return {"BLOCK": min(most, triton.next_power_of_2(length))}


# without a limit of its own the assembler spills a few of its registers to fit more programs on a core
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False, "maxnreg": 255}


def commit_step(
    masked: Tensor,  # [batch, length]
    score: Tensor | None,  # [batch, length]
    rule: int,
    bound: Tensor | float,  # [batch] or one
    tokens: Tensor | None,  # [batch, length]
    candidates: Tensor | None,  # [batch, length]
    vocab: int,
    seed: Tensor | int,  # [batch, length] or one
    position: Tensor | None,  # [batch, length]
    step: Tensor | int,  # [batch, length] or one
    commit_mask: Tensor,  # [batch, length], or without elements
    after: Tensor,  # [batch, length], or without elements
) -> None:
    """Fill ``commit_mask`` and ``after``, as ``ops/_commit_reference.py`` says."""
    batch, length = masked.shape
    bound_ptr, bound_value = (bound, 0.0) if isinstance(bound, Tensor) else (None, bound)
    seed_ptr, seed_value = (seed, 0) if isinstance(seed, Tensor) else (None, seed)
    step_ptr, step_value = (step, 0) if isinstance(step, Tensor) else (None, step)
    with torch.cuda.device_of(masked):
        _commit_step_kernel[(batch,)](
            masked, score, rule, bound_ptr, float(bound_value), tokens, candidates, vocab,
            seed_ptr, signed_word(int(seed_value)), signed_word(int(seed_value) >> 32), position,
            step_ptr, signed_word(int(step_value)), commit_mask, after, length,
            masked.stride(0), _stride(score, 0), _stride(bound_ptr, 0), _stride(tokens, 0), _stride(candidates, 0),
            _stride(seed_ptr, 0), _stride(seed_ptr, 1), _stride(position, 0), _stride(position, 1),
            _stride(step_ptr, 0), _stride(step_ptr, 1), **_launch_config(length), **_OPTIONS,
        )  # fmt: skip


def _stride(tensor: Tensor | None, dim: int) -> int:
    return 0 if tensor is None else tensor.stride(dim)


def ahead_of_time() -> list[tuple[Any, ...]]:
    """What ``tests/compile/compile_triton.py`` compiles: the mask alone, a threshold step, a step with noise."""
    pointers = {"masked_ptr": "*i1:16", "score_ptr": "*fp32:16", "bound_ptr": "*fp32:16"}
    pointers |= dict.fromkeys(("tokens_ptr", "candidates_ptr", "seed_ptr", "position_ptr", "step_ptr"), "*i64:16")
    values = {"rule": "i32", "bound": "fp32", "vocab": "i32", "seed_low": "i32", "seed_high": "i32", "step": "i32"}
    outputs = {"commit_mask_ptr": "*i1:16", "after_ptr": "*i64:16", "length": "i32"}
    strides = {name: "i32" for name in _commit_step_kernel.arg_names if name.startswith("stride_")}
    compilations = []
    for name, none in (
        ("mask", [*pointers][2:]),
        ("step", ["bound_ptr", "seed_ptr", "position_ptr", "step_ptr"]),
        ("step, tensors", []),
        ("noise", ["score_ptr", "bound_ptr", "candidates_ptr"]),
    ):
        types = pointers | values | outputs | strides
        signature = {argument: kind for argument, kind in types.items() if argument not in none}
        constants = _launch_config(256) | dict.fromkeys(none)
        compilations.append((name, _commit_step_kernel, signature, constants, _OPTIONS))
    return compilations
