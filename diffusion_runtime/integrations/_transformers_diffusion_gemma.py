"""DiffusionGemma of transformers: its decoder's keys in two segments, and its norms and rotations in one pass."""

from __future__ import annotations

import inspect
import types
from typing import Any

from torch import Tensor, nn
from transformers.models.diffusion_gemma import modeling_diffusion_gemma as stock

from diffusion_runtime import ops
from diffusion_runtime.integrations import _transformers_heads as heads
from diffusion_runtime.integrations._transformers_cache import append_to_cache, decoder_masks, is_ours
from diffusion_runtime.integrations._transformers_denoising_step import PARAMETERS, SelfConditioning, denoising_step
from diffusion_runtime.integrations._transformers_step_graphs import StepGraphs, cuda_graphs


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
    for layer in attention_layers(model):
        eps = {getattr(getattr(layer, name, None), "eps", None) for name in ("q_norm", "k_norm")}
        if _parameters(getattr(type(layer), "forward", None)) != heads.PARAMETERS or len(eps) != 1 or None in eps:
            return "normalises and rotates its heads in another way than known here"
    if _parameters(getattr(model.model.decoder, "create_diffusion_decoder_attention_mask", None)) != _MASKS:
        return "makes its decoder's masks in another way than known here"
    if _parameters(getattr(model, "_compile_functions", None)) != _COMPILE:
        return "compiles its parts in another way than known here"
    if _parameters(getattr(type(model), "_denoising_step", None))[: len(PARAMETERS)] != PARAMETERS:
        return "takes its denoising steps in another way than known here"
    if type(getattr(model.model.decoder, "self_conditioning", None)) is not stock.DiffusionGemmaSelfConditioning:
        return "conditions itself in another way than known here"
    norms = norms_of(model)
    if not norms or any(not {"eps", "with_scale"} <= vars(norm).keys() for norm in norms):
        return "has other norms than known here"
    return None


def _parameters(function: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters) if callable(function) else ()


_APPEND = ("self", "past_key_values", "key_states", "value_states")
_MASKS = ("config", "inputs_embeds", "past_key_values", "decoder_attention_mask")
_COMPILE = ("sampler", "diffusion_stopping_criteria")


def norms_of(model: nn.Module) -> list[nn.Module]:
    """Those that :class:`RMSNorm` can replace, or has replaced."""
    return [x for x in model.modules() if type(x) in (stock.DiffusionGemmaRMSNorm, RMSNorm)]


def attention_layers(model: Any) -> list[Any]:
    """Of the encoder and of the decoder."""
    return [
        getattr(layer, "self_attn", None)
        for part in (model.model.encoder.language_model, model.model.decoder)
        for layer in part.layers
    ]


def swap_heads(model: Any, *, back: bool = False) -> int:
    """Let attention layers normalise and rotate in one pass, or as transformers does again; how many there are."""
    layers = attention_layers(model)
    for layer in layers:
        if back:
            vars(layer).pop("forward", None)
        else:
            layer.forward = types.MethodType(heads.forward, layer)
    return len(layers)


def swap_norms(model: nn.Module, *, back: bool = False) -> int:
    """Give the norms our class, or transformers' again; how many there are."""
    norms = norms_of(model)
    for norm in norms:
        norm.__class__ = stock.DiffusionGemmaRMSNorm if back else RMSNorm
    return len(norms)


def swap_cache(model: Any, *, back: bool = False) -> int:
    """Let the decoder's layers keep cache and canvas apart, or join them again; how many there are."""
    decoder = model.model.decoder
    if back:
        vars(model).pop("_compile_functions", None)
        vars(decoder).pop("create_diffusion_decoder_attention_mask", None)
    else:
        model._compile_functions = types.MethodType(leave_uncompiled, model)
        decoder.create_diffusion_decoder_attention_mask = decoder_masks
    for layer in decoder.layers:
        if back:
            vars(layer.self_attn).pop("append_to_cache", None)
        else:
            layer.self_attn.append_to_cache = types.MethodType(append_to_cache, layer.self_attn)
    return len(decoder.layers)


def leave_uncompiled(self: Any, sampler: Any, diffusion_stopping_criteria: Any) -> tuple[Any, Any, Any, Any]:
    """In place of ``_compile_functions``, which a static cache calls: the same functions, as they are.

    Compiled, they keep the sampler of the first call for ever, and a window that moves would compile them anew.
    """
    if not is_ours(self.config):
        compiled: tuple[Any, Any, Any, Any] = type(self)._compile_functions(self, sampler, diffusion_stopping_criteria)
        return compiled
    return self.model.encoder, self.forward, sampler, diffusion_stopping_criteria


def swap_sampler(model: Any, *, back: bool = False) -> None:
    """Let the model take our denoising steps, or transformers' again."""
    module = model.model.decoder.self_conditioning
    if back:
        vars(model).pop("_denoising_step", None)
        vars(model).pop("_step_graphs", None)
        vars(module).pop("signal", None)
        module.__class__ = stock.DiffusionGemmaSelfConditioning
    else:
        model._denoising_step = types.MethodType(denoising_step, model)
        module.__class__ = SelfConditioning


def add_graphs(model: Any, *, required: bool) -> None:
    """Let our denoising steps be recorded and replayed; :func:`swap_sampler` takes it back."""
    model._step_graphs = StepGraphs(cuda_graphs(), required=required)
