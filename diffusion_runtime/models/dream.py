"""Dream (Ye et al., 2025, arXiv 2508.15487): Qwen2.5 made into a diffusion model; also DiffuCoder and Dream-Coder.

Projections of queries, keys and values have biases, and the states at a position give the logits of the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusion_runtime.models._decoder import Decoder, DecoderConfig


@dataclass(frozen=True)
class DreamConfig(DecoderConfig):
    """The keys of a Dream ``config.json``."""

    mask_token_id: int = 151666

    NAME: ClassVar[str] = "Dream"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_mask_token(self.mask_token_id, self.vocab_size)


class Dream(Decoder):
    """Every position sees all others; logits belong to the next position."""

    qkv_bias = True
    shifted = True
