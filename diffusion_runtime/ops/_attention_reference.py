"""``attention`` in eager torch: the definition that every backend is held to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusion_runtime.ops._attention_problem import AttentionProblem


def attention_reference(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    """``out`` and ``logsumexp``; differentiable by torch itself."""
    if problem.cu_seqlens is not None:
        return _packed(problem)
    keys = all_keys(problem)
    # [batch, kv_heads, group, length, head_dim] against [batch, kv_heads, 1, keys, head_dim]
    scores, _ = scores_of(problem, keys, slice(None))
    logsumexp = scores.logsumexp(-1)
    nothing = logsumexp == -torch.inf
    weights = (scores - logsumexp.masked_fill(nothing, 0.0)[..., None]).exp()
    out = (weights @ keys.value.unsqueeze(2)).flatten(1, 2).to(problem.query.dtype)
    # memory as outputs() has it
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return out, logsumexp.flatten(1, 2)


@dataclass(frozen=True, eq=False)
class Keys:
    """Both segments side by side, as only the reference may have them."""

    key: Tensor  # [batch, kv_heads, keys, head_dim] float32 or wider
    value: Tensor
    position: Tensor  # [batch, keys] int64
    real: Tensor  # [batch, keys] bool
    prefix: Tensor  # [batch] keys of each prefix


def all_keys(problem: AttentionProblem) -> Keys:
    query, num_keys = problem.query, problem.key.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    slot = torch.arange(num_keys, device=query.device)
    start = _column(problem.key_starts, 0, problem)
    end = _column(problem.key_ends, num_keys, problem)
    prefix = _column(problem.prefix_lengths, problem.prefix_capacity, problem)
    position, real = prefix + slot - start, (slot >= start) & (slot < end)
    key, value = problem.key, problem.value
    if problem.prefix_key is not None and problem.prefix_value is not None:
        before = torch.arange(problem.prefix_capacity, device=query.device).expand(problem.sequences, -1)
        position, real = torch.cat((before, position), 1), torch.cat((before < prefix, real), 1)
        key = torch.cat((_dense(problem.prefix_key, problem.page_table), key), 2)
        value = torch.cat((_dense(problem.prefix_value, problem.page_table), value), 2)
    # what lies outside of a sequence may be anything, NaN included, and 0 * NaN is not 0
    key, value = (x.masked_fill(~real[:, None, :, None], 0.0).to(wide) for x in (key, value))
    return Keys(key, value, position, real, prefix[:, 0])


def _column(values: Tensor | None, default: int, problem: AttentionProblem) -> Tensor:
    if values is None:
        return torch.full((problem.sequences, 1), default, device=problem.query.device)
    return values.long()[:, None]


def _dense(prefix: Tensor, table: Tensor | None) -> Tensor:
    if table is None:
        return prefix
    # [sequences, max_pages, kv_heads, page_size, head_dim] -> [sequences, kv_heads, max_pages * page_size, head_dim];
    # entries behind a prefix's last page may be anything
    return prefix[table.long().clamp(0, prefix.shape[0] - 1)].transpose(1, 2).flatten(2, 3)


def scores_of(problem: AttentionProblem, keys: Keys, rows: slice) -> tuple[Tensor, Tensor | None]:
    """The scores of some of the queries, ``[batch, kv_heads, group, rows, keys]``, and the slope of their softcap.

    A score is ``-inf`` where the query does not see the key. The slope is None without a softcap.
    """
    query = problem.query[:, :, rows].to(keys.key.dtype).unflatten(1, (keys.key.shape[1], -1))
    scores = query @ keys.key.unsqueeze(2).transpose(-1, -2) * problem.scale
    slope = None
    if problem.softcap:
        bent = (scores / problem.softcap).tanh()
        scores, slope = problem.softcap * bent, 1 - bent.square()
    if (mask := problem.dense_mask) is not None:
        mask = mask[:, :, rows].unflatten(1, (keys.key.shape[1], -1))
        hidden = ~mask if mask.dtype == torch.bool else mask == -torch.inf  # of such a key not even NaN counts
        scores = (scores if mask.dtype == torch.bool else scores + mask).masked_fill(hidden, -torch.inf)
    return scores.masked_fill(~_seen(problem, keys, rows)[:, None, None], -torch.inf), slope


def _seen(problem: AttentionProblem, keys: Keys, rows: slice) -> Tensor:
    """``[batch, rows, keys]``: VisibleKeys, word for word."""
    rule = problem.visible
    batch = problem.sequences
    slot = torch.arange(problem.query.shape[2], device=problem.query.device)[rows]
    start = _column(problem.key_starts, 0, problem)
    p = (keys.prefix[:, None] + slot - start + rule.offset)[:, :, None]
    position = keys.position[:, None, :]
    near = torch.ones((), dtype=torch.bool, device=p.device).expand(batch, p.shape[1], position.shape[2])
    recent = near
    if rule.left >= 0:
        near = near & (position >= p - rule.left)
    if rule.right >= 0:
        near = near & (position < (p.div(rule.block, rounding_mode="floor") + 1) * rule.block + rule.right)
    if rule.prefix_window >= 0:
        recent = recent & (position >= keys.prefix[:, None, None] - rule.prefix_window)
    both = near & recent if rule.chosen is None else torch.where(rule.chosen[:, None, None], near, recent)
    return both & keys.real[:, None, :]


def _packed(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
    outs, sums = [], []
    for part in packed_sequences(problem):
        out, logsumexp = attention_reference(part)
        outs.append(out)
        sums.append(logsumexp)
    empty_out, empty_sums = problem.outputs()
    if not outs:
        return empty_out, empty_sums
    return torch.cat(outs, 2).transpose(1, 2).contiguous().transpose(1, 2), torch.cat(sums, 2)


def packed_sequences(problem: AttentionProblem) -> Iterator[AttentionProblem]:
    """A packed problem as one problem per sequence; reads the lengths, so it synchronises on a GPU."""
    assert problem.cu_seqlens is not None
    assert problem.cu_seqlens_k is not None
    queries, keys = problem.cu_seqlens.tolist(), problem.cu_seqlens_k.tolist()
    paged = problem.page_table is not None
    for b in range(problem.sequences):
        one = slice(b, b + 1)
        rule = problem.visible
        own = slice(keys[b], keys[b + 1])
        yield replace(
            problem,
            query=problem.query[:, :, queries[b] : queries[b + 1]],
            key=problem.key[:, :, own],
            value=problem.value[:, :, own],
            prefix_key=problem.prefix_key if paged or problem.prefix_key is None else problem.prefix_key[one],
            prefix_value=problem.prefix_value if paged or problem.prefix_value is None else problem.prefix_value[one],
            prefix_lengths=None if problem.prefix_lengths is None else problem.prefix_lengths[one],
            page_table=problem.page_table[one] if problem.page_table is not None else None,
            cu_seqlens=None,
            cu_seqlens_k=None,
            max_length=queries[b + 1] - queries[b],
            visible=rule if rule.chosen is None else rule._replace(chosen=rule.chosen[one]),
        )
