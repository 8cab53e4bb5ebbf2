"""The layers of a decoder in one call, where its modules are nothing but what they are named."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from diffusion_runtime.nn.attention_context import AttentionContext
from diffusion_runtime.nn.norm import LlamaRMSNorm
from diffusion_runtime.ops._decoder_layers import LayerWeights, can_run, decoder_layers


class DecoderParts(NamedTuple):
    """The modules of a layer: ``x + output(attention(norm(x)))``, then ``+ down(silu(gate) * up)`` of its norm."""

    norm: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    query_norm: nn.Module | None  # or neither
    key_norm: nn.Module | None
    output: nn.Module
    ffn_norm: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module
    around: tuple[nn.Module, ...]  # what calls these


def run_layers(
    x: Tensor,
    layers: nn.ModuleList,
    kind: type[Any],
    norm: nn.Module,
    head_dim: int,
    rotary: tuple[Tensor, Tensor],
    context: AttentionContext,
) -> Tensor:
    """``x`` through the layers and the norm behind them: in one call where nobody could tell, else one by one.

    Args:
        kind: the class whose ``parts()`` are all that its layers do; where one is of another, all are called.

    The others are those of :func:`in_one_call`.
    """
    modules: list[Any] = list(layers)
    parts = (module.parts() if type(module) is kind else None for module in modules)
    found = in_one_call(x, parts, norm, head_dim, rotary, context)
    if found is not None:
        return found
    for number, module in enumerate(modules):
        x = module(x, rotary, context, number)
    out: Tensor = norm(x)
    return out


def in_one_call(
    x: Tensor,
    layers: Iterable[DecoderParts | None],
    norm: nn.Module,
    head_dim: int,
    rotary: tuple[Tensor, Tensor],
    context: AttentionContext,
) -> Tensor | None:
    """What the layers and the norm behind them make of ``x``; or None, where they are to be called one by one: on a
    GPU, in 16 bits, with gradients, or where a module has been replaced, hooked or given other arithmetic.

    Args:
        x: ``[batch, length, hidden]``.
        layers: the modules of each, None where a layer is built otherwise.
        norm: of their result.
        head_dim: of each head.
        rotary, context: as :func:`diffusion_runtime.nn.self_attention` takes them.
    """
    if torch.compiler.is_compiling() or not x.is_cpu or _has_any_global_hook():
        return None
    keys = context.layer_keys()
    if keys is None:
        return None
    weights: list[LayerWeights] = []
    eps: set[float] = set()
    for parts in layers:
        found = None if parts is None else _weights_of(parts, eps)
        if found is None:
            return None
        weights.append(found)
    if type(norm) is not LlamaRMSNorm or not _is_untouched(norm) or eps != {norm.eps}:
        return None
    last = norm.weight
    return decoder_layers(x, weights, last, keys, head_dim, norm.eps, rotary) if can_run(x, weights, last) else None


def _weights_of(parts: DecoderParts, eps: set[float]) -> LayerWeights | None:
    """Of modules that are what they are named; what their norms add goes into ``eps``."""
    if not all(map(_is_untouched, parts.around)):
        return None
    found: list[dict[str, Any]] = []  # read as attributes, weights take ten times as long, a dozen in each layer
    for module, kind in zip(parts[:-1], _KINDS, strict=True):
        if module is None:
            found.append(_NOTHING)
        elif type(module) is not kind or not _is_untouched(module):
            return None
        else:
            found.append(module.__dict__["_parameters"])
            if kind is LlamaRMSNorm:
                eps.add(module.__dict__["eps"])
    norm, query, key, value, query_norm, key_norm, output, ffn_norm, gate, up, down = found
    if any(of["bias"] is not None for of in (output, gate, up, down)):
        return None
    return LayerWeights(
        norm["weight"], query["weight"], key["weight"], value["weight"], query["bias"], key["bias"], value["bias"],
        query_norm["weight"], key_norm["weight"], output["weight"], ffn_norm["weight"], gate["weight"], up["weight"],
        down["weight"],
    )  # fmt: skip


def _is_untouched(module: nn.Module) -> bool:
    """Whether nothing happens in its call but its forward."""
    own = module.__dict__
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)


_KINDS = (LlamaRMSNorm, *[nn.Linear] * 3, *[LlamaRMSNorm] * 2, nn.Linear, LlamaRMSNorm, *[nn.Linear] * 3)
_NOTHING: dict[str, Any] = {"weight": None}
