"""LLaDA2.0 and 2.1 (Bie et al., 2025, arXiv 2512.15745): block diffusion over a mixture of experts.

Attention is causal from block to block of 32, counted from the first token, and nothing is shifted; a part of each head
rotates. The first layers are dense. Parameter names are those of the released checkpoints, which descend from Ling.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion_runtime.models._config import BOOKKEEPING, ModelConfig
from diffusion_runtime.models._decoder import Decoder
from diffusion_runtime.nn import AttentionContext, Experts, LlamaRMSNorm, SwiGLU, self_attention


@dataclass(frozen=True)
class LLaDA2Config(ModelConfig):
    """The keys of a LLaDA2 ``config.json``."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int  # of a dense layer
    moe_intermediate_size: int  # of an expert
    num_experts: int
    num_experts_per_tok: int
    vocab_size: int
    rope_theta: float
    num_key_value_heads: int = 0  # 0: num_attention_heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    num_shared_experts: int | None = None
    first_k_dense_replace: int = 0  # how many layers are dense
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    partial_rotary_factor: float = 0.5
    rms_norm_eps: float = 1e-6
    use_qk_norm: bool = True
    use_qkv_bias: bool = False
    use_bias: bool | None = None  # of the attention's output; None: as the checkpoint has it
    tie_word_embeddings: bool = False
    mask_token_id: int = 156895
    block_length: int = 32

    NAME: ClassVar[str] = "LLaDA2"
    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_act": ("silu",),
        "moe_router_enable_expert_bias": (True,),
        "norm_head": (False,),
        "norm_topk_prob": (True,),
        "rope_scaling": (None,),
        "score_function": ("sigmoid",),
        "use_sliding_window": (False,),
    }
    IGNORED: ClassVar[frozenset[str]] = BOOKKEEPING | frozenset(
        "attention_dropout embedding_dropout initializer_range max_position_embeddings max_window_layers "
        "output_dropout output_router_logits router_dtype sliding_window".split()
    )
    MAY_BE_ZERO: ClassVar[frozenset[str]] = ModelConfig.MAY_BE_ZERO | {
        "first_k_dense_replace",
        "num_key_value_heads",
        "num_shared_experts",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_heads(self.num_attention_heads, self.kv_heads, self.head_size)
        self.check_mask_token(self.mask_token_id, self.vocab_size)
        if self.rotary_dim % 2 or self.rotary_dim > self.head_size:
            raise ValueError(f"partial_rotary_factor must leave an even number of elements, got {self.rotary_dim}")
        group_size = self.num_experts // self.n_group
        if self.num_experts % self.n_group or group_size < 2 or self.num_experts_per_tok > self.topk_group * group_size:
            raise ValueError(
                f"num_experts must be a multiple of n_group with at least 2 in each, and topk_group groups must hold "
                f"num_experts_per_tok, got {self.num_experts}, {self.n_group}, {self.topk_group}, "
                f"{self.num_experts_per_tok}"
            )

    def for_tensors(self, names: Collection[str]) -> LLaDA2Config:
        """Released files do not say ``use_bias``, and the class they were written for has another default."""
        if self.use_bias is not None:
            return self
        return replace(self, use_bias=any(name.endswith("attention.dense.bias") for name in names))

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Elements of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """How many elements of a head rotate."""
        return int(self.head_size * self.partial_rotary_factor)


class _Router(nn.Module):
    """Sigmoid scores; the experts are those of the best groups whose score plus bias is highest, weighed without it."""

    expert_bias: Tensor

    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.randn(config.num_experts, config.hidden_size) * config.hidden_size**-0.5)
        self.register_buffer("expert_bias", torch.zeros(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[tokens, dim]`` -> chosen experts ``[tokens, k]`` and their weights, float32."""
        config = self.config
        score = functional.linear(x.float(), self.weight.float()).sigmoid()
        biased = (score + self.expert_bias.float()).unflatten(-1, (config.n_group, -1))
        groups = biased.topk(2).values.sum(-1).topk(config.topk_group).indices
        eligible = torch.zeros_like(biased[..., 0], dtype=torch.bool).scatter(1, groups, value=True)
        best = biased.masked_fill(~eligible[..., None], -torch.inf).flatten(1).topk(config.num_experts_per_tok)
        weight = score.gather(1, best.indices)
        if config.num_experts_per_tok > 1:
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        return best.indices, weight * config.routed_scaling_factor


class _Mixture(nn.Module):
    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__()
        self.gate = _Router(config)
        self.experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size)
        shared = config.num_shared_experts
        self.shared_experts = SwiGLU(config.hidden_size, config.moe_intermediate_size * shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        out: Tensor = self.experts(rows, *self.gate(rows)).unflatten(0, x.shape[:-1])
        return out if self.shared_experts is None else out + self.shared_experts(x)


class _Attention(nn.Module):
    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__()
        self.head_dim = config.head_size
        self.widths = [heads * self.head_dim for heads in (config.num_attention_heads, *2 * [config.kv_heads])]
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.widths), bias=config.use_qkv_bias)
        norms = config.use_qk_norm
        self.query_layernorm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps) if norms else None
        self.key_layernorm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps) if norms else None
        self.dense = nn.Linear(self.widths[0], config.hidden_size, bias=bool(config.use_bias))

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], context: AttentionContext, layer: int) -> Tensor:
        query, key, value = self.query_key_value(x).split(self.widths, -1)
        mixed = self_attention(
            query, key, value, self.head_dim, rotary, context, layer,
            query_norm=self.query_layernorm, key_norm=self.key_layernorm,
        )  # fmt: skip
        out: Tensor = self.dense(mixed)
        return out


class _Layer(nn.Module):
    def __init__(self, config: LLaDA2Config, number: int) -> None:
        super().__init__()
        self.attention = _Attention(config)
        dense = number < config.first_k_dense_replace
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size) if dense else _Mixture(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], context: AttentionContext, layer: int) -> Tensor:
        x = x + self.attention(self.input_layernorm(x), rotary, context, layer)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class LLaDA2(Decoder):
    """Every position sees its own block and those before it."""

    embedding = "word_embeddings"

    def layer(self, number: int) -> nn.Module:
        return _Layer(self.config, number)

    @property
    def block_length(self) -> int:
        """Positions of a block."""
        length: int = self.config.block_length
        return length
