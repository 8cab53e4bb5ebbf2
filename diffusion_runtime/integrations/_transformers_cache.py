"""What DiffusionGemma's decoder reads of a cache of transformers, dynamic or static: the tokens that are there."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.diffusion_gemma import modeling_diffusion_gemma as stock

from diffusion_runtime.integrations._transformers_attention import Segments
from diffusion_runtime.integrations.transformers import NAME


def append_to_cache(self: Any, past_key_values: Any, key: Tensor, value: Tensor) -> tuple[Any, Any]:
    """In place of the decoder layer's method: the same keys and values, not joined.

    Of a static cache, only what is filled; of its sliding layers, the last ``sliding_window - 1`` tokens, which is what
    a dynamic cache keeps. transformers itself writes the canvas over older keys there once the window is full. A model
    whose attention was set to another one since gets what that reads.
    """
    layer = past_key_values.layers[self.layer_idx]
    if not is_ours(self.config) or layer.keys is None or layer.keys.numel() == 0:
        found: tuple[Any, Any] = type(self).append_to_cache(self, past_key_values, key, value)
        return found
    keys, values = layer.keys, layer.values
    if past_key_values.is_compileable:
        end = min(length_of(past_key_values), keys.shape[2])
        start = max(end - self.sliding_window + 1, 0) if layer.is_sliding else 0
        keys, values = keys[:, :, start:end], values[:, :, start:end]
    return Segments((keys, key)), Segments((values, value))


def is_ours(config: Any) -> bool:
    """Whether attention is :func:`diffusion_runtime.ops.attention`."""
    return bool(config._attn_implementation == NAME)


def length_of(cache: Any) -> int:
    """Tokens seen so far. Static layers count on the device, but for sliding ones, which count here as well."""
    lengths = (getattr(layer, "cumulative_length_int", None) for layer in cache.layers)
    known: int | None = next((length for length in lengths if length is not None), None)
    return int(cache.get_seq_length()) if known is None else known


def decoder_masks(
    config: Any,
    inputs_embeds: Tensor,
    past_key_values: Any,
    decoder_attention_mask: Tensor | dict[str, Any] | None = None,
) -> dict[str, Tensor | None]:
    """In place of ``create_diffusion_decoder_attention_mask``: its own, for what :func:`append_to_cache` gives."""
    static = past_key_values is not None and past_key_values.is_compileable and is_ours(config)
    masks: dict[str, Tensor | None] = stock.DiffusionGemmaDecoderModel.create_diffusion_decoder_attention_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        past_key_values=_Dynamic(past_key_values, config.get_text_config()) if static else past_key_values,
        decoder_attention_mask=decoder_attention_mask,
    )
    return masks


class _Dynamic:
    """The sizes that a static cache would have if it were dynamic."""

    is_compileable = False

    def __init__(self, cache: Any, config: Any) -> None:
        self.is_sliding, self._length, self._window = cache.is_sliding, length_of(cache), config.sliding_window

    def get_seq_length(self) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Keys, and the number of the first."""
        kept = min(self._length, self._window - 1) if self.is_sliding[layer_idx] else self._length
        return kept + query_length, self._length - kept
