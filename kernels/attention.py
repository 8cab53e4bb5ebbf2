"""``attention``: a tile of queries of the heads that share keys, one block of keys after the other (Dao et al., 2022).

Blocks are counted from the start of the prefix and of the keys, and every ``CHUNK`` of them is summed from nothing and
then folded into what came before, in order. So it makes no difference to a single bit whether one program walks over
all chunks of a tile or, where tiles are few, several programs take them in turns and the last to finish folds them.
Where results do not fit the registers twice, ``WIDTH`` is smaller than they are, and what came before waits in memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from diffusion_runtime.kernels._attention_ahead import ahead
from diffusion_runtime.kernels._attention_launch import (
    capability_of,
    launch_config,
    problem_arguments,
    splits_of,
    tensor_strides,
)
from diffusion_runtime.kernels._attention_parts import columns, fold, store_logsumexp, store_out
from diffusion_runtime.kernels._attention_rows import (
    block_at,
    block_of,
    finished,
    larger,
    load_rows,
    rows_of_keys,
    sequence_of,
    smaller,
    visible_range,
    weights_of,
)
from diffusion_runtime.kernels._common import INF
from torch import Tensor


@triton.jit(do_not_specialize=[
    "length", "num_keys", "capacity", "left", "right", "block", "prefix_window", "offset", "tiles", "splits",
    "max_chunks", "max_pages", "first_tile",
])  # fmt: skip
def _attention_kernel(
    query_ptr,  # [batch, heads, length, head_dim]
    key_ptr,  # [batch, kv_heads, num_keys, head_dim]
    value_ptr,  # [batch, kv_heads, num_keys, value_dim]
    prefix_key_ptr,  # [sequences, kv_heads, capacity, head_dim], or pages
    prefix_value_ptr,
    prefix_lengths_ptr,  # [sequences] int32, or None
    page_table_ptr,  # [sequences, max_pages] int32, or None
    mask_ptr,  # [batch, heads, length, num_keys], or None
    key_starts_ptr, key_ends_ptr, cu_seqlens_ptr, cu_seqlens_k_ptr,  # int32, or None
    chosen_ptr,  # [sequences] bool, or None
    out_ptr,  # [batch, heads, length, value_dim]
    logsumexp_ptr,  # [batch, heads, length]
    part_ptr,  # [tile, chunk, BLOCK_ROWS, BLOCK_VALUE] float32; [tile, 2, ...] where one program walks; or None
    part_sums_ptr,  # [tile, chunk, 2, BLOCK_ROWS] float32: top and mass of each part; or None: one program walks
    ticket_ptr,  # [tile] int32, 0 at first; or None
    length, num_keys, capacity, heads, kv_heads, head_dim, value_dim, left, right, block, prefix_window, offset,
    page_size, max_pages, first_tile, tiles, splits, max_chunks, scale, softcap,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    prefix_key_batch, prefix_key_head, prefix_key_row, prefix_value_batch, prefix_value_head, prefix_value_row,
    mask_batch, mask_head, mask_row, mask_column, out_batch, out_head, out_row,
    BOUNDED: tl.constexpr, FINISHES: tl.constexpr, DENSE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    WHOLE_DIM: tl.constexpr, WHOLE_VALUE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0) % splits
    place = (tl.program_id(0) // splits).to(tl.int64)  # among the tiles of this launch
    tile, pair = (first_tile + place).to(tl.int32) % tiles, (first_tile + place).to(tl.int32) // tiles
    sequence, kv_head = pair // kv_heads, (pair % kv_heads).to(tl.int64)
    tile = tiles - 1 - tile  # the last queries see most under a causal mask, so they come first
    batch, first_query, num_queries, first_key, keys, prefix = sequence_of(
        sequence, cu_seqlens_ptr, cu_seqlens_k_ptr, key_starts_ptr, key_ends_ptr, prefix_lengths_ptr, length,
        num_keys, capacity,
    )  # fmt: skip
    group = heads // kv_heads
    if tile * BLOCK_ROWS >= num_queries * group:
        return
    total = prefix + keys
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    query, head = row // group, kv_head * group + row % group
    exist = query < num_queries
    # what some row sees, and what all see
    first_seen, last_seen, all_low, all_high = 0, total, 0, total
    if BOUNDED:  # not by reductions, behind which Triton 3.9 no longer knows how pointers are aligned
        first_seen, all_high = visible_range(
            tile * BLOCK_ROWS // group, sequence, chosen_ptr, left, right, block, prefix_window, offset, first_key,
            prefix, total, PACKED=cu_seqlens_ptr is not None,
        )  # fmt: skip
        all_low, last_seen = visible_range(
            smaller((tile * BLOCK_ROWS + BLOCK_ROWS - 1) // group, num_queries - 1), sequence, chosen_ptr, left,
            right, block, prefix_window, offset, first_key, prefix, total, PACKED=cu_seqlens_ptr is not None,
        )  # fmt: skip

    dims, value_dims = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE)
    query_row_at = (first_query + query).to(tl.int64)
    batch_at = tl.zeros_like(sequence).to(tl.int64) + batch
    query_at = query_ptr + batch_at * query_batch + head * query_head + query_row_at * query_row
    queries = load_rows(query_at, exist, dims, head_dim, WHOLE_DIM)
    mask_at = batch_at * mask_batch + head * mask_head + query_row_at * mask_row
    step = 1.0 if FINISHES else scale  # of what the softmax sees

    prefix_blocks = (prefix + BLOCK_KEYS - 1) // BLOCK_KEYS
    begin = block_of(first_seen, prefix_blocks, prefix, BLOCK_KEYS)
    end = begin
    if last_seen > first_seen:
        end = block_of(last_seen - 1, prefix_blocks, prefix, BLOCK_KEYS) + 1
    first_chunk, last_chunk = begin // CHUNK, (end + CHUNK - 1) // CHUNK

    SIZE: tl.constexpr = BLOCK_ROWS * BLOCK_VALUE
    all_top = tl.full([BLOCK_ROWS], -INF, tl.float32)
    all_mass = tl.zeros([BLOCK_ROWS], tl.float32)
    if part_ptr is None:
        result = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)
    for chunk in range(first_chunk + split, last_chunk, splits):
        top = tl.full([BLOCK_ROWS], -INF, tl.float32)
        mass = tl.zeros([BLOCK_ROWS], tl.float32)
        acc = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)
        for number in range(larger(chunk * CHUNK, begin), smaller(chunk * CHUNK + CHUNK, end)):
            first, limit, in_prefix = block_at(number, prefix_blocks, prefix, total, BLOCK_KEYS)
            position = first + tl.arange(0, BLOCK_KEYS)
            # nothing else is read, so that whatever lies there does not meet a weight of 0
            inside = (position >= first_seen) & (position < smaller(limit, last_seen))
            key_at = rows_of_keys(
                key_ptr, prefix_key_ptr, position, inside, in_prefix, sequence, batch_at, kv_head, first_key, prefix,
                page_table_ptr, page_size, max_pages, key_batch, key_head, key_row, prefix_key_batch, prefix_key_head,
                prefix_key_row,
            )  # fmt: skip
            score = tl.dot(
                queries, tl.trans(load_rows(key_at, inside, dims, head_dim, WHOLE_DIM)), input_precision="ieee"
            )
            if FINISHES:
                column = (position - prefix + first_key).to(tl.int64)
                at = mask_ptr
                if DENSE:
                    at = mask_ptr + mask_at[:, None] + (column * mask_column)[None, :]
                score, _ = finished(score, scale, softcap, at, exist[:, None] & inside[None, :], DENSE)
            if (first < all_low) | (first + BLOCK_KEYS > smaller(all_high, limit)):
                seen = inside[None, :]
                if BOUNDED:
                    low, high = visible_range(
                        row // group, sequence, chosen_ptr, left, right, block, prefix_window, offset, first_key,
                        prefix, total, PACKED=cu_seqlens_ptr is not None,
                    )  # fmt: skip
                    seen = seen & (position[None, :] >= low[:, None]) & (position[None, :] < high[:, None])
                score = tl.where(seen, score, -INF)
            higher = tl.maximum(top, tl.max(score, 1))
            weights = weights_of(score, higher[:, None], step)
            factor = weights_of(top, higher, step)
            mass = mass * factor + tl.sum(weights, 1)
            value_at = rows_of_keys(
                value_ptr, prefix_value_ptr, position, inside, in_prefix, sequence, batch_at, kv_head, first_key,
                prefix, page_table_ptr, page_size, max_pages, value_batch, value_head, value_row, prefix_value_batch,
                prefix_value_head, prefix_value_row,
            )  # fmt: skip
            values = load_rows(value_at, inside, value_dims, value_dim, WHOLE_VALUE)
            acc = tl.dot(weights.to(values.dtype), values, acc * factor[:, None], input_precision="ieee")
            top = higher
        if part_ptr is None:
            all_top, all_mass, old, new = fold(all_top, all_mass, top, mass, step)
            result = result * old + acc * new
        elif part_sums_ptr is None:
            own = part_ptr + place * 2 * SIZE
            mine = tl.where(chunk > first_chunk, own + SIZE, own)
            tl.store(columns(mine, 0, BLOCK_VALUE, BLOCK_ROWS, BLOCK_VALUE), acc)
            tl.debug_barrier()  # other threads load it
            all_top, all_mass, old, new = fold(all_top, all_mass, top, mass, step)
            if chunk > first_chunk:
                for d in tl.static_range(0, BLOCK_VALUE, WIDTH):
                    some = columns(own, d, WIDTH, BLOCK_ROWS, BLOCK_VALUE)
                    tl.store(some, tl.load(some) * old + tl.load(some + SIZE) * new)
            tl.debug_barrier()
        else:
            part = place * max_chunks + chunk
            tl.store(columns(part_ptr + part * SIZE, 0, BLOCK_VALUE, BLOCK_ROWS, BLOCK_VALUE), acc)
            sums = part_sums_ptr + part * 2 * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            tl.store(sums, top)
            tl.store(sums + BLOCK_ROWS, mass)

    out_at = out_ptr + batch_at * out_batch + head * out_head + query_row_at * out_row
    sums_at = logsumexp_ptr + (batch_at * heads + head) * length + query_row_at
    if part_ptr is None:
        store_out(out_at, exist, 0, result, all_mass, value_dim)
        store_logsumexp(sums_at, exist, all_top, all_mass, step)
    elif part_sums_ptr is None:
        for d in tl.static_range(0, BLOCK_VALUE, WIDTH):
            result = tl.load(columns(part_ptr + place * 2 * SIZE, d, WIDTH, BLOCK_ROWS, BLOCK_VALUE))
            store_out(out_at, exist, d, result, all_mass, value_dim)
        store_logsumexp(sums_at, exist, all_top, all_mass, step)
    else:
        tl.debug_barrier()  # every thread has written before one of them takes the ticket
        if tl.atomic_add(ticket_ptr + place, 1) == splits - 1:
            for d in tl.static_range(0, BLOCK_VALUE, WIDTH):
                all_top = tl.full([BLOCK_ROWS], -INF, tl.float32)
                all_mass = tl.zeros([BLOCK_ROWS], tl.float32)
                result = tl.zeros([BLOCK_ROWS, WIDTH], tl.float32)
                for chunk in range(first_chunk, last_chunk):
                    part = place * max_chunks + chunk
                    sums = part_sums_ptr + part * 2 * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
                    top, mass = tl.load(sums), tl.load(sums + BLOCK_ROWS)
                    all_top, all_mass, old, new = fold(all_top, all_mass, top, mass, step)
                    acc = tl.load(columns(part_ptr + part * SIZE, d, WIDTH, BLOCK_ROWS, BLOCK_VALUE))
                    result = result * old + acc * new
                store_out(out_at, exist, d, result, all_mass, value_dim)
                if d == 0:
                    store_logsumexp(sums_at, exist, all_top, all_mass, step)


MOST_TILES = 512  # of one launch, where what came before waits in memory: 128 MiB at heads of 512


def attention(problem: Any, out: Tensor, logsumexp: Tensor, splits: int | None = None) -> None:
    """Fill ``out`` and ``logsumexp`` of an ``AttentionProblem`` whose last dimensions have stride 1.

    ``splits``: how many programs share a tile; it changes no bit.
    """
    query = problem.query
    arguments = problem_arguments(problem)
    config = launch_config(
        *(x.shape[3] for x in (query, problem.value)), query.dtype, arguments["FINISHES"], capability_of(query.device)
    )
    rows = problem.max_length * (query.shape[1] // problem.key.shape[1])
    tiles = triton.cdiv(rows, config["BLOCK_ROWS"])
    pairs = problem.sequences * problem.key.shape[1]
    if not tiles * pairs or not out.numel():
        return
    blocks = triton.cdiv(problem.prefix_capacity, config["BLOCK_KEYS"])
    blocks += triton.cdiv(problem.key.shape[2], config["BLOCK_KEYS"])
    chunks = max(1, triton.cdiv(blocks, config["CHUNK"]))
    splits = min(chunks, splits or splits_of(tiles * pairs, chunks, query.device))
    all_tiles = most_tiles = pairs * tiles
    part = part_sums = ticket = None
    if splits > 1:
        part_sums = out.new_empty((all_tiles, chunks, 2, config["BLOCK_ROWS"]), dtype=torch.float32)
        ticket = torch.zeros(all_tiles, dtype=torch.int32, device=out.device)
    in_memory = config["WIDTH"] < config["BLOCK_VALUE"]
    if splits == 1 and in_memory:
        most_tiles = min(all_tiles, MOST_TILES)
    if splits > 1 or in_memory:
        size = config["BLOCK_ROWS"], config["BLOCK_VALUE"]
        part = out.new_empty((most_tiles, chunks if splits > 1 else 2, *size), dtype=torch.float32)
    with torch.cuda.device_of(query):
        for first in range(0, all_tiles, most_tiles):
            _attention_kernel[min(most_tiles, all_tiles - first) * splits,](
                **arguments, out_ptr=out, logsumexp_ptr=logsumexp, part_ptr=part, part_sums_ptr=part_sums,
                ticket_ptr=ticket, first_tile=first, tiles=tiles, splits=splits, max_chunks=chunks,
                **tensor_strides("out", out), **config,
            )  # fmt: skip


def ahead_of_time() -> list[tuple[Any, ...]]:
    """Heads of each size and dtype, walked by one program, in registers or in memory, and shared by several."""
    parts = ("part_ptr", "part_sums_ptr", "ticket_ptr")
    return [
        compilation
        for none, names in (
            (parts, ("bf16 64", "bf16 128", "bf16 128 rule", "fp16 128 prefix pages", "bf16 96 softcap float")),
            (parts, ("bf16 256 prefix", "fp32 64 prefix bool")),
            (
                parts[1:],
                (
                    "bf16 512 prefix",
                    "bf16 512 rule softcap",
                    "bf16 256 rule float",
                    "fp32 256",
                    "fp32 256 float",
                    "fp32 512",
                ),
            ),
            ((), ("bf16 128 prefix", "bf16 256 prefix", "bf16 512 prefix pages", "fp32 128 prefix")),
        )
        for name in names
        for compilation in ahead(_attention_kernel, launch_config, name, none)
    ]
