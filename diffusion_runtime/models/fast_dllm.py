"""Fast-dLLM v2 (Wu et al., 2025, arXiv 2509.26328): Qwen2.5 made into a block diffusion model.

Attention is causal from block to block, and the states at a position give the logits of the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusion_runtime.models._decoder import Decoder, DecoderConfig


@dataclass(frozen=True)
class FastDLLMConfig(DecoderConfig):
    """The keys of a Fast-dLLM v2 ``config.json``."""

    bd_size: int = 32
    mask_token_id: int = 151665

    NAME: ClassVar[str] = "Fast-dLLM v2"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_mask_token(self.mask_token_id, self.vocab_size)


class FastDLLM(Decoder):
    """Every position sees its own block of ``bd_size`` and those before it; logits belong to the next position."""

    qkv_bias = True
    shifted = True

    @property
    def block_length(self) -> int:
        """Positions of a block."""
        length: int = self.config.bd_size
        return length
