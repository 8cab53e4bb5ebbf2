"""The decoder that most families share, under the parameter names of Qwen, Llama and OLMoE in transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from diffusion_runtime.models._config import BOOKKEEPING, ModelConfig
from diffusion_runtime.models._language_model import Head, KeyShape, LanguageModel
from diffusion_runtime.nn import AttentionContext, LlamaRMSNorm, SwiGLU, self_attention
from diffusion_runtime.nn.decoder_layers import DecoderParts, run_layers


@dataclass(frozen=True)
class DecoderConfig(ModelConfig):
    """The keys that transformers writes for a decoder."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float
    num_key_value_heads: int | None = None  # None: num_attention_heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "attention_bias": (False,),
        "hidden_act": ("silu",),
        "rope_scaling": (None,),
        "use_sliding_window": (False,),
    }
    IGNORED: ClassVar[frozenset[str]] = BOOKKEEPING | frozenset(
        "attention_dropout initializer_range max_position_embeddings max_window_layers sliding_window".split()
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads where head_dim is not said, got "
                f"{self.hidden_size} and {self.num_attention_heads}"
            )
        self.check_heads(self.num_attention_heads, self.kv_heads, self.head_size)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a ``config.json``; see :meth:`ModelConfig.from_dict`. What transformers 5 writes is read as well."""
        config = dict(config)
        rope = config.pop("rope_parameters", None)
        if rope is not None:
            if rope.get("rope_type", "default") != "default" or not rope.keys() <= {"rope_type", "rope_theta"}:
                raise ValueError(
                    f"the {cls.NAME} config asks for rope_parameters={rope!r}; only a theta is implemented"
                )
            config |= {name: value for name, value in rope.items() if name == "rope_theta"}
        layers = set(config.pop("layer_types", None) or ())
        if layers - {"full_attention"}:
            raise ValueError(f"the {cls.NAME} config asks for layers of {sorted(layers)}; only full_attention is known")
        return super().from_dict(config)

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
        """How many of them rotate."""
        return self.head_size


class DecoderAttention(nn.Module):
    """Grouped-query attention with rotary positions.

    Args:
        config: sizes.
        qkv_bias: whether the three projections have one, as in Qwen2.
        qk_norm: whether each head of queries and keys is normalised before it is rotated, as in Qwen3.
    """

    def __init__(self, config: DecoderConfig, *, qkv_bias: bool, qk_norm: bool) -> None:
        super().__init__()
        self.head_dim = config.head_size
        width, kv_width = config.num_attention_heads * self.head_dim, config.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps) if qk_norm else None
        self.k_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps) if qk_norm else None

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], context: AttentionContext, layer: int) -> Tensor:
        """``[batch, length, hidden_size]`` in, the same shape out."""
        mixed = self_attention(
            self.q_proj(x), self.k_proj(x), self.v_proj(x), self.head_dim, rotary, context, layer,
            query_norm=self.q_norm, key_norm=self.k_norm,
        )  # fmt: skip
        out: Tensor = self.o_proj(mixed)
        return out


class DecoderLayer(nn.Module):
    """Attention, then a feed-forward network, each normalised first and added."""

    def __init__(self, config: DecoderConfig, feed_forward: nn.Module, *, qkv_bias: bool, qk_norm: bool) -> None:
        super().__init__()
        self.self_attn = DecoderAttention(config, qkv_bias=qkv_bias, qk_norm=qk_norm)
        self.mlp = feed_forward
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], context: AttentionContext, layer: int) -> Tensor:
        """``[batch, length, hidden_size]`` in, the same shape out."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, context, layer)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out

    def parts(self) -> DecoderParts | None:
        """Its modules, where the feed-forward network is a dense one."""
        own: Any = self._modules
        attention, mlp = own["self_attn"], own["mlp"]
        if type(attention) is not DecoderAttention or type(mlp) is not SwiGLU:
            return None
        of_attention: Any = attention._modules
        query, key, value, out = (of_attention[f"{name}_proj"] for name in "qkvo")
        of_mlp: Any = mlp._modules
        return DecoderParts(
            own["input_layernorm"], query, key, value, of_attention.get("q_norm"), of_attention.get("k_norm"), out,
            own["post_attention_layernorm"], of_mlp["gate_proj"], of_mlp["up_proj"], of_mlp["down_proj"],
            around=(self, attention, mlp),
        )  # fmt: skip


class Decoder(LanguageModel):
    """A decoder whose attention sees both ways. A family is a subclass that sets what is not the default.

    Args:
        config: sizes. Weights are PyTorch's defaults until loaded (:func:`diffusion_runtime.loading.load`).
    """

    embedding = "embed_tokens"  # its name in checkpoints
    qkv_bias = False
    qk_norm = False

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                self.embedding: nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(self.layer(number) for number in range(config.num_hidden_layers)),
                "norm": LlamaRMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def layer(self, number: int) -> nn.Module:
        """A layer, called with the states, the rotary angles, the context and its number."""
        return DecoderLayer(self.config, self.feed_forward(number), qkv_bias=self.qkv_bias, qk_norm=self.qk_norm)

    def feed_forward(self, layer: int) -> nn.Module:
        """The feed-forward network of a layer."""
        del layer
        return SwiGLU(self.config.hidden_size, self.config.intermediate_size)

    @property
    def head(self) -> Head:
        tied: Any = self.model[self.embedding]
        return Head((tied if self.config.tie_word_embeddings else self.lm_head).weight)

    @property
    def key_shape(self) -> KeyShape:
        return KeyShape(self.config.num_hidden_layers, self.config.kv_heads, self.config.head_size)

    def hidden(self, tokens: Tensor, context: AttentionContext | None = None) -> Tensor:
        context = context or self.whole_sequences()
        parts: Any = self.model
        x = parts[self.embedding](tokens)
        rotary = context.rotary(tokens, self.config.rotary_dim, self.config.rope_theta)
        return run_layers(x, parts["layers"], DecoderLayer, parts["norm"], self.config.head_size, rotary, context)
