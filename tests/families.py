"""A tiny checkpoint of every family in the released format: the keys of its ``config.json`` and its tensors' names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import plain_models
import torch
from safetensors.torch import save_file
from torch import Tensor

VOCAB = 61
MASK = 60


class Family(NamedTuple):
    config: dict[str, object]  # of a config.json, with the released keys and small sizes
    shapes: dict[str, tuple[int, ...]]  # of the tensors, under the released names
    forward: Callable[..., Tensor]  # of plain_models

    def logits(self, weights: dict[str, Tensor], tokens: Tensor, **more: float) -> Tensor:
        """Of one sequence: ``[length, vocab]``, computed in float64, as float32."""
        wide = {name: x.double() for name, x in weights.items()}
        return self.forward(wide, self.config, tokens, **more).float()


def _decoder(
    *, layers: int = 2, width: int = 32, heads: int = 4, kv_heads: int = 2, head_dim: int = 8, hidden: int = 40,
    qkv_bias: bool = False, qk_norm: bool = False, experts: int = 0, tied: bool = False,
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, width),
        "model.norm.weight": (width,),
    }
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, width)
    for layer in range(layers):
        name = f"model.layers.{layer}."
        for p, rows in (("q", heads * head_dim), ("k", kv_heads * head_dim), ("v", kv_heads * head_dim)):
            shapes[f"{name}self_attn.{p}_proj.weight"] = (rows, width)
            if qkv_bias:
                shapes[f"{name}self_attn.{p}_proj.bias"] = (rows,)
        shapes[name + "self_attn.o_proj.weight"] = (width, heads * head_dim)
        if qk_norm:
            shapes |= {f"{name}self_attn.{p}_norm.weight": (head_dim,) for p in "qk"}
        shapes |= {f"{name}{p}_layernorm.weight": (width,) for p in ("input", "post_attention")}
        shapes |= _feed_forward(name + "mlp.", width, hidden, experts)
    return shapes


def _feed_forward(prefix: str, width: int, hidden: int, experts: int) -> dict[str, tuple[int, ...]]:
    one = {"gate_proj.weight": (hidden, width), "up_proj.weight": (hidden, width), "down_proj.weight": (width, hidden)}
    if not experts:
        return {prefix + name: shape for name, shape in one.items()}
    many = {f"{prefix}experts.{e}.{name}": shape for e in range(experts) for name, shape in one.items()}
    return many | {prefix + "gate.weight": (experts, width)}


def _llada() -> dict[str, tuple[int, ...]]:
    block = {
        "attn_norm": (32,), "q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "attn_out": (32, 32),
        "ff_norm": (32,), "ff_proj": (40, 32), "up_proj": (40, 32), "ff_out": (32, 40),
    }  # fmt: skip
    outside = {"wte": (64, 32), "ff_out": (64, 32), "ln_f": (32,)}
    named = outside | {f"blocks.{layer}.{name}": shape for layer in range(2) for name, shape in block.items()}
    return {f"model.transformer.{name}.weight": shape for name, shape in named.items()}


def _llada2(*, bias: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.word_embeddings.weight": (VOCAB, 32), "model.norm.weight": (32,), "lm_head.weight": (VOCAB, 32),
    }  # fmt: skip
    for layer in range(2):
        name = f"model.layers.{layer}."
        shapes |= {
            name + "attention.query_key_value.weight": ((4 + 2 + 2) * 16, 32),
            name + "attention.dense.weight": (32, 64),
            **{f"{name}attention.{p}_layernorm.weight": (16,) for p in ("query", "key")},
            **{f"{name}{p}_layernorm.weight": (32,) for p in ("input", "post_attention")},
            **_feed_forward(name + "mlp.", 32, 24 if layer else 40, 8 if layer else 0),
        }
        if bias:
            shapes[name + "attention.dense.bias"] = (32,)
    shapes["model.layers.1.mlp.gate.expert_bias"] = (8,)
    return shapes | _feed_forward("model.layers.1.mlp.shared_experts.", 32, 24, 0)


def _dit(*, adaln: bool = True) -> dict[str, tuple[int, ...]]:
    width, cond = 32, 16
    layer = {
        "norm1.weight": (width,), "attn_qkv.weight": (3 * width, width), "attn_out.weight": (width, width),
        "norm2.weight": (width,), "mlp.0.weight": (4 * width, width), "mlp.0.bias": (4 * width,),
        "mlp.2.weight": (width, 4 * width), "mlp.2.bias": (width,),
    }  # fmt: skip
    outside = {
        "vocab_embed.embedding": (VOCAB, width), "rotary_emb.inv_freq": (4,),
        "output_layer.norm_final.weight": (width,), "output_layer.linear.weight": (VOCAB, width),
        "output_layer.linear.bias": (VOCAB,),
    }  # fmt: skip
    if adaln:
        layer |= {"adaLN_modulation.weight": (6 * width, cond), "adaLN_modulation.bias": (6 * width,)}
        outside |= {
            "output_layer.adaLN_modulation.weight": (2 * width, cond),
            "output_layer.adaLN_modulation.bias": (2 * width,),
            "sigma_map.mlp.0.weight": (cond, 256), "sigma_map.mlp.0.bias": (cond,),
            "sigma_map.mlp.2.weight": (cond, cond), "sigma_map.mlp.2.bias": (cond,),
        }  # fmt: skip
    named = outside | {f"blocks.{number}.{name}": shape for number in range(2) for name, shape in layer.items()}
    return {f"backbone.{name}": shape for name, shape in named.items()}


_QWEN: dict[str, object] = {
    "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 1, "hidden_act": "silu", "hidden_size": 32,
    "initializer_range": 0.02, "intermediate_size": 40, "max_position_embeddings": 64, "max_window_layers": 2,
    "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
    "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.52.4", "use_cache": False, "use_sliding_window": False,
    "vocab_size": VOCAB, "mask_token_id": MASK,
}  # fmt: skip
_SDAR = _QWEN | {
    "architectures": ["SDARForCausalLM"], "attention_bias": False, "attn_implementation": "flex_attention",
    "block_size": 4, "debug": False, "ep_size": 1, "fuse_cross_entropy": True, "head_dim": 16,
    "micro_forward": False, "model_type": "sdar", "skip_checkpoint": False, "use_deepep": False,
}  # fmt: skip
_LLADA2: dict[str, object] = {
    "dtype": "bfloat16", "first_k_dense_replace": 1, "head_dim": 16, "hidden_act": "silu", "hidden_size": 32,
    "initializer_range": 0.02, "intermediate_size": 40, "max_position_embeddings": 64, "model_type": "llada2_moe",
    "moe_intermediate_size": 24, "moe_router_enable_expert_bias": True, "n_group": 4, "norm_head": False,
    "norm_topk_prob": True, "num_attention_heads": 4, "num_experts": 8, "num_experts_per_tok": 3,
    "num_hidden_layers": 2, "num_key_value_heads": 2, "num_shared_experts": 1, "output_router_logits": False,
    "pad_token_id": 1, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-6, "rope_theta": 600000,
    "routed_scaling_factor": 2.5, "score_function": "sigmoid", "tie_word_embeddings": False, "topk_group": 2,
    "use_qk_norm": True, "use_qkv_bias": False, "vocab_size": VOCAB, "mask_token_id": MASK,
}  # fmt: skip
_DIT: dict[str, object] = {
    "architectures": ["MDLM"], "auto_map": {}, "cond_dim": 16, "dropout": 0.1, "hidden_dim": 32, "model_length": 64,
    "model_type": "mdlm", "n_blocks": 2, "n_heads": 4, "return_dict": False, "time_conditioning": False,
    "torch_dtype": "float32", "vocab_size": VOCAB,
}  # fmt: skip
_BD3LM = _DIT | {
    "adaln": True, "attn_backend": "sdpa", "block_size": 4, "causal": False, "cross_attn": True, "model_type": "bd3lm",
    "sampling_eps_max": 0.999, "sampling_eps_min": 0.001, "var_min": True,
}  # fmt: skip

FAMILIES = {
    "LLaDA": Family(
        {
            "activation_type": "silu", "alibi": False, "block_type": "llama", "d_model": 32, "embedding_size": 64,
            "include_bias": False, "include_qkv_bias": False, "layer_norm_type": "rms", "mask_token_id": MASK,
            "max_sequence_length": 64, "mlp_hidden_size": 40, "mlp_ratio": 4, "model_type": "llada", "n_heads": 4,
            "n_kv_heads": 2, "n_layers": 2, "rms_norm_eps": 1e-5, "rope": True, "rope_full_precision": True,
            "rope_theta": 500000.0, "scale_logits": False, "vocab_size": VOCAB, "weight_tying": False,
        },
        _llada(),
        plain_models.llada,
    ),
    "LLaDA-MoE": Family(
        {name: value for name, value in _QWEN.items() if name != "intermediate_size"} | {
            "architectures": ["LLaDAMoEModelLM"], "attention_bias": False, "clip_qkv": None,
            "dense_intermediate_size": 8192, "expert_intermediate_size": 40, "model_type": "llada",
            "moe_layer_freq": [1, 1], "moe_router_enable_expert_bias": False, "moe_router_score_function": "softmax",
            "norm_topk_prob": None, "num_experts": 5, "num_experts_per_tok": 2, "num_key_value_heads": 4,
            "output_router_logits": False, "partial_rotary_factor": 1, "qk_layernorm": True, "rms_norm_eps": 1e-5,
            "rope_theta": 50000, "routed_scaling_factor": 1, "router_aux_loss_coef": 0.01, "router_num_group": None,
            "router_topk_group": None, "shared_expert_intermediate_size": None,
        },
        _decoder(kv_heads=4, qk_norm=True, experts=5),
        plain_models.decoder,
    ),
    "LLaDA2": Family(_LLADA2, _llada2(bias=False), plain_models.llada2),
    "LLaDA2 with a bias that its config does not say": Family(_LLADA2, _llada2(bias=True), plain_models.llada2),
    "Dream": Family(_QWEN | {"model_type": "Dream"}, _decoder(qkv_bias=True), plain_models.decoder),
    "Fast-dLLM v2": Family(
        _QWEN | {"bd_size": 8, "layer_types": 2 * ["full_attention"], "model_type": "Fast_dLLM_Qwen"},
        _decoder(qkv_bias=True),
        plain_models.decoder,
    ),
    "SDAR": Family(_SDAR, _decoder(head_dim=16, qk_norm=True), plain_models.decoder),
    "SDAR, tied": Family(
        _SDAR | {"tie_word_embeddings": True}, _decoder(head_dim=16, qk_norm=True, tied=True), plain_models.decoder
    ),
    "SDAR-MoE": Family(
        _SDAR | {
            "decoder_sparse_step": 1, "mlp_only_layers": [], "model_type": "sdar_moe", "moe_intermediate_size": 24,
            "norm_topk_prob": True, "num_experts": 5, "num_experts_per_tok": 2, "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        },
        _decoder(head_dim=16, qk_norm=True, hidden=24, experts=5),
        plain_models.decoder,
    ),
    "MDLM": Family(_DIT, _dit(), plain_models.dit),
    "MDLM with time conditioning": Family(_DIT | {"time_conditioning": True}, _dit(), plain_models.dit),
    "BD3LM": Family(_BD3LM, _dit() | {"sampling_eps_max": (), "sampling_eps_min": ()}, plain_models.dit),
    "BD3LM with time conditioning": Family(_BD3LM | {"time_conditioning": True}, _dit(), plain_models.dit),
    "BD3LM without adaLN": Family(_BD3LM | {"adaln": False}, _dit(adaln=False), plain_models.dit),
}  # fmt: skip


def random_weights(family: Family, seed: int = 0) -> dict[str, Tensor]:
    """Weights that make attention, routers and gates matter."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in family.shapes.items():
        noise = torch.randn(shape, generator=generator)
        norm = "norm" in name and len(shape) == 1
        scale = 1.0 if len(shape) < 2 else 1.5 * shape[-1] ** -0.5
        weights[name] = 1 + 0.2 * noise if norm else (0.3 if len(shape) < 2 else scale) * noise
    return weights


def write_checkpoint(folder: Path, family: Family, weights: dict[str, Tensor], *, shards: int = 3) -> Path:
    """Write a folder as it is released: ``config.json``, shards and their index."""
    (folder / "config.json").write_text(json.dumps(family.config))
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: names[i % shards] for i, name in enumerate(weights)}
    for file in names:
        save_file({name: weights[name] for name in weights if weight_map[name] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
