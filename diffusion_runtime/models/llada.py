"""LLaDA (Nie et al., 2025, arXiv 2502.09992): a Llama-like transformer whose attention sees both ways.

Parameter names and ``config.json`` keys are those of the released checkpoints (GSAI-ML/LLaDA-8B-*, LLaDA-1.5), which
descend from OLMo, so a released file loads without renaming.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional

from diffusion_runtime.models._config import BOOKKEEPING, ModelConfig
from diffusion_runtime.models._language_model import Head, KeyShape, LanguageModel
from diffusion_runtime.nn import AttentionContext, LlamaRMSNorm, self_attention
from diffusion_runtime.nn.decoder_layers import DecoderParts, run_layers


@dataclass(frozen=True)
class LLaDAConfig(ModelConfig):
    """The sizes of a LLaDA model, under the names of its ``config.json``."""

    d_model: int
    n_layers: int
    n_heads: int
    mlp_hidden_size: int
    vocab_size: int
    mask_token_id: int
    n_kv_heads: int | None = None  # None: n_heads
    embedding_size: int | None = None  # rows of the embedding and of the head; None: vocab_size
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    weight_tying: bool = False

    NAME: ClassVar[str] = "LLaDA"
    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "activation_type": ("silu",),
        "alibi": (False,),
        "attention_layer_norm": (False,),
        "bias_for_layer_norm": (False,),
        "block_type": ("llama",),
        "clip_qkv": (None,),
        "include_bias": (False,),
        "include_qkv_bias": (False,),
        "input_emb_norm": (False,),
        "layer_norm_type": ("rms",),
        "layer_norm_with_affine": (True,),
        "multi_query_attention": (None,),
        "rope": (True,),
        "rope_full_precision": (True,),
        "scale_logits": (False,),
    }
    IGNORED: ClassVar[frozenset[str]] = BOOKKEEPING | frozenset(
        "alibi_bias_max attention_dropout attention_layer_norm_with_affine block_group_size embedding_dropout "
        "flash_attention init_cutoff_factor init_device init_fn init_std max_sequence_length mlp_ratio precision "
        "residual_dropout".split()
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        heads, kv_heads = self.n_heads, self.kv_heads
        if self.d_model % heads or self.d_model // heads % 2 or heads % kv_heads:
            raise ValueError(
                f"d_model must be n_heads times an even head size and n_kv_heads must divide n_heads, "
                f"got d_model {self.d_model}, n_heads {heads}, n_kv_heads {kv_heads}"
            )
        self.check_mask_token(self.mask_token_id, self.embedding_size or self.vocab_size)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_kv_heads or self.n_heads

    @property
    def head_size(self) -> int:
        """Elements of a head."""
        return self.d_model // self.n_heads


class _Block(nn.Module):
    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        width, hidden = config.d_model, config.mlp_hidden_size
        self.head_dim = config.head_size
        kv_width = config.head_size * config.kv_heads
        self.attn_norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.ff_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.ff_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], context: AttentionContext, layer: int) -> Tensor:
        normed = self.attn_norm(x)
        projections = (self.q_proj(normed), self.k_proj(normed), self.v_proj(normed))
        x = x + self.attn_out(self_attention(*projections, self.head_dim, rotary, context, layer))
        normed = self.ff_norm(x)
        out: Tensor = x + self.ff_out(functional.silu(self.ff_proj(normed)) * self.up_proj(normed))
        return out

    def parts(self) -> DecoderParts:
        own: Any = self._modules
        query, key, value = (own[f"{name}_proj"] for name in "qkv")
        return DecoderParts(
            own["attn_norm"], query, key, value, None, None, own["attn_out"], own["ff_norm"], own["ff_proj"],
            own["up_proj"], own["ff_out"], around=(self,),
        )  # fmt: skip


class LLaDA(LanguageModel):
    """Every position sees all others; nothing is shifted.

    Args:
        config: sizes. Weights are PyTorch's defaults until loaded (:func:`diffusion_runtime.loading.load`).
    """

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        embedding_size = config.embedding_size or config.vocab_size
        transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(embedding_size, config.d_model),
                "blocks": nn.ModuleList(_Block(config) for _ in range(config.n_layers)),
                "ln_f": LlamaRMSNorm(config.d_model, config.rms_norm_eps),
            }
        )
        if not config.weight_tying:
            transformer["ff_out"] = nn.Linear(config.d_model, embedding_size, bias=False)
        self.model = nn.ModuleDict({"transformer": transformer})

    @property
    def head(self) -> Head:
        transformer: Any = self.model["transformer"]
        # rows behind the vocabulary are padding
        return Head(transformer["wte" if self.config.weight_tying else "ff_out"].weight[: self.config.vocab_size])

    @property
    def key_shape(self) -> KeyShape:
        return KeyShape(self.config.n_layers, self.config.kv_heads, self.config.head_size)

    def hidden(self, tokens: Tensor, context: AttentionContext | None = None) -> Tensor:
        context = context or self.whole_sequences()
        transformer: Any = self.model["transformer"]
        x = transformer["wte"](tokens)
        rotary = context.rotary(tokens, self.config.head_size, self.config.rope_theta)
        blocks, norm = transformer["blocks"], transformer["ln_f"]
        return run_layers(x, blocks, _Block, norm, self.config.head_size, rotary, context)
