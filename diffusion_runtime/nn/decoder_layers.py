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


def in_one_call(
    x: Tensor,
    layers: Iterable[DecoderParts | None],
    head_dim: int,
    rotary: tuple[Tensor, Tensor],
    context: AttentionContext,
) -> Tensor | None:
    """What the layers make of ``x``; or None, where they are to be called one by one: on a GPU,
    in 16 bits, with gradients, or where a module has been replaced, hooked or given other arithmetic.

    Args:
        x: ``[batch, length, hidden]``.
        layers: the modules of each, None where a layer is built otherwise.
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
    if len(eps) != 1 or not can_run(x, weights):
        return None
    return decoder_layers(x, weights, keys, head_dim, eps.pop(), rotary)


def _weights_of(parts: DecoderParts, eps: set[float]) -> LayerWeights | None:
    """Of modules that are what they are named; what their norms add goes into ``eps``."""
    norm, query, key, value, query_norm, key_norm, output, ffn_norm, gate, up, down, around = parts
    products, norms = (query, key, value, output, gate, up, down), (norm, ffn_norm, query_norm, key_norm)
    if not all(_is_untouched(module) for module in around):
        return None
    if not all(type(module) is nn.Linear and _is_untouched(module) for module in products):
        return None
    for module in norms:
        if module is not None:
            if type(module) is not LlamaRMSNorm or not _is_untouched(module):
                return None
            eps.add(module.eps)
    if any(_of(module, "bias") is not None for module in products[3:]):
        return None
    of_heads = [None if module is None else _of(module, "weight") for module in (query_norm, key_norm)]
    return LayerWeights._make([
        _of(norm, "weight"), *[_of(module, "weight") for module in products[:3]],
        *[_of(module, "bias") for module in products[:3]], *of_heads, _of(output, "weight"), _of(ffn_norm, "weight"),
        *[_of(module, "weight") for module in products[4:]],
    ])  # fmt: skip


def _of(module: nn.Module, name: str) -> Any:
    """A parameter; as an attribute it takes ten times as long, and there are a dozen in each layer of each forward."""
    return module.__dict__["_parameters"][name]


def _is_untouched(module: nn.Module) -> bool:
    """Whether nothing happens in its call but its forward."""
    own = module.__dict__
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)
