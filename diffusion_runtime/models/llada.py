"""LLaDA (Nie et al., 2025, arXiv 2502.09992): a Llama-like transformer whose attention sees both ways.

Parameter names and ``config.json`` keys are those of the released checkpoints (GSAI-ML/LLaDA-8B-*), which descend
from OLMo, so a released file loads without renaming.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from diffusion_runtime import ops
from diffusion_runtime.nn import LlamaRMSNorm, apply_rotary, rotary_table

# keys that change the mathematics, and the only value of each that this file implements
_FIXED = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_type": "llama",
    "clip_qkv": None,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "multi_query_attention": None,
    "rope": True,
    "rope_full_precision": True,
    "scale_logits": False,
}
# keys that cannot change what the model computes at inference
_IGNORED = frozenset(
    "_name_or_path alibi_bias_max architectures attention_dropout attention_layer_norm_with_affine auto_map "
    "block_group_size bos_token_id dtype embedding_dropout eos_token_id flash_attention init_cutoff_factor "
    "init_device init_fn init_std max_sequence_length mlp_ratio model_type pad_token_id precision residual_dropout "
    "torch_dtype transformers_version use_cache".split()
)


@dataclass(frozen=True)
class LLaDAConfig:
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

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_field(field.name, str(field.type), getattr(self, field.name))
        heads, kv_heads = self.n_heads, self.n_kv_heads or self.n_heads
        if self.d_model % heads or self.d_model // heads % 2 or heads % kv_heads:
            raise ValueError(
                f"d_model must be n_heads times an even head size and n_kv_heads must divide n_heads, "
                f"got d_model {self.d_model}, n_heads {heads}, n_kv_heads {kv_heads}"
            )
        if not 0 <= self.mask_token_id < (self.embedding_size or self.vocab_size):
            raise ValueError(f"mask_token_id {self.mask_token_id} is outside of the vocabulary of {self.vocab_size}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> LLaDAConfig:
        """Read a ``config.json``.

        Raises:
            ValueError: a required key is missing, or a key would change the mathematics in a way that this class
                does not implement; the message names it.
        """
        known = {field.name: field for field in fields(cls)}
        if missing := [n for n in list(known)[:6] if n not in config]:
            raise ValueError(f"the LLaDA config lacks {', '.join(missing)}")
        for name, value in config.items():
            if name in _FIXED and value != _FIXED[name]:
                raise ValueError(f"the LLaDA config asks for {name}={value!r}; only {_FIXED[name]!r} is implemented")
            if name not in _FIXED and name not in _IGNORED and name not in known:
                raise ValueError(f"the LLaDA config has an unknown key {name!r} (= {value!r})")
        return cls(**{name: config[name] for name in known if name in config})


_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,)}


def _check_field(name: str, declared: str, value: Any) -> None:
    if value is None and "None" in declared:
        return
    kind = declared.split(" ")[0]
    fits = isinstance(value, _KINDS[kind]) and isinstance(value, bool) == (kind == "bool")
    if not fits:
        raise ValueError(f"{name} must be {declared}, got {value!r}")
    if value < 0 or (value == 0 and name not in ("mask_token_id", "weight_tying")):
        raise ValueError(f"{name} must be positive, got {value!r}")


class _Block(nn.Module):
    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        width, hidden = config.d_model, config.mlp_hidden_size
        self.head_dim = width // config.n_heads
        kv_width = self.head_dim * (config.n_kv_heads or config.n_heads)
        self.attn_norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.ff_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.ff_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        # [batch, length, heads * head_dim] -> [batch, heads, length, head_dim], as views
        normed = self.attn_norm(x)
        query, key, value = (
            projection(normed).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = ops.attention(apply_rotary(query, rotary), apply_rotary(key, rotary), value)
        x = x + self.attn_out(mixed.transpose(1, 2).flatten(2))
        normed = self.ff_norm(x)
        out: Tensor = x + self.ff_out(functional.silu(self.ff_proj(normed)) * self.up_proj(normed))
        return out


class LLaDA(nn.Module):
    """Tokens in, logits out, each position seeing all of them; nothing is shifted.

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
    def mask_token_id(self) -> int:
        """The token that stands for an undecided position."""
        return self.config.mask_token_id

    def forward(self, tokens: Tensor) -> Tensor:
        """``[batch, length]`` int64 -> ``[batch, length, vocab]`` in the dtype of the weights."""
        transformer: Any = self.model["transformer"]
        config = self.config
        x = transformer["wte"](tokens)
        rotary = rotary_table(tokens.shape[1], config.d_model // config.n_heads, config.rope_theta, tokens.device)
        for block in transformer["blocks"]:
            x = block(x, rotary)
        x = transformer["ln_f"](x)
        head = transformer["wte" if config.weight_tying else "ff_out"]
        logits: Tensor = functional.linear(x, head.weight)
        return logits[..., : config.vocab_size]
