"""What transformers calls in every attention layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from diffusion_runtime import ops
from diffusion_runtime.integrations._transformers_masks import Rule, RuleMask, write_rule

_REFUSED = {
    "head_mask": "heads cannot be masked",
    "indices": "each query chooses keys of its own (sparse attention)",
    "block_indices": "each query chooses blocks of keys of its own (sparse attention)",
    "cache": "the pages of continuous batching are not read",
    "output_attentions": "attention weights are never made, so they cannot be returned",
}


class Segments(tuple):  # type: ignore[type-arg]  # of two tensors
    """Keys or values of the cache and of the canvas, ``[batch, kv_heads, rows, head_dim]`` each, that nobody joined."""

    __slots__ = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what joining them would give."""
        cached, own = self
        return (*own.shape[:2], cached.shape[2] + own.shape[2], own.shape[3])

    def join(self) -> Tensor:
        """One tensor."""
        return torch.cat(tuple(self), 2)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | Segments,
    value: Tensor | Segments,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    backend: str | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer by the conventions of transformers.

    Without a mask, a layer with ``is_causal`` lets query ``i`` see keys up to ``i``, and a single query sees all keys.
    ``sliding_window``, among the rest of the arguments, is in the mask already.

    Args:
        module: the layer; its ``is_causal`` counts where the argument is None.
        query: ``[batch, heads, length, head_dim]``.
        key: ``[batch, kv_heads, num_keys, head_dim]``; or both segments of it, which are joined only under a mask that
            is not one of padding at the ends.
        value: ``[batch, kv_heads, num_keys, value_dim]``.
        attention_mask: a :class:`RuleMask`, or a tensor as for :func:`diffusion_runtime.ops.attention`.
        dropout: above 0, torch's attention computes it.
        scaling: None for ``head_dim ** -0.5``.
        is_causal: see above.
        softcap: as for :func:`diffusion_runtime.ops.attention`.
        s_aux: ``[heads]``, one more score of each head, for a key whose value is 0.
        sinks: ``[batch, heads, length, 1]``, the same for each query.
        position_bias: ``[batch, heads, length, num_keys]``, or broadcast to it; added to the scores.
        backend: see :func:`diffusion_runtime.integrations.transformers.register`.

    Returns:
        ``[batch, length, heads, value_dim]``, contiguous, and None for the weights.

    Raises:
        ValueError: an argument that cannot be computed exactly, by name.
    """
    for name, reason in _REFUSED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(
                f'attn_implementation="diffusion_runtime" cannot run {type(module).__name__} with {name}: {reason}'
            )
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = s_aux is None and sinks is None and position_bias is None and not (is_causal or dropout)
    if isinstance(key, Segments) and isinstance(value, Segments) and plain:
        out = _over_segments(query, key, value, attention_mask, scale=scaling, softcap=softcap, backend=backend)
        if out is not None:
            return out.transpose(1, 2).contiguous(), None
    key, value = (x.join() if isinstance(x, Segments) else x for x in (key, value))
    if dropout:
        # softcap and the sinks are not torch's
        for name, tensor in (("softcap", softcap), ("s_aux", s_aux), ("sinks", sinks)):
            if tensor is not None:
                raise ValueError(
                    f'attn_implementation="diffusion_runtime" cannot train {type(module).__name__} with dropout and '
                    f"{name}: set attention_dropout to 0"
                )
        dense = attention_mask.write() if isinstance(attention_mask, RuleMask) else attention_mask
        out, _ = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            dense,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            position_bias=position_bias,
        )
        return out, None
    mask, lengths = _what_is_seen(query, key, attention_mask, is_causal)
    if position_bias is not None:
        shape = (query.shape[0], 1, query.shape[2], key.shape[2])
        mask, lengths = _biased(mask, lengths, position_bias, shape), None
    settings: dict[str, Any] = {
        "mask": mask,
        "lengths": lengths,
        "scale": scaling,
        "softcap": softcap,
        "backend": backend,
    }
    if s_aux is None and sinks is None:
        return ops.attention(query, key, value, **settings).transpose(1, 2).contiguous(), None
    out, logsumexp = ops.attention(query, key, value, **settings, return_logsumexp=True)
    for score in (None if s_aux is None else s_aux[:, None], None if sinks is None else sinks.squeeze(-1)):
        if score is not None:  # out * e^logsumexp / (e^logsumexp + e^score)
            out = (out * (logsumexp - score).sigmoid()[..., None]).to(query.dtype)
            logsumexp = torch.logaddexp(logsumexp, score.to(logsumexp.dtype))
    return out.transpose(1, 2).contiguous(), None


def _over_segments(query: Tensor, key: Segments, value: Segments, mask: Tensor | None, **options: Any) -> Tensor | None:
    """Attention to keys that are not joined, or None under a mask that is not one of padding at the ends."""
    cut = None
    if mask is not None:
        if not isinstance(mask, RuleMask) or mask.written is not None or not isinstance(mask.rule, ops.Bidirectional):
            return None
        if tuple(mask.shape) != (query.shape[0], 1, query.shape[2], key.shape[2]):
            return None
        cut = mask.cut(key[0].shape[2])
    if cut is None:
        whole: Tensor = ops.attention(query, key[1], value[1], prefix=ops.Prefix(key[0], value[0]), **options)
        return whole
    parts = [
        ops.attention(query, keys, values, lengths=lengths, return_logsumexp=True, **options)
        for keys, values, lengths in zip(key, value, cut, strict=True)
    ]
    outs, logsumexps = zip(*parts, strict=True)
    return ops.merge_attention(outs, logsumexps)[0]


def _what_is_seen(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, is_causal: bool
) -> tuple[Rule | Tensor | None, tuple[Tensor, Tensor] | None]:
    """``mask`` and ``lengths`` of :func:`diffusion_runtime.ops.attention`."""
    if attention_mask is None:
        return (ops.Causal() if is_causal and query.shape[2] > 1 else None), None
    if not isinstance(attention_mask, RuleMask):
        return attention_mask, None
    if attention_mask.written is not None:
        return attention_mask.written, None
    rule, starts, ends = attention_mask.rule, attention_mask.starts, attention_mask.ends
    lengths = None if starts is None or ends is None else (starts, ends)
    fits = tuple(attention_mask.shape) == (query.shape[0], 1, query.shape[2], key.shape[2])
    if fits or (isinstance(rule, ops.Bidirectional) and lengths is None):
        return rule, lengths
    return attention_mask.write(), None  # broadcasts as a tensor does, or is refused as one


def _biased(
    mask: Rule | Tensor | None,
    lengths: tuple[Tensor, Tensor] | None,
    bias: Tensor,
    shape: tuple[int, int, int, int],
) -> Tensor:
    """``bias`` where the mask lets a query see a key, ``-inf`` elsewhere."""
    if not isinstance(mask, Tensor):
        starts, ends = lengths or (None, None)
        mask = write_rule(ops.Bidirectional() if mask is None else mask, starts, ends, shape, bias.device)
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask
