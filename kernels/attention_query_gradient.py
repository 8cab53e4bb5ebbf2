"""The gradient of ``attention``'s queries from its logsumexp (Dao et al., 2022, appendix B.2), tile by tile.

Also that of a float mask, and ``delta``, which the gradients of keys need. Softcap and logsumexp have theirs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from diffusion_runtime.kernels._attention_ahead import ahead
from diffusion_runtime.kernels._attention_launch import (
    COUNTS,
    problem_arguments,
    query_gradient_config,
    tensor_strides,
)
from diffusion_runtime.kernels._attention_rows import (
    block_at,
    block_of,
    load_rows,
    rows_of_keys,
    sequence_of,
    smaller,
    visible_range,
    weights_and_slope,
)
from torch import Tensor


@triton.jit(do_not_specialize=COUNTS)
def _query_gradient_kernel(
    query_ptr, key_ptr, value_ptr, prefix_key_ptr, prefix_value_ptr, prefix_lengths_ptr, page_table_ptr, mask_ptr,
    key_starts_ptr, key_ends_ptr, cu_seqlens_ptr, cu_seqlens_k_ptr, chosen_ptr,  # as _attention_kernel has them
    out_ptr, grad_out_ptr,  # [batch, heads, length, value_dim]
    logsumexp_ptr, grad_logsumexp_ptr,  # [batch, heads, length] float32, the second or None
    delta_ptr,  # [batch, heads, length] float32, written
    grad_query_ptr,  # [batch, heads, length, head_dim], written
    grad_mask_ptr,  # [batch, heads, length, num_keys] float32, zeros at first, or None
    length, num_keys, capacity, heads, kv_heads, head_dim, value_dim, left, right, block, prefix_window, offset,
    page_size, max_pages, tiles, scale, softcap,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    prefix_key_batch, prefix_key_head, prefix_key_row, prefix_value_batch, prefix_value_head, prefix_value_row,
    mask_batch, mask_head, mask_row, mask_column, out_batch, out_head, out_row, grad_out_batch, grad_out_head,
    grad_out_row, grad_query_batch, grad_query_head, grad_query_row,
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
    if tile * BLOCK_ROWS >= num_queries * group:
        return
    total = prefix + keys
    batch = tl.zeros_like(sequence).to(tl.int64) + batch
    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    query, head = row // group, kv_head * group + row % group
    exist = query < num_queries
    at = (first_query + query).to(tl.int64)
    dims, value_dims = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE)
    queries = load_rows(query_ptr + batch * query_batch + head * query_head + at * query_row, exist, dims, head_dim,
                        WHOLE_DIM)  # fmt: skip
    grad = load_rows(grad_out_ptr + batch * grad_out_batch + head * grad_out_head + at * grad_out_row, exist,
                     value_dims, value_dim, WHOLE_VALUE)  # fmt: skip
    out = load_rows(out_ptr + batch * out_batch + head * out_head + at * out_row, exist, value_dims, value_dim,
                    WHOLE_VALUE)  # fmt: skip
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    sums_at = (batch * heads + head) * length + at
    if grad_logsumexp_ptr is not None:
        delta -= tl.load(grad_logsumexp_ptr + sums_at, mask=exist, other=0.0)
    tl.store(delta_ptr + sums_at, delta, mask=exist)
    sums = tl.load(logsumexp_ptr + sums_at, mask=exist, other=0.0)

    first_seen, last_seen = 0, total
    if BOUNDED:
        first_seen, _ = visible_range(tile * BLOCK_ROWS // group, sequence, chosen_ptr, left, right, block,
                                      prefix_window, offset, first_key, prefix, total, PACKED)  # fmt: skip
        _, last_seen = visible_range(
            smaller((tile * BLOCK_ROWS + BLOCK_ROWS - 1) // group, num_queries - 1), sequence, chosen_ptr, left,
            right, block, prefix_window, offset, first_key, prefix, total, PACKED,
        )  # fmt: skip
    prefix_blocks = (prefix + BLOCK_KEYS - 1) // BLOCK_KEYS
    begin = block_of(first_seen, prefix_blocks, prefix, BLOCK_KEYS)
    end = begin
    if last_seen > first_seen:
        end = block_of(last_seen - 1, prefix_blocks, prefix, BLOCK_KEYS) + 1
    acc = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    for number in range(begin, end):
        first, limit, in_prefix = block_at(number, prefix_blocks, prefix, total, BLOCK_KEYS)
        position = first + tl.arange(0, BLOCK_KEYS)
        inside = (position >= first_seen) & (position < smaller(limit, last_seen))
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
        score = tl.dot(queries, tl.trans(key), input_precision="ieee")
        column = (position - prefix + first_key).to(tl.int64)[None, :]
        mask_at = mask_ptr
        if DENSE:
            mask_at += (batch * mask_batch + head * mask_head + at * mask_row)[:, None] + column * mask_column
        seen = exist[:, None] & inside[None, :]
        weights, slope = weights_and_slope(
            score, sums[:, None], scale, softcap, mask_at, seen, (row // group)[:, None], position[None, :], sequence,
            chosen_ptr, left, right, block, prefix_window, offset, first_key, prefix, total, PACKED, BOUNDED,
            FINISHES, DENSE,
        )  # fmt: skip
        grad_score = weights * (tl.dot(grad, tl.trans(value), input_precision="ieee") - delta[:, None])
        if grad_mask_ptr is not None:
            tl.store(grad_mask_ptr + sums_at[:, None] * num_keys + column, grad_score, mask=seen)
        acc = tl.dot((grad_score * slope).to(key.dtype), key, acc, input_precision="ieee")
    to = grad_query_ptr + batch * grad_query_batch + head * grad_query_head + at * grad_query_row
    tl.store(to[:, None] + dims[None, :], acc.to(grad_query_ptr.dtype.element_ty),
             mask=exist[:, None] & (dims < head_dim)[None, :])  # fmt: skip


def query_gradient(
    problem: Any, out: Tensor, logsumexp: Tensor, grad_out: Tensor, grad_logsumexp: Tensor | None, delta: Tensor,
    grad_query: Tensor, grad_mask: Tensor | None,
) -> None:  # fmt: skip
    """Fill ``delta`` [batch, heads, length] float32, ``grad_query``, and ``grad_mask``, which holds zeros.

    The last dimensions of the problem, ``out``, ``grad_out`` and ``grad_query`` have stride 1; the others' tensors are
    contiguous.
    """
    query = problem.query
    arguments = problem_arguments(problem)
    config = query_gradient_config(query.shape[3], problem.value.shape[3], query.dtype, arguments["FINISHES"])
    tiles = triton.cdiv(problem.max_length * (query.shape[1] // problem.key.shape[1]), config["BLOCK_ROWS"])
    programs = problem.sequences * problem.key.shape[1] * tiles
    if not programs:
        return
    for name, x in (("out", out), ("grad_out", grad_out), ("grad_query", grad_query)):
        arguments |= tensor_strides(name, x)
    with torch.cuda.device_of(query):
        _query_gradient_kernel[programs,](
            **arguments, out_ptr=out, grad_out_ptr=grad_out, logsumexp_ptr=logsumexp, grad_logsumexp_ptr=grad_logsumexp,
            delta_ptr=delta, grad_query_ptr=grad_query, grad_mask_ptr=grad_mask, tiles=tiles, **config,
        )  # fmt: skip


def ahead_of_time() -> list[tuple[Any, ...]]:
    """Heads of each size and dtype; a prefix, masks and a softcap."""
    none = ("grad_mask_ptr", "grad_logsumexp_ptr")
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
    return [x for name in names for x in ahead(_query_gradient_kernel, query_gradient_config, name, none)]
