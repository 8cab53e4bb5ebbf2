"""The smallest logit of each row that ``top_k``, ``top_p`` and ``min_p`` leave, in one launch.

The search of ``_search.py`` halves an interval between two values of a row. While more tokens lie in it than one chunk
has, a step reads the parts of the row whose largest logit reaches its middle; then the tokens that are left are
gathered, and the search goes on in registers. At vocabularies of 126,464 that is after 1 to 4 passes over normally
distributed logits where a few thousand tokens stay, and after 6 to 9 where most of them do.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from diffusion_runtime.kernels._common import (
    INF,
    exponent,
    inverse_temperature,
    largest_of_parts,
    load_logits,
    row_pointers,
    row_setting,
    row_totals,
    rows_of_block,
    softcapped,
    top_value,
)
from diffusion_runtime.kernels._search import LOWEST, above_in_block, least_of_share, middle_of, narrowed
from diffusion_runtime.kernels.row_parts import (
    ROW_OPTIONS,
    SETTINGS,
    compilation,
    launch_config,
    pointer_or_value,
    words_and_stride,
)
from torch import Tensor


@triton.jit
def _above_in_parts(
    row_ptr, allowed_ptr, part_ptr, searching, middle, top, softcap, inverse, vocab, num_parts, CHUNK: tl.constexpr
):
    """Of each row: how many logits reach ``middle``, their mass, the smallest of them, the largest of the others."""
    count = tl.full([middle.shape[0], CHUNK], 0, tl.int32)
    mass = tl.full([middle.shape[0], CHUNK], 0, tl.float32)
    smallest = mass + INF
    below = mass - INF
    below_parts = tl.full(middle.shape, -INF, tl.float32)
    for part in range(num_parts):
        largest = tl.load(part_ptr + part, mask=searching, other=-INF)
        reached = searching & (largest >= middle)
        below_parts = tl.maximum(below_parts, tl.where(reached, -INF, largest))
        if tl.max(reached.to(tl.int32), 0) > 0:
            first = (tl.full(middle.shape, 0, tl.int64) + part) * CHUNK
            x = load_logits(row_ptr, first, vocab, reached, CHUNK, allowed_ptr)
            above = x >= middle[:, None]
            count += above.to(tl.int32)
            mass += tl.where(above, tl.exp2(exponent(softcapped(x, softcap), top, inverse)), 0.0)
            smallest = tl.minimum(smallest, tl.where(above, x, INF))
            below = tl.maximum(below, tl.where(above, -INF, x))
    below = tl.maximum(below_parts, tl.max(below, 1))
    return tl.sum(count, 1), tl.sum(mass, 1).to(tl.float64), tl.min(smallest, 1), below


@triton.jit
def _gather(row_ptr, allowed_ptr, part_ptr, gathered_ptr, live, low, high, vocab, num_parts, CHUNK: tl.constexpr):
    """The logits [rows, CHUNK] from ``low`` to ``high``, in the order of their tokens; -inf behind them."""
    count = tl.full(low.shape, 0, tl.int32)
    low = tl.maximum(low, LOWEST)
    tl.debug_barrier()  # other threads have read what these overwrite
    for part in range(num_parts):
        reached = live & (tl.load(part_ptr + part, mask=live, other=-INF) >= low)
        if tl.max(reached.to(tl.int32), 0) > 0:
            first = (tl.full(low.shape, 0, tl.int64) + part) * CHUNK
            x = load_logits(row_ptr, first, vocab, reached, CHUNK, allowed_ptr)
            taken = (x >= low[:, None]) & (x <= high[:, None])
            place = count[:, None] + tl.cumsum(taken.to(tl.int32), 1) - 1
            tl.store(gathered_ptr[:, None] + place, x, mask=taken & (place < CHUNK))
            count += tl.sum(taken.to(tl.int32), 1)
    tl.debug_barrier()  # other threads read what these stored
    lane = tl.arange(0, CHUNK)[None, :]
    return tl.load(gathered_ptr[:, None] + lane, mask=lane < count[:, None], other=-INF)


@triton.jit(do_not_specialize=["num_rows", "inner", "allowed_stride", "top_k"])
def _row_cutoff_kernel(
    logits_ptr,  # [outer, inner, vocab]
    masked_ptr,  # [rows] bool, or None
    temperature_ptr,  # [rows] float32, or None
    temperature,
    softcap,  # or None
    allowed_ptr,  # [rows, words] int32, or None: every token
    allowed_stride,
    top_k_ptr,  # [rows] int64, or None
    top_k,
    top_p_ptr,  # [rows] float32, or None
    top_p,
    min_p_ptr,  # [rows] float32, or None
    min_p,
    parts_ptr,  # [4, rows, num_parts] float32: of the tokens that are allowed
    gathered_ptr,  # [rows, CHUNK] float32 to work in
    cutoff_ptr,  # [rows] float32: the result, -inf where nothing is cut
    num_rows,
    inner,
    vocab,
    stride_outer,
    stride_inner,
    BLOCK_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    rows, _, live = rows_of_block(tl.program_id(0), masked_ptr, num_rows, BLOCK_ROWS)
    num_parts = (vocab - 1) // CHUNK + 1
    part_ptr = parts_ptr + rows * num_parts
    row_ptr = row_pointers(logits_ptr, rows, inner, stride_outer, stride_inner)
    if allowed_ptr is not None:
        allowed_ptr += rows * allowed_stride
    draw_temperature = row_setting(temperature_ptr, temperature, rows, live, tl.float32)
    k = row_setting(top_k_ptr, top_k, rows, live, tl.int64)
    p = row_setting(top_p_ptr, top_p, rows, live, tl.float32)
    share = row_setting(min_p_ptr, min_p, rows, live, tl.float32)

    drawn = live & (draw_temperature > 0)
    inverse = inverse_temperature(tl.where(drawn, draw_temperature, 1.0))
    largest, _, _ = largest_of_parts(part_ptr, drawn, num_parts, BLOCK_PARTS)
    drawn = drawn & (tl.abs(largest) < INF)
    top = top_value(largest, softcap)
    size = num_rows.to(tl.int64) * num_parts
    _, _, mass = row_totals(part_ptr, size, drawn, num_parts, top, softcap, inverse, inverse, BLOCK_PARTS)
    drawn = drawn & (mass == mass)

    by_count, by_mass = drawn & (k > 0) & (k < vocab), drawn & (p < 1)
    limits = (largest, k, p)
    goal = mass * p
    low, high = tl.full(rows.shape, -INF, tl.float32), largest
    count = tl.full(rows.shape, 0, tl.int32) + vocab
    over_count, over_mass = count * 0, mass * 0.0
    reach = 4.0 / inverse
    reach = tl.where(by_count, tl.maximum(reach, 4.0), reach)
    searching = (by_count | by_mass) & (low < high)
    while tl.max(searching.to(tl.int32), 0) > 0:  # twice where top_k leaves more than a chunk to top_p
        if gathered_ptr is None:
            x = load_logits(row_ptr, tl.full(rows.shape, 0, tl.int64), vocab, searching, CHUNK, allowed_ptr)
        else:
            wide = searching & (count - over_count > CHUNK)
            while tl.max(wide.to(tl.int32), 0) > 0:
                found = _above_in_parts(
                    row_ptr, allowed_ptr, part_ptr, wide, middle_of(low, high, reach), top, softcap, inverse,
                    vocab, num_parts, CHUNK,
                )  # fmt: skip
                low, high, count, mass, over_count, over_mass, goal, by_count = narrowed(
                    low, high, count, mass, over_count, over_mass, goal, by_count, by_mass, wide, limits, found
                )
                reach = tl.where(wide, 2 * reach, reach)
                searching = (by_count | by_mass) & (low < high)
                wide = searching & (count - over_count > CHUNK)
            x = _gather(
                row_ptr, allowed_ptr, part_ptr, gathered_ptr + rows * CHUNK, searching, low,
                tl.where(count > CHUNK, high, INF), vocab, num_parts, CHUNK,
            )  # fmt: skip
        weight = tl.exp2(exponent(softcapped(x, softcap), top, inverse))
        partial, began_by_count = count > CHUNK, by_count
        rest_count, rest_mass = tl.where(partial, over_count, 0), tl.where(partial, over_mass, 0.0)
        narrow = searching
        while tl.max(narrow.to(tl.int32), 0) > 0:
            found = above_in_block(x, weight, middle_of(low, high, reach), rest_count, rest_mass)
            low, high, count, mass, over_count, over_mass, goal, by_count = narrowed(
                low, high, count, mass, over_count, over_mass, goal, by_count, by_mass, narrow, limits, found
            )
            reach = tl.where(narrow, 2 * reach, reach)
            searching = (by_count | by_mass) & (low < high)
            narrow = searching & ~(partial & (by_count != began_by_count))

    by_share = drawn & (share > 0)
    if tl.max(by_share.to(tl.int32), 0) > 0:
        low = tl.maximum(low, tl.where(by_share, least_of_share(largest, top, softcap, inverse, share), -INF))
    tl.store(cutoff_ptr + rows, low, mask=live)


def may_cut(
    vocab: int, temperature: Tensor | float, top_k: Tensor | int, top_p: Tensor | float, min_p: Tensor | float
) -> bool:
    """Whether a row may be cut, as far as the host knows without a look into tensors."""
    if not isinstance(temperature, Tensor) and temperature == 0:
        return False
    if isinstance(top_k, Tensor) or isinstance(top_p, Tensor) or isinstance(min_p, Tensor):
        return True
    return 0 < top_k < vocab or top_p < 1 or min_p > 0


def row_cutoff(
    logits: Tensor,  # [outer, inner, vocab]
    masked: Tensor | None,  # [rows]
    temperature: Tensor | float,  # [rows] or one
    softcap: float,  # 0: none
    allowed: Tensor | None,  # [rows, words]
    top_k: Tensor | int,  # [rows] or one
    top_p: Tensor | float,  # [rows] or one
    min_p: Tensor | float,  # [rows] or one
    parts: Tensor,  # [4, rows, num_parts]: of the tokens that are allowed
) -> Tensor:
    """[rows] float32: the smallest logit that a row may draw; -inf where nothing is cut."""
    outer, inner, vocab = logits.shape
    num_rows = outer * inner
    config = launch_config(vocab)
    cutoff = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    gathered = None
    if config.num_parts > 1:
        gathered = torch.empty(num_rows, config.search["CHUNK"], dtype=torch.float32, device=logits.device)
    _row_cutoff_kernel[(triton.cdiv(num_rows, config.search["BLOCK_ROWS"]),)](
        logits, masked, *pointer_or_value(temperature, 0.0), softcap or None, *words_and_stride(allowed),
        *pointer_or_value(top_k, 0), *pointer_or_value(top_p, 0.0), *pointer_or_value(min_p, 0.0), parts, gathered,
        cutoff, num_rows, inner, vocab, logits.stride(0), logits.stride(1), **config.search, **ROW_OPTIONS,
    )  # fmt: skip
    return cutoff


def ahead_of_time() -> list[tuple[Any, ...]]:
    """What ``tests/compile/compile_triton.py`` compiles: each dtype, aligned rows or not, all settings or none."""
    compilations = []
    for dtype, vocab, what, none in (
        ("bf16", 126_464, "", (*SETTINGS, "allowed_ptr")),
        ("fp32", 126_464, " settings", ()),
        ("fp16", 126_464, " allowed", SETTINGS),
        ("bf16", 50_257, " settings", ()),
        ("fp32", 300, " settings", ("gathered_ptr",)),
        ("bf16", 4_096, " allowed", (*SETTINGS, "gathered_ptr")),
    ):
        config = launch_config(vocab)
        compilations.append(compilation(_row_cutoff_kernel, what, dtype, vocab, none, config.search, ROW_OPTIONS))
    return compilations
