"""Attention layers of transformers' DiffusionGemma whose queries and keys are normalised and rotated in one pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.diffusion_gemma import modeling_diffusion_gemma as stock

from diffusion_runtime import ops

PARAMETERS = ("self", "hidden_states", "position_embeddings", "attention_mask", "past_key_values", "kwargs")


def forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """In place of the method of an encoder's or a decoder's attention layer.

    transformers writes the frequencies of its partial rotary embedding as zeros, so that all of a head is rotated.
    """
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    query, key = (project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj))
    value = key if self.v_proj is None else self.v_proj(hidden_states).view(shape).transpose(1, 2)
    value = self.v_norm(value)
    cos, sin = position_embeddings  # [batch or 1, length, head_dim], whose second half repeats the first
    half = self.head_dim // 2
    query, key = ops.qk_norm_rope(
        query,
        key,
        None,
        cos[..., :half],
        sin[..., :half],
        query_weight=self.q_norm.weight,
        key_weight=self.k_norm.weight,
        eps=self.q_norm.eps,
    )
    if past_key_values is not None:
        if hasattr(self, "append_to_cache"):  # a decoder's, which does not write
            key, value = self.append_to_cache(past_key_values, key, value)
        else:
            key, value = past_key_values.update(key, value, self.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, stock.eager_attention_forward)
    out, weights = attend(
        self,
        query,
        key,
        value,
        attention_mask,
        dropout=self.attention_dropout if self.training else 0.0,
        scaling=self.scaling,
        sliding_window=self.sliding_window,
        is_causal=self.is_causal,
        **kwargs,
    )
    return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights
