"""The published forward of every family, written plainly: one sequence, one head and one token at a time.

Each takes a dict of float64 tensors under the released names, a ``config.json`` as a dict and ``[length]`` tokens, and
gives ``[length, vocab]`` logits. Nothing here is shared with the package.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

Weights = dict[str, Tensor]
Config = dict[str, object]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: Tensor, theta: float, dim: int) -> Tensor:
    """``[length, head_dim]``: element ``i`` of the first ``dim`` with element ``i + dim / 2``, as complex numbers."""
    angle = torch.arange(len(x), dtype=torch.float64)[:, None] * theta ** (-torch.arange(0, dim, 2).double() / dim)
    turned = torch.complex(x[:, : dim // 2], x[:, dim // 2 : dim]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag, x[:, dim:]), -1)


def attention(heads: list[tuple[Tensor, Tensor, Tensor]], block: int | None) -> Tensor:
    """``(query, key, value)`` of each head, ``[length, head_dim]``, joined: ``[length, heads * head_dim]``."""
    rows = []
    length = len(heads[0][0])
    for i in range(length):
        seen = length if block is None else min(length, (i // block + 1) * block)
        parts = []
        for query, key, value in heads:
            weight = (key[:seen] @ query[i] / math.sqrt(query.shape[-1])).softmax(0)
            parts.append(weight @ value[:seen])
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def grouped_heads(
    query: Tensor, key: Tensor, value: Tensor, kv_heads: int, dim: int, prepare_query, prepare_key
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Cut projections into heads, normalise and rotate them, and pair each query head with its key head."""
    heads = query.shape[1] // dim
    result = []
    for head in range(heads):
        shared = head // (heads // kv_heads)
        own, other = slice(head * dim, (head + 1) * dim), slice(shared * dim, (shared + 1) * dim)
        result.append((prepare_query(query[:, own]), prepare_key(key[:, other]), value[:, other]))
    return result


def swiglu(x: Tensor, weights: Weights, prefix: str) -> Tensor:
    gate, up = x @ weights[f"{prefix}gate_proj.weight"].T, x @ weights[f"{prefix}up_proj.weight"].T
    return (gate * gate.sigmoid() * up) @ weights[f"{prefix}down_proj.weight"].T


def llada(weights: Weights, config: Config, tokens: Tensor) -> Tensor:
    def w(name: str) -> Tensor:
        return weights[f"model.transformer.{name}.weight"]

    eps, theta = config["rms_norm_eps"], config["rope_theta"]
    dim = config["d_model"] // config["n_heads"]
    x = w("wte")[tokens]
    for layer in range(config["n_layers"]):
        name = f"blocks.{layer}."
        h = rms_norm(x, w(name + "attn_norm"), eps)
        q, k, v = (h @ w(name + p).T for p in ("q_proj", "k_proj", "v_proj"))
        turn = [lambda head: rotate(head, theta, dim)] * 2
        mixed = attention(grouped_heads(q, k, v, config["n_kv_heads"], dim, *turn), None)
        x = x + mixed @ w(name + "attn_out").T
        h = rms_norm(x, w(name + "ff_norm"), eps)
        gate = h @ w(name + "ff_proj").T
        x = x + (gate * gate.sigmoid() * (h @ w(name + "up_proj").T)) @ w(name + "ff_out").T
    return (rms_norm(x, w("ln_f"), eps) @ w("ff_out").T)[:, : config["vocab_size"]]


def decoder(weights: Weights, config: Config, tokens: Tensor) -> Tensor:
    """Dream, Fast-dLLM v2, SDAR and LLaDA-MoE: what they differ in shows in their tensors."""
    eps, theta = config["rms_norm_eps"], config["rope_theta"]
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    block = config.get("block_size") or config.get("bd_size")
    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        h = rms_norm(x, weights[name + "input_layernorm.weight"], eps)
        projected = [
            h @ weights[f"{name}self_attn.{p}_proj.weight"].T + weights.get(f"{name}self_attn.{p}_proj.bias", 0)
            for p in "qkv"
        ]
        norms = [weights.get(f"{name}self_attn.{p}_norm.weight") for p in "qk"]
        prepare = [lambda head, w=w: rotate(head if w is None else rms_norm(head, w, eps), theta, dim) for w in norms]
        mixed = attention(grouped_heads(*projected, config["num_key_value_heads"], dim, *prepare), block)
        x = x + mixed @ weights[name + "self_attn.o_proj.weight"].T
        h = rms_norm(x, weights[name + "post_attention_layernorm.weight"], eps)
        if name + "mlp.gate.weight" not in weights:
            x = x + swiglu(h, weights, name + "mlp.")
            continue
        mixed = []
        for row in h:
            probability = (weights[name + "mlp.gate.weight"] @ row).softmax(0)
            best = probability.argsort(descending=True)[: config["num_experts_per_tok"]].tolist()
            share = probability[best] / (probability[best].sum() if config.get("norm_topk_prob") else 1)
            outs = [swiglu(row, weights, f"{name}mlp.experts.{e}.") for e in best]
            mixed.append(sum(s * out for s, out in zip(share, outs, strict=True)))
        x = x + torch.stack(mixed)
    h = rms_norm(x, weights["model.norm.weight"], eps)
    return h @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


def llada2(weights: Weights, config: Config, tokens: Tensor) -> Tensor:
    eps, theta, dim = config["rms_norm_eps"], config["rope_theta"], config["head_dim"]
    kv_heads, wide = config["num_key_value_heads"], config["num_attention_heads"] * config["head_dim"]
    turning = int(dim * config["partial_rotary_factor"])
    x = weights["model.word_embeddings.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        h = rms_norm(x, weights[name + "input_layernorm.weight"], eps)
        qkv = h @ weights[name + "attention.query_key_value.weight"].T
        q, k, v = qkv[:, :wide], qkv[:, wide : wide + kv_heads * dim], qkv[:, wide + kv_heads * dim :]
        norms = [weights[f"{name}attention.{p}_layernorm.weight"] for p in ("query", "key")]
        prepare = [lambda head, w=w: rotate(rms_norm(head, w, eps), theta, turning) for w in norms]
        mixed = attention(grouped_heads(q, k, v, kv_heads, dim, *prepare), 32)
        bias = weights.get(name + "attention.dense.bias", 0)
        x = x + mixed @ weights[name + "attention.dense.weight"].T + bias
        h = rms_norm(x, weights[name + "post_attention_layernorm.weight"], eps)
        if layer < config["first_k_dense_replace"]:
            x = x + swiglu(h, weights, name + "mlp.")
            continue
        mixed = []
        for row in h:
            score = (weights[name + "mlp.gate.weight"] @ row).sigmoid()
            biased = (score + weights[name + "mlp.gate.expert_bias"]).tolist()
            size = len(biased) // config["n_group"]
            groups = [biased[i : i + size] for i in range(0, len(biased), size)]
            order = sorted(range(len(groups)), key=lambda g: -sum(sorted(groups[g])[-2:]))[: config["topk_group"]]
            eligible = [e for e in range(len(biased)) if e // size in order]
            best = sorted(eligible, key=lambda e: -biased[e])[: config["num_experts_per_tok"]]
            share = score[best] / (score[best].sum() + 1e-20) * config["routed_scaling_factor"]
            outs = [swiglu(row, weights, f"{name}mlp.experts.{e}.") for e in best]
            mixed.append(sum(s * out for s, out in zip(share, outs, strict=True)))
        x = x + torch.stack(mixed) + swiglu(h, weights, name + "mlp.shared_experts.")
    return rms_norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def dit(weights: Weights, config: Config, tokens: Tensor, sigma: float = 0.0) -> Tensor:
    """MDLM and BD3LM."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"backbone.{name}.weight"].T + weights.get(f"backbone.{name}.bias", 0)

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"backbone.{name}.weight"]

    def knobs(name: str, count: int) -> list[Tensor]:
        if f"backbone.{name}.adaLN_modulation.weight" not in weights:
            return [torch.zeros(())] * 2 + [torch.ones(())] + [torch.zeros(())] * 2 + [torch.ones(())]
        return list(linear(condition, f"{name}.adaLN_modulation").chunk(count))

    angle = sigma * torch.exp(-math.log(10_000) * torch.arange(128).double() / 128)
    if "backbone.sigma_map.mlp.0.weight" in weights:
        level = functional.silu(linear(torch.cat((angle.cos(), angle.sin())), "sigma_map.mlp.0"))
        condition = functional.silu(linear(level, "sigma_map.mlp.2"))
    dim = config["hidden_dim"] // config["n_heads"]
    x = weights["backbone.vocab_embed.embedding"][tokens]
    for layer in range(config["n_blocks"]):
        name = f"blocks.{layer}"
        shift1, scale1, gate1, shift2, scale2, gate2 = knobs(name, 6)
        h = norm(x, name + ".norm1") * (1 + scale1) + shift1
        turn = [lambda head: rotate(head, 10_000.0, dim)] * 2
        heads = grouped_heads(*linear(h, name + ".attn_qkv").chunk(3, -1), config["n_heads"], dim, *turn)
        x = x + gate1 * linear(attention(heads, config.get("block_size")), name + ".attn_out")
        h = linear(norm(x, name + ".norm2") * (1 + scale2) + shift2, name + ".mlp.0")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + gate2 * linear(h, name + ".mlp.2")
    shift, scale, *_ = knobs("output_layer", 2)
    return linear(norm(x, "output_layer.norm_final") * (1 + scale) + shift, "output_layer.linear")
