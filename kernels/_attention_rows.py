"""What the kernels of attention share: where a sequence lies, which keys its queries see, how keys are read.

The rule is that of ``csrc/include/visible_keys.h`` and ``attention_arguments.h``. A *row* of a tile is query
``r // group`` of head ``kv_head * group + r % group``: the heads that share keys share their tiles. A sequence's keys
come in blocks, those of the prefix first; each of the two segments begins a block of its own, so that a block holds the
same keys however a request is padded, paged or packed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from diffusion_runtime.kernels._common import INF, LOG2E, softcapped

_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def smaller(x, y):
    """The minimum, in a form through which Triton 3.9 still knows how pointers are aligned."""
    return tl.where(x < y, x, y)


@triton.jit
def larger(x, y):
    """The maximum, as :func:`smaller`."""
    return tl.where(x > y, x, y)


@triton.jit
def _clamped(value, most):
    return smaller(larger(value, 0), most)


@triton.jit
def sequence_of(
    sequence, cu_seqlens_ptr, cu_seqlens_k_ptr, key_starts_ptr, key_ends_ptr, prefix_lengths_ptr, length, num_keys,
    capacity,
):  # fmt: skip
    """Batch row, first query row, queries, first key row, keys, and keys of the prefix. Lengths are clamped."""
    if cu_seqlens_ptr is not None:
        batch = 0
        first_query = _clamped(tl.load(cu_seqlens_ptr + sequence), length)
        num_queries = _clamped(tl.load(cu_seqlens_ptr + sequence + 1), length) - first_query
        first_key = _clamped(tl.load(cu_seqlens_k_ptr + sequence), num_keys)
        end = _clamped(tl.load(cu_seqlens_k_ptr + sequence + 1), num_keys)
    else:
        batch = sequence
        first_query = 0
        num_queries = length
        first_key = 0
        end = num_keys
        if key_starts_ptr is not None:
            first_key = _clamped(tl.load(key_starts_ptr + sequence), num_keys)
        if key_ends_ptr is not None:
            end = _clamped(tl.load(key_ends_ptr + sequence), num_keys)
    prefix = capacity
    if prefix_lengths_ptr is not None:
        prefix = _clamped(tl.load(prefix_lengths_ptr + sequence), capacity)
    return batch, first_query, num_queries, first_key, larger(end - first_key, 0), prefix


@triton.jit
def visible_range(
    query, sequence, chosen_ptr, left, right, block, prefix_window, offset, first_key, prefix, total,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Positions [low, high) that each query sees, nothing where low >= high; neither falls from a query to the next."""
    by_position = True
    by_prefix = True
    if chosen_ptr is not None:
        by_position = tl.load(chosen_ptr + sequence).to(tl.int1)
        by_prefix = by_position == 0
    position = prefix + query + offset
    if not PACKED:  # padded queries come first, as padded keys do
        position -= first_key
    low = position * 0
    high = low + total
    if left >= 0:
        low = tl.where(by_position, larger(position - left, 0), low)
    if right >= 0:
        own = tl.where(position >= 0, position // block, -((block - 1 - position) // block)).to(tl.int64)
        end = smaller(larger((own + 1) * block + right, 0), total.to(tl.int64)).to(tl.int32)
        high = tl.where(by_position, end, high)
    if prefix_window >= 0:
        low = tl.where(by_prefix, larger(prefix - prefix_window, low), low)
    return low, high


@triton.jit
def block_at(block, prefix_blocks, prefix, total, BLOCK_KEYS: tl.constexpr):
    """Position of a block's first key, one past the last position of its segment, and whether that is the prefix."""
    in_prefix = block < prefix_blocks
    first = tl.where(in_prefix, block * BLOCK_KEYS, prefix + (block - prefix_blocks) * BLOCK_KEYS)
    return first, tl.where(in_prefix, prefix, total), in_prefix


@triton.jit
def block_of(position, prefix_blocks, prefix, BLOCK_KEYS: tl.constexpr):
    """The block that holds a position."""
    behind = prefix_blocks + (position - prefix) // BLOCK_KEYS
    return tl.where(position < prefix, position // BLOCK_KEYS, behind)


@triton.jit
def rows_of_keys(
    key_ptr, prefix_ptr, position, inside, in_prefix, sequence, batch, kv_head, first_key, prefix, page_table_ptr,
    page_size, max_pages, key_batch, key_head, key_row, prefix_batch, prefix_head, prefix_row,
):  # fmt: skip
    """Pointers at the rows of a block, of the keys at ``position`` [rows].

    Scalars are chosen, not rows: behind a choice of rows Triton 3.9 no longer knows how they are aligned.
    """
    start = key_ptr + batch * key_batch + kv_head * key_head
    before = prefix_ptr + kv_head * prefix_head
    stride = tl.where(in_prefix, prefix_row, key_row).to(tl.int64)
    place = position - prefix + first_key
    if page_table_ptr is None:
        before += sequence.to(tl.int64) * prefix_batch
        place = tl.where(in_prefix, position, place)
        pointers = tl.where(in_prefix, before, start) + place.to(tl.int64) * stride
    else:
        entry = page_table_ptr + sequence.to(tl.int64) * max_pages + position // page_size
        page = tl.load(entry, mask=inside & (position < prefix), other=0).to(tl.int64)
        place = tl.where(in_prefix, position % page_size, place)
        pointers = tl.where(in_prefix, before, start) + page * prefix_batch + place.to(tl.int64) * stride
    return pointers


@triton.jit
def load_rows(pointers, inside, dims, size, WHOLE: tl.constexpr):
    """[rows, dims] of what ``pointers`` [rows] point at; 0 where a row is not inside, or behind ``size``."""
    if WHOLE:
        x = tl.load(pointers[:, None] + dims[None, :], mask=inside[:, None], other=0.0)
    else:
        x = tl.load(pointers[:, None] + dims[None, :], mask=inside[:, None] & (dims < size)[None, :], other=0.0)
    return x


@triton.jit
def finished(score, scale, softcap, mask_ptr, mask_inside, DENSE: tl.constexpr):
    """Scale, softcap and mask tensor of products, in the order of their definition, and the slope of the softcap.

    ``DENSE``: 0 no mask, 1 bool, 2 float. ``mask_ptr``: of each product.
    """
    score = softcapped(score * scale, softcap)
    slope = 1.0
    if softcap is not None:
        slope = 1.0 - (score / softcap) * (score / softcap)
    if DENSE == 1:
        seen = tl.load(mask_ptr, mask=mask_inside, other=0).to(tl.int1)
        score = tl.where(seen, score, -INF)
    elif DENSE == 2:
        bias = tl.load(mask_ptr, mask=mask_inside, other=-INF).to(tl.float32)
        score = tl.where(bias < _LOWEST, -INF, score + bias)
    return score, slope


@triton.jit
def queries_that_see(
    first, end, sequence, chosen_ptr, left, right, block, prefix_window, offset, first_key, prefix, num_queries,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Queries [low, high) outside of which none sees a key at the positions [first, end)."""
    by_position = True
    by_prefix = True
    if chosen_ptr is not None:
        by_position = tl.load(chosen_ptr + sequence).to(tl.int1)
        by_prefix = by_position == 0
    before = prefix + offset
    if not PACKED:
        before -= first_key
    low = first * 0
    high = low + num_queries
    if right >= 0:
        from_ = first - right
        own = tl.where(from_ >= 0, from_ // block, -((block - 1 - from_) // block))
        low = tl.where(by_position, larger(own * block - before, 0), low)
    if left >= 0:
        high = tl.where(by_position, smaller(end.to(tl.int64) + left - before, high.to(tl.int64)).to(tl.int32), high)
    if prefix_window >= 0:
        high = tl.where(by_prefix & (prefix - prefix_window >= end), 0, high)
    return low, high


@triton.jit
def weights_of(score, top, scale):
    """2^((score - top) * scale * log2(e)): exactly 0 for -inf, also where ``top`` is."""
    return tl.exp2((score - tl.where(top == -INF, 0.0, top)) * (scale * LOG2E))


@triton.jit
def weights_and_slope(
    score, sums, scale, softcap, mask_at, seen, row_query, position, sequence, chosen_ptr, left, right, block,
    prefix_window, offset, first_key, prefix, total, PACKED: tl.constexpr, BOUNDED: tl.constexpr,
    FINISHES: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Weights of products, which may lie either way round, and the slope of what was done to them, scale included."""
    slope = scale
    if FINISHES:
        score, bent = finished(score, scale, softcap, mask_at, seen, DENSE)
        slope = bent * scale
    else:
        score = score * scale
    if BOUNDED:
        low, high = visible_range(row_query, sequence, chosen_ptr, left, right, block, prefix_window, offset,
                                  first_key, prefix, total, PACKED)  # fmt: skip
        seen = seen & (position >= low) & (position < high)
    score = tl.where(seen, score, -INF)
    return tl.exp2((score - tl.where(sums == -INF, 0.0, sums)) * LOG2E), slope
