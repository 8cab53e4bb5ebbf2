"""The diffusion transformer of MDLM and BD3LM (Peebles and Xie, 2023, with Lou et al.'s changes for text).

Each block's norms are shifted and scaled, and its results gated, by numbers that a small network makes of the noise
level ``sigma`` (adaLN-zero). Where a checkpoint was trained without time conditioning, ``sigma`` is 0 for all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion_runtime.models._config import BOOKKEEPING, ModelConfig
from diffusion_runtime.models._language_model import Head, KeyShape, LanguageModel
from diffusion_runtime.nn import AttentionContext, rotary_angles, self_attention

_FREQUENCIES = 256  # numbers that stand for a noise level
_THETA = 10_000.0


@dataclass(frozen=True)
class DiTConfig(ModelConfig):
    """The keys that MDLM and BD3LM share."""

    hidden_dim: int
    cond_dim: int
    n_blocks: int
    n_heads: int
    vocab_size: int  # the mask token included, which is the last
    time_conditioning: bool = False

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    IGNORED: ClassVar[frozenset[str]] = BOOKKEEPING | {"dropout", "model_length", "return_dict"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_dim % self.n_heads:
            raise ValueError(f"hidden_dim must be a multiple of n_heads, got {self.hidden_dim} and {self.n_heads}")
        self.check_heads(self.n_heads, self.n_heads, self.hidden_dim // self.n_heads)

    @property
    def mask_token_id(self) -> int:
        """Added behind the tokenizer's own tokens."""
        return self.vocab_size - 1


class LayerNorm(nn.Module):
    """Layer norm in float32, then a weight and no bias."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., size]`` in, the same shape and dtype out."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return functional.layer_norm(x.to(wide), x.shape[-1:]).to(x.dtype) * self.weight


class NoiseLevel(nn.Module):
    """A noise level as a vector: sines and cosines of 128 frequencies, through a network of two layers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCIES, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, sigma: Tensor) -> Tensor:
        """``[rows]`` float32 -> ``[rows, size]``."""
        half = _FREQUENCIES // 2
        frequency = torch.exp(torch.arange(half, device=sigma.device) * (-math.log(10_000) / half))
        angle = sigma[:, None].float() * frequency
        first: Any = self.mlp[0]
        out: Tensor = self.mlp(torch.cat((angle.cos(), angle.sin()), -1).to(first.weight.dtype))
        return out


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x * (1 + scale) + shift``."""
    return x * (1 + scale) + shift


class DiTBlock(nn.Module):
    """Attention, then a feed-forward network, each modulated and gated by the noise level if ``cond_dim`` is given."""

    def __init__(self, dim: int, heads: int, cond_dim: int | None) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.norm1 = LayerNorm(dim)
        self.attn_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.norm2 = LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        self.adaLN_modulation = None if cond_dim is None else nn.Linear(cond_dim, 6 * dim)

    def forward(
        self, x: Tensor, condition: Tensor | None, rotary: tuple[Tensor, Tensor], context: AttentionContext, layer: int
    ) -> Tensor:
        """``x`` is ``[batch, length, dim]``, ``condition`` ``[batch or 1, 1, cond_dim]`` or None."""
        if self.adaLN_modulation is None or condition is None:
            x = x + self._attend(self.norm1(x), rotary, context, layer)
            plain: Tensor = x + self.mlp(self.norm2(x))
            return plain
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, -1)
        x = x + gate1 * self._attend(modulate(self.norm1(x), shift1, scale1), rotary, context, layer)
        out: Tensor = x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return out

    def _attend(self, x: Tensor, rotary: tuple[Tensor, Tensor], context: AttentionContext, layer: int) -> Tensor:
        query, key, value = self.attn_qkv(x).chunk(3, -1)
        out: Tensor = self.attn_out(self_attention(query, key, value, self.head_dim, rotary, context, layer))
        return out


class _Embedding(nn.Module):
    def __init__(self, vocab: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(vocab, dim) * dim**-0.5)


class _Output(nn.Module):
    def __init__(self, config: DiTConfig, cond_dim: int | None) -> None:
        super().__init__()
        self.norm_final = LayerNorm(config.hidden_dim)
        self.linear = nn.Linear(config.hidden_dim, config.vocab_size)
        self.adaLN_modulation = None if cond_dim is None else nn.Linear(cond_dim, 2 * config.hidden_dim)


class DiT(LanguageModel):
    """A diffusion transformer over tokens, under the released parameter names.

    Args:
        config: sizes. Weights are random until loaded (:func:`diffusion_runtime.loading.load`).
        adaln: whether blocks are modulated at all.
    """

    # constants that checkpoints carry along
    unused_tensors = frozenset({"backbone.rotary_emb.inv_freq", "sampling_eps_max", "sampling_eps_min"})

    def __init__(self, config: DiTConfig, *, adaln: bool = True) -> None:
        super().__init__()
        self.config = config
        cond_dim = config.cond_dim if adaln else None
        parts: dict[str, nn.Module] = {
            "vocab_embed": _Embedding(config.vocab_size, config.hidden_dim),
            "blocks": nn.ModuleList(
                DiTBlock(config.hidden_dim, config.n_heads, cond_dim) for _ in range(config.n_blocks)
            ),
            "output_layer": _Output(config, cond_dim),
        }
        if cond_dim is not None:
            parts["sigma_map"] = NoiseLevel(cond_dim)
        self.backbone = nn.ModuleDict(parts)

    @property
    def head(self) -> Head:
        output: Any = self.backbone["output_layer"]
        return Head(output.linear.weight, output.linear.bias)

    @property
    def noise_conditioned(self) -> bool:
        conditioned: bool = self.config.time_conditioning
        return conditioned

    @property
    def key_shape(self) -> KeyShape:
        return KeyShape(self.config.n_blocks, self.config.n_heads, self.config.hidden_dim // self.config.n_heads)

    def hidden(self, tokens: Tensor, context: AttentionContext | None = None, *, sigma: Tensor | None = None) -> Tensor:
        """As in :class:`LanguageModel`, at noise level ``sigma``: ``[batch]`` float32, or None for 0.

        Raises:
            ValueError: a level is given and the checkpoint was trained without time conditioning.
        """
        if sigma is not None and not self.config.time_conditioning:
            raise ValueError("sigma must not be given: the checkpoint was trained without time conditioning")
        context = context or self.whole_sequences()
        parts: Any = self.backbone
        condition = None
        if "sigma_map" in parts:
            level = torch.zeros(1, device=tokens.device) if sigma is None else sigma
            condition = functional.silu(parts["sigma_map"](level))[:, None]
        x = functional.embedding(tokens, parts["vocab_embed"].embedding)
        rotary = rotary_angles(context.positions(tokens), self.key_shape.head_dim, _THETA)
        for number, block in enumerate(parts["blocks"]):
            x = block(x, condition, rotary, context, number)
        output = parts["output_layer"]
        normed: Tensor = output.norm_final(x)
        if output.adaLN_modulation is None or condition is None:
            return normed
        return modulate(normed, *output.adaLN_modulation(condition).chunk(2, -1))
