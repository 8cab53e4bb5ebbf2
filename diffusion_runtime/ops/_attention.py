"""Bidirectional attention with grouped heads, two segments of keys and masks that are rules, not tensors."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from diffusion_runtime.ops._attention_arguments import Packed, PagedPrefix, Prefix, read_problem
from diffusion_runtime.ops._attention_autocast import in_autocast_dtype, is_autocast
from diffusion_runtime.ops._attention_library import run_attention
from diffusion_runtime.ops._attention_masks import AttentionMask


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    prefix: Prefix | PagedPrefix | None = ...,
    mask: AttentionMask | Tensor | None = ...,
    lengths: Tensor | tuple[Tensor, Tensor] | Packed | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    return_logsumexp: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    prefix: Prefix | PagedPrefix | None = ...,
    mask: AttentionMask | Tensor | None = ...,
    lengths: Tensor | tuple[Tensor, Tensor] | Packed | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    return_logsumexp: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    prefix: Prefix | PagedPrefix | None = None,
    mask: AttentionMask | Tensor | None = None,
    lengths: Tensor | tuple[Tensor, Tensor] | Packed | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_logsumexp: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(softcap(scale * query @ keys.T) + mask) @ values``, head by head, for the keys that a query sees.

    Products, softmax and sums are in float32 (float64 for float64 inputs, reference only); the result is rounded once,
    to the dtype of ``query``. A query that sees no key gives 0, and ``-inf`` as its logsumexp. Differentiable.

    Args:
        query: ``[batch, heads, length, head_dim]``, any strides.
        key: ``[batch, kv_heads, num_keys, head_dim]``; ``kv_heads`` divides ``heads`` and each key head serves
            ``heads / kv_heads`` consecutive query heads.
        value: ``[batch, kv_heads, num_keys, value_dim]``.
        prefix: keys and values before those of ``key``. They are never concatenated.
        mask: what each query sees: an object (:class:`Bidirectional`, :class:`Causal`, :class:`BlockCausal`,
            :class:`SlidingWindow`, :class:`PrefixWindow`, :class:`PerSequence`), or a tensor that broadcasts to
            ``[batch, heads, length, num_keys]``: bool, True where a query sees a key, or float and added to the
            scores, ``-inf`` for what a query does not see. A tensor cannot be combined with ``prefix`` or
            :class:`Packed`. What a mask hides must be finite (0 * NaN is NaN, as in torch); what is not real, which is
            padding and what lies behind a prefix's length, may be anything.
        lengths: how many keys of each sequence are real: ``[batch]`` integers; for left padding a pair
            ``(starts, ends)`` of such tensors; or :class:`Packed`. None: all of them. Positions of masks count real
            keys only, so padding changes nothing.
        scale: defaults to ``head_dim ** -0.5``.
        softcap: scores become ``softcap * tanh(score / softcap)`` before the mask.
        return_logsumexp: also return the natural logarithm of each query's sum of exponentials.
        backend: ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``; None for the first that can run.

    Returns:
        ``[batch, heads, length, value_dim]`` in the dtype of ``query``, in memory as ``[batch, length, heads,
        value_dim]``; with ``return_logsumexp`` also ``[batch, heads, length]`` float32.

    Raises:
        ValueError: shapes that do not fit together, or (on the CPU, where they can be read for nothing) lengths or
            pages outside of what they index.
        TypeError: dtypes that differ or are not floating point.
        BackendUnavailableError: a named backend that cannot run this call.
    """
    if is_autocast(query.device):
        query, key, value = in_autocast_dtype(query, key, value)
    problem = read_problem(query, key, value, prefix, mask, lengths, scale, softcap)
    out, logsumexp = run_attention(problem, backend)
    return (out, logsumexp) if return_logsumexp else out
