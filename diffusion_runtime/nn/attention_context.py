"""What the attention of a forward is given beside its own tokens: where they stand, and which keys they see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_runtime import ops
from diffusion_runtime.nn.norm import LlamaRMSNorm
from diffusion_runtime.nn.rotary import rotary_angles
from diffusion_runtime.ops._decoder_layers import LayerKeys


@dataclass(frozen=True, eq=False)
class AttentionContext:
    """Whole sequences from their first token on, nothing kept. A cache is a context that keeps keys and values.

    Args:
        mask: what each position sees; None for everything.
        lengths: ``[batch]`` int64, how many tokens of each sequence are real; None for all. The others are on the right
            and are not seen.
    """

    mask: ops.AttentionMask | None = None
    lengths: Tensor | None = None

    def positions(self, tokens: Tensor) -> Tensor:
        """Where ``tokens``, ``[batch, length]``, stand in their sequences: ``[length]`` or ``[batch, length]``."""
        return torch.arange(tokens.shape[1], device=tokens.device)

    def rotary(self, tokens: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
        """:func:`diffusion_runtime.nn.rotary_angles` at the positions of ``tokens``."""
        return rotary_angles(self.positions(tokens), rotary_dim, theta)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of one layer, counted from 0, over the keys of these tokens and whatever was kept of others.

        Args:
            query: ``[batch, heads, length, head_dim]``, rotated.
            key, value: ``[batch, kv_heads, length, head_dim]``, the key rotated.

        Returns:
            the shape and dtype of ``query``.
        """
        del layer
        return ops.attention(query, key, value, mask=self.mask, lengths=self.lengths)

    def layer_keys(self) -> LayerKeys | None:
        """What :meth:`attend` does in every layer, as data; None where a subclass does something else, or a mask is a
        tensor."""
        if type(self).attend is not AttentionContext.attend or isinstance(self.mask, Tensor):
            return None
        return LayerKeys(self.mask, self.lengths)


def self_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_dim: int,
    rotary: tuple[Tensor, Tensor],
    context: AttentionContext,
    layer: int,
    *,
    query_norm: LlamaRMSNorm | None = None,
    key_norm: LlamaRMSNorm | None = None,
) -> Tensor:
    """From the projections of a layer to what its output projection takes: split, normalise, rotate, attend, join.

    Args:
        query: ``[batch, length, heads * head_dim]``.
        key, value: ``[batch, length, kv_heads * head_dim]``.
        head_dim: of each head.
        rotary: cosines and sines of :func:`diffusion_runtime.nn.rotary_angles` at these positions; where they have
            fewer than ``head_dim / 2`` columns, only the first elements of a head rotate.
        context: which keys are seen.
        layer: counted from 0.
        query_norm, key_norm: over each head, before it is rotated; both or neither.

    Returns:
        the shape and dtype of ``query``.
    """
    # [batch, length, heads * head_dim] -> [batch, heads, length, head_dim], as views
    query, key, value = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (query, key, value))
    query, key = ops.qk_norm_rope(
        query,
        key,
        None,
        *rotary,
        query_weight=None if query_norm is None else query_norm.weight,
        key_weight=None if key_norm is None else key_norm.weight,
        eps=None if query_norm is None else query_norm.eps,
        round_before_weight=query_norm is not None,
        rotary_dim=2 * rotary[0].shape[-1],
    )
    return context.attend(layer, query, key, value).transpose(1, 2).flatten(2)
