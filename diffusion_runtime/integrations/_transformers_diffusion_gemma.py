"""DiffusionGemma of transformers: its decoder's keys in two segments, and its norms in one pass."""

from __future__ import annotations

import inspect
import types
from typing import Any

from torch import Tensor, nn
from transformers.models.diffusion_gemma import modeling_diffusion_gemma as stock

from diffusion_runtime import ops
from diffusion_runtime.integrations._transformers_attention import Segments
from diffusion_runtime.integrations._transformers_denoising_step import PARAMETERS, SelfConditioning, denoising_step


def append_to_cache(self: Any, past_key_values: Any, key: Tensor, value: Tensor) -> tuple[Any, Any]:
    """In place of the decoder layer's method: the same keys and values, not joined where the cache grows."""
    layer = past_key_values.layers[self.layer_idx]
    if past_key_values.is_compileable or layer.keys is None or layer.keys.numel() == 0:
        found: tuple[Any, Any] = type(self).append_to_cache(self, past_key_values, key, value)
        return found
    return Segments((layer.keys, key)), Segments((layer.values, value))


class RMSNorm(stock.DiffusionGemmaRMSNorm):  # type: ignore[misc]
    """transformers' module in one pass: float32 inside, rounded once behind the weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., dim]`` in, the same out."""
        return ops.rms_norm(hidden_states, self.weight if self.with_scale else None, eps=self.eps)


def why_not(model: object) -> str | None:
    """Why a model cannot be accelerated, or None. The layout of its internals is looked at, not its version."""
    if not isinstance(model, stock.DiffusionGemmaForBlockDiffusion):
        return f"is a {type(model).__name__}, not a DiffusionGemmaForBlockDiffusion"
    for name in ("encoder.language_model.layers", "decoder.layers"):
        layers = model.model
        for part in name.split("."):
            layers = getattr(layers, part, None)
        if not isinstance(layers, nn.ModuleList):
            return f"has no list of layers at model.{name}"
    for layer in model.model.decoder.layers:
        method = getattr(type(getattr(layer, "self_attn", None)), "append_to_cache", None)
        if not isinstance(method, types.FunctionType) or method.__code__.co_varnames[:4] != _APPEND:
            return "joins its decoder's keys in another way than known here"
    if tuple(inspect.signature(type(model)._denoising_step).parameters)[: len(PARAMETERS)] != PARAMETERS:
        return "takes its denoising steps in another way than known here"
    if type(getattr(model.model.decoder, "self_conditioning", None)) is not stock.DiffusionGemmaSelfConditioning:
        return "conditions itself in another way than known here"
    norms = norms_of(model)
    if not norms or any(not {"eps", "with_scale"} <= vars(norm).keys() for norm in norms):
        return "has other norms than known here"
    return None


_APPEND = ("self", "past_key_values", "key_states", "value_states")


def norms_of(model: nn.Module) -> list[nn.Module]:
    """Those that :class:`RMSNorm` can replace, or has replaced."""
    return [x for x in model.modules() if type(x) in (stock.DiffusionGemmaRMSNorm, RMSNorm)]


def swap_norms(model: nn.Module, *, back: bool = False) -> int:
    """Give the norms our class, or transformers' again; how many there are."""
    norms = norms_of(model)
    for norm in norms:
        norm.__class__ = stock.DiffusionGemmaRMSNorm if back else RMSNorm
    return len(norms)


def swap_cache(model: Any, *, back: bool = False) -> int:
    """Let the decoder's layers keep cache and canvas apart, or join them again; how many there are."""
    layers = model.model.decoder.layers
    for layer in layers:
        if back:
            vars(layer.self_attn).pop("append_to_cache", None)
        else:
            layer.self_attn.append_to_cache = types.MethodType(append_to_cache, layer.self_attn)
    return len(layers)


def swap_sampler(model: Any, *, back: bool = False) -> None:
    """Let the model take our denoising steps, or transformers' again."""
    module = model.model.decoder.self_conditioning
    if back:
        vars(model).pop("_denoising_step", None)
        vars(module).pop("signal", None)
        module.__class__ = stock.DiffusionGemmaSelfConditioning
    else:
        model._denoising_step = types.MethodType(denoising_step, model)
        module.__class__ = SelfConditioning
