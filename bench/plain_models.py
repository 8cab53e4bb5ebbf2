"""Models as plain torch writes them: the weights of ours, torch's own attention, all logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from diffusion_runtime.models import SDAR, LLaDA

Past = list[tuple[Tensor, Tensor]]  # keys and values of each layer


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: Tensor, theta: float, start: int = 0) -> Tensor:
    """``[..., length, head_dim]``, at positions from ``start``."""
    length, head_dim = x.shape[-2:]
    frequency = theta ** -(torch.arange(0, head_dim, 2, device=x.device).float() / head_dim)
    angle = torch.outer(torch.arange(start, start + length, device=x.device).float(), frequency).repeat(1, 2)
    first, second = x.float().chunk(2, -1)
    return (x.float() * angle.cos() + torch.cat((-second, first), -1) * angle.sin()).to(x.dtype)


def llada(model: LLaDA) -> Callable[..., Tensor]:
    """``[batch, length]`` tokens to ``[batch, length, vocab]`` logits.

    Behind a ``past`` the tokens follow it. With ``keep`` they are added to it.
    """
    config = model.config
    weights = {name.removeprefix("model.transformer."): weight for name, weight in model.state_dict().items()}

    @torch.no_grad()
    def forward(tokens: Tensor, past: Past | None = None, keep: bool = False) -> Tensor:
        x = functional.embedding(tokens, weights["wte.weight"])
        start = past[0][0].shape[2] if past else 0
        grown: Past = []
        for layer in range(config.n_layers):
            own = {name: weights[f"blocks.{layer}.{name}.weight"] for name in _LLADA_LAYER}
            h = rms_norm(x, own["attn_norm"], config.rms_norm_eps)
            query, key, value = (
                functional.linear(h, own[p]).unflatten(-1, (-1, config.head_size)).transpose(1, 2)
                for p in ("q_proj", "k_proj", "v_proj")
            )
            query, key = rotate(query, config.rope_theta, start), rotate(key, config.rope_theta, start)
            if past:
                key, value = (torch.cat(pair, 2) for pair in zip(past[layer], (key, value), strict=True))
            grown.append((key, value))
            mixed = functional.scaled_dot_product_attention(
                query, key, value, enable_gqa=config.kv_heads < config.n_heads
            )
            x = x + functional.linear(mixed.transpose(1, 2).flatten(2), own["attn_out"])
            h = rms_norm(x, own["ff_norm"], config.rms_norm_eps)
            gated = functional.silu(functional.linear(h, own["ff_proj"])) * functional.linear(h, own["up_proj"])
            x = x + functional.linear(gated, own["ff_out"])
        if past is not None and keep:
            past[:] = grown
        return functional.linear(rms_norm(x, weights["ln_f.weight"], config.rms_norm_eps), weights["ff_out.weight"])

    return forward


_LLADA_LAYER = ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out")


def sdar(model: SDAR) -> Callable[..., Tensor]:
    """``[batch, length]`` tokens to logits, by a mask from block to block.

    Behind a ``past`` the tokens are one block, which needs no mask. With ``keep`` they are added to it.
    """
    config, block = model.config, model.block_length
    weights = dict(model.state_dict())

    @torch.no_grad()
    def forward(tokens: Tensor, past: Past | None = None, keep: bool = False) -> Tensor:
        x = functional.embedding(tokens, weights["model.embed_tokens.weight"])
        start = past[0][0].shape[2] if past else 0
        number = torch.arange(tokens.shape[1], device=tokens.device) // block
        mask = None if past else number <= number[:, None]
        grown: Past = []
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            own = {
                name.removeprefix(prefix).removesuffix(".weight"): weight
                for name, weight in weights.items()
                if name.startswith(prefix)
            }
            h = rms_norm(x, own["input_layernorm"], config.rms_norm_eps)
            query, key, value = (
                functional.linear(h, own[f"self_attn.{p}_proj"]).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
                for p in "qkv"
            )
            query = rotate(rms_norm(query, own["self_attn.q_norm"], config.rms_norm_eps), config.rope_theta, start)
            key = rotate(rms_norm(key, own["self_attn.k_norm"], config.rms_norm_eps), config.rope_theta, start)
            if past:
                key, value = (torch.cat(pair, 2) for pair in zip(past[layer], (key, value), strict=True))
            grown.append((key, value))
            mixed = functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                enable_gqa=config.num_key_value_heads < config.num_attention_heads,
            )
            x = x + functional.linear(mixed.transpose(1, 2).flatten(2), own["self_attn.o_proj"])
            h = rms_norm(x, own["post_attention_layernorm"], config.rms_norm_eps)
            gate, up = (functional.linear(h, own[f"mlp.{p}_proj"]) for p in ("gate", "up"))
            x = x + functional.linear(functional.silu(gate) * up, own["mlp.down_proj"])
        if past is not None and keep:
            past[:] = grown
        x = rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)
        return functional.linear(x, weights["lm_head.weight"])

    return forward
