"""The gradients of ``attention``'s keys and values (Dao et al., 2022, appendix B.2), a block of them at a time.

Each program writes what no other does, so that the same call gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from diffusion_runtime.kernels._attention_ahead import ahead
from diffusion_runtime.kernels._attention_launch import (
    COUNTS,
    key_gradient_config,
    problem_arguments,
    tensor_strides,
)
from diffusion_runtime.kernels._attention_rows import (
    load_rows,
    queries_that_see,
    rows_of_keys,
    sequence_of,
    smaller,
    weights_and_slope,
)
from torch import Tensor


@triton.jit(do_not_specialize=[*COUNTS, "prefix_tiles"])
def _key_gradient_kernel(
    query_ptr, key_ptr, value_ptr, prefix_key_ptr, prefix_value_ptr, prefix_lengths_ptr, page_table_ptr, mask_ptr,
    key_starts_ptr, key_ends_ptr, cu_seqlens_ptr, cu_seqlens_k_ptr, chosen_ptr,
    grad_out_ptr, logsumexp_ptr, delta_ptr,
    grad_key_ptr,  # [batch, kv_heads, num_keys, head_dim], zeros at first
    grad_value_ptr,
    grad_prefix_key_ptr,  # [sequences, kv_heads, capacity, head_dim], zeros at first
    grad_prefix_value_ptr,
    length, num_keys, capacity, heads, kv_heads, head_dim, value_dim, left, right, block, prefix_window, offset,
    page_size, max_pages, tiles, prefix_tiles, scale, softcap,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    prefix_key_batch, prefix_key_head, prefix_key_row, prefix_value_batch, prefix_value_head, prefix_value_row,
    mask_batch, mask_head, mask_row, mask_column, grad_out_batch, grad_out_head, grad_out_row,
    BOUNDED: tl.constexpr, FINISHES: tl.constexpr, DENSE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, WHOLE_DIM: tl.constexpr,
    WHOLE_VALUE: tl.constexpr,
):  # fmt: skip
    PACKED: tl.constexpr = cu_seqlens_ptr is not None
    tile, pair = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    sequence, kv_head = pair // kv_heads, (pair % kv_heads).to(tl.int64)
    batch, first_query, num_queries, first_key, keys, prefix = sequence_of(
        sequence, cu_seqlens_ptr, cu_seqlens_k_ptr, key_starts_ptr, key_ends_ptr, prefix_lengths_ptr, length,
        num_keys, capacity,
    )  # fmt: skip
    group = heads // kv_heads
    total = prefix + keys
    batch = tl.zeros_like(sequence).to(tl.int64) + batch
    in_prefix = tile < prefix_tiles
    first = tl.where(in_prefix, tile * BLOCK_KEYS, prefix + (tile - prefix_tiles) * BLOCK_KEYS)
    limit = tl.where(in_prefix, prefix, total)
    if first >= limit:
        return
    dims, value_dims = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE)
    position = first + tl.arange(0, BLOCK_KEYS)
    inside = position < limit
    key = load_rows(rows_of_keys(
        key_ptr, prefix_key_ptr, position, inside, in_prefix, sequence, batch, kv_head, first_key, prefix,
        page_table_ptr, page_size, max_pages, key_batch, key_head, key_row, prefix_key_batch, prefix_key_head,
        prefix_key_row,
    ), inside, dims, head_dim, WHOLE_DIM)  # fmt: skip
    value = load_rows(rows_of_keys(
        value_ptr, prefix_value_ptr, position, inside, in_prefix, sequence, batch, kv_head, first_key, prefix,
        page_table_ptr, page_size, max_pages, value_batch, value_head, value_row, prefix_value_batch,
        prefix_value_head, prefix_value_row,
    ), inside, value_dims, value_dim, WHOLE_VALUE)  # fmt: skip
    low, high = 0, num_queries
    if BOUNDED:
        low, high = queries_that_see(first, smaller(first + BLOCK_KEYS, limit), sequence, chosen_ptr, left, right,
                                     block, prefix_window, offset, first_key, prefix, num_queries, PACKED)  # fmt: skip
    grad_key = tl.zeros([BLOCK_KEYS, BLOCK_DIM], tl.float32)
    grad_value = tl.zeros([BLOCK_KEYS, BLOCK_VALUE], tl.float32)
    for number in range(low * group // BLOCK_ROWS, (high * group + BLOCK_ROWS - 1) // BLOCK_ROWS):
        row = number * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        query, head = row // group, kv_head * group + row % group
        exist = query < num_queries
        at = (first_query + query).to(tl.int64)
        queries = load_rows(query_ptr + batch * query_batch + head * query_head + at * query_row, exist, dims,
                            head_dim, WHOLE_DIM)  # fmt: skip
        grad = load_rows(grad_out_ptr + batch * grad_out_batch + head * grad_out_head + at * grad_out_row, exist,
                         value_dims, value_dim, WHOLE_VALUE)  # fmt: skip
        sums_at = (batch * heads + head) * length + at
        sums = tl.load(logsumexp_ptr + sums_at, mask=exist, other=0.0)
        delta = tl.load(delta_ptr + sums_at, mask=exist, other=0.0)
        score = tl.dot(key, tl.trans(queries), input_precision="ieee")
        mask_at = mask_ptr
        if DENSE:
            mask_at += (batch * mask_batch + head * mask_head + at * mask_row)[None, :]
            mask_at += (position - prefix + first_key).to(tl.int64)[:, None] * mask_column
        weights, slope = weights_and_slope(
            score, sums[None, :], scale, softcap, mask_at, exist[None, :] & inside[:, None], query[None, :],
            position[:, None], sequence, chosen_ptr, left, right, block, prefix_window, offset, first_key, prefix,
            total, PACKED, BOUNDED, FINISHES, DENSE,
        )  # fmt: skip
        grad_value = tl.dot(weights.to(grad.dtype), grad, grad_value, input_precision="ieee")
        grad_score = weights * (tl.dot(value, tl.trans(grad), input_precision="ieee") - delta[None, :]) * slope
        grad_key = tl.dot(grad_score.to(queries.dtype), queries, grad_key, input_precision="ieee")
    near = (batch * kv_heads + kv_head) * num_keys + (position - prefix + first_key)
    far = (sequence.to(tl.int64) * kv_heads + kv_head) * capacity + position
    to = tl.where(in_prefix, far, near)[:, None]
    grad_keys, grad_values = grad_key_ptr, grad_value_ptr
    if grad_prefix_key_ptr is not None:
        grad_keys = tl.where(in_prefix, grad_prefix_key_ptr, grad_key_ptr)
        grad_values = tl.where(in_prefix, grad_prefix_value_ptr, grad_value_ptr)
    tl.store(grad_keys + to * head_dim + dims[None, :], grad_key.to(grad_key_ptr.dtype.element_ty),
             mask=inside[:, None] & (dims < head_dim)[None, :])  # fmt: skip
    tl.store(grad_values + to * value_dim + value_dims[None, :], grad_value.to(grad_value_ptr.dtype.element_ty),
             mask=inside[:, None] & (value_dims < value_dim)[None, :])  # fmt: skip


def key_gradient(
    problem: Any, logsumexp: Tensor, grad_out: Tensor, delta: Tensor, grad_key: Tensor, grad_value: Tensor,
    grad_prefix_key: Tensor | None, grad_prefix_value: Tensor | None,
) -> None:  # fmt: skip
    """Fill the gradients, which hold zeros and are contiguous; the last two are None where the prefix has none.

    ``delta`` as :func:`query_gradient` leaves it; the last dimensions of the problem and ``grad_out`` have stride 1.
    """
    query = problem.query
    arguments = problem_arguments(problem) | tensor_strides("grad_out", grad_out)
    config = key_gradient_config(query.shape[3], problem.value.shape[3], query.dtype)
    prefix_tiles = 0 if grad_prefix_key is None else triton.cdiv(problem.prefix_capacity, config["BLOCK_KEYS"])
    tiles = prefix_tiles + triton.cdiv(problem.key.shape[2], config["BLOCK_KEYS"])
    programs = problem.sequences * problem.key.shape[1] * tiles
    if not programs:
        return
    with torch.cuda.device_of(query):
        _key_gradient_kernel[programs,](
            **arguments, grad_out_ptr=grad_out, logsumexp_ptr=logsumexp, delta_ptr=delta, grad_key_ptr=grad_key,
            grad_value_ptr=grad_value, grad_prefix_key_ptr=grad_prefix_key, grad_prefix_value_ptr=grad_prefix_value,
            tiles=tiles, prefix_tiles=prefix_tiles, **config,
        )  # fmt: skip


def ahead_of_time() -> list[tuple[Any, ...]]:
    """Heads of each size and dtype; a prefix, masks and a softcap."""
    none = ("grad_prefix_key_ptr", "grad_prefix_value_ptr")
    names = (
        "bf16 64",
        "bf16 128 prefix",
        "fp16 128 rule",
        "bf16 256",
        "bf16 512 rule",
        "bf16 96 softcap float",
        "fp32 64",
        "fp32 128 rule",
    )
    return [x for name in names for x in ahead(_key_gradient_kernel, key_gradient_config, name, none)]
