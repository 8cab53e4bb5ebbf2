"""The gradients of ``attention``, by blocks of queries, from its logsumexp: no ``[length, keys]`` tensor is kept."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_runtime.ops._attention_problem import AttentionProblem
from diffusion_runtime.ops._attention_reference import all_keys, packed_sequences, scores_of

_SCORES = 1 << 24  # of one block


class AttentionGradients(NamedTuple):
    """One for each differentiable input, in the dtype of the input; None where there is no such input."""

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor | None
    prefix_value: Tensor | None
    dense_mask: Tensor | None  # of a float mask: [batch, heads, length, num_keys]


def attention_backward_reference(
    problem: AttentionProblem,
    out: Tensor,
    logsumexp: Tensor,
    grad_out: Tensor,
    grad_logsumexp: Tensor | None,
    mask_gradient: bool,
) -> AttentionGradients:
    """Gradients of every input (Dao et al., 2022, appendix B.2, with a softcap and a second output).

    Args:
        problem: what the forward was given.
        out: ``[batch, heads, length, value_dim]`` as the forward gave it.
        logsumexp: ``[batch, heads, length]``.
        grad_out: the shape of ``out``.
        grad_logsumexp: the shape of ``logsumexp``, or None for zeros.
        mask_gradient: whether that of a float mask is wanted; it has as many elements as there are scores.
    """
    if problem.cu_seqlens is not None:
        return _packed(problem, out, logsumexp, grad_out, grad_logsumexp)
    keys = all_keys(problem)
    wide, kv_heads = keys.key.dtype, keys.key.shape[1]
    length, num_keys = problem.query.shape[2], keys.key.shape[2]
    grad_key, grad_value = torch.zeros_like(keys.key), torch.zeros_like(keys.value)
    grad_query = torch.empty_like(problem.query)
    grad_mask = (
        torch.zeros(problem.dense_mask.shape, dtype=wide, device=out.device)
        if (mask_gradient and problem.dense_mask is not None)
        else None
    )
    rows = max(1, _SCORES // max(1, problem.query.shape[0] * problem.query.shape[1] * num_keys))
    for first in range(0, length, rows):
        block = slice(first, first + rows)
        scores, slope = scores_of(problem, keys, block)
        # [batch, kv_heads, group, rows, ...]
        sums = logsumexp[:, :, block].unflatten(1, (kv_heads, -1)).to(wide)
        weights = (scores - sums.masked_fill(sums == -torch.inf, 0.0)[..., None]).exp()
        grad = grad_out[:, :, block].to(wide).unflatten(1, (kv_heads, -1))
        delta = (grad * out[:, :, block].to(wide).unflatten(1, (kv_heads, -1))).sum(-1)
        if grad_logsumexp is not None:
            delta = delta - grad_logsumexp[:, :, block].to(wide).unflatten(1, (kv_heads, -1))
        grad_value += (weights.transpose(-1, -2) @ grad).sum(2)
        grad_scores = weights * (grad @ keys.value.unsqueeze(2).transpose(-1, -2) - delta[..., None])
        if grad_mask is not None:
            grad_mask[:, :, block] = grad_scores.flatten(1, 2)
        grad_scores = grad_scores * problem.scale if slope is None else grad_scores * slope * problem.scale
        grad_query[:, :, block] = (grad_scores @ keys.key.unsqueeze(2)).flatten(1, 2).to(problem.query.dtype)
        queries = problem.query[:, :, block].to(wide).unflatten(1, (kv_heads, -1))
        grad_key += (grad_scores.transpose(-1, -2) @ queries).sum(2)

    before = problem.prefix_capacity
    dtype = problem.query.dtype
    grad_key, grad_value = grad_key.to(dtype), grad_value.to(dtype)
    dense = problem.prefix_key is not None and problem.page_table is None
    return AttentionGradients(
        grad_query,
        grad_key[:, :, before:].contiguous(),
        grad_value[:, :, before:].contiguous(),
        grad_key[:, :, :before].contiguous() if dense else None,
        grad_value[:, :, :before].contiguous() if dense else None,
        grad_mask,
    )


def _packed(
    problem: AttentionProblem, out: Tensor, logsumexp: Tensor, grad_out: Tensor, grad_logsumexp: Tensor | None
) -> AttentionGradients:
    assert problem.cu_seqlens is not None
    parts = []
    for part, first in zip(packed_sequences(problem), problem.cu_seqlens.tolist(), strict=False):
        own = slice(first, first + part.query.shape[2])
        sums = None if grad_logsumexp is None else grad_logsumexp[:, :, own]
        parts.append(
            attention_backward_reference(
                part, out[:, :, own], logsumexp[:, :, own], grad_out[:, :, own], sums, mask_gradient=False
            )
        )
    if not parts:
        zeros = [torch.zeros_like(x) for x in (problem.query, problem.key, problem.value)]
        return AttentionGradients(zeros[0], zeros[1], zeros[2], None, None, None)
    prefix_keys = [part.prefix_key for part in parts if part.prefix_key is not None]
    prefix_values = [part.prefix_value for part in parts if part.prefix_value is not None]
    return AttentionGradients(
        torch.cat([part.query for part in parts], 2),
        torch.cat([part.key for part in parts], 2),
        torch.cat([part.value for part in parts], 2),
        torch.cat(prefix_keys) if prefix_keys else None,
        torch.cat(prefix_values) if prefix_values else None,
        None,
    )
