"""BD3LM (Arriola et al., 2025, arXiv 2503.09573): MDLM's diffusion transformer, causal from block to block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from diffusion_runtime.models._dit import DiT, DiTConfig


@dataclass(frozen=True)
class BD3LMConfig(DiTConfig):
    """The keys of a BD3LM ``config.json``."""

    block_size: int = 1
    adaln: bool = True

    NAME: ClassVar[str] = "BD3LM"
    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"causal": (False,), "cross_attn": (True,)}
    IGNORED: ClassVar[frozenset[str]] = DiTConfig.IGNORED | frozenset(
        "attn_backend sampling_eps_max sampling_eps_min var_min".split()
    )


class BD3LM(DiT):
    """Every position sees its own block of ``block_size`` and those before it."""

    def __init__(self, config: BD3LMConfig) -> None:
        super().__init__(config, adaln=config.adaln)

    @property
    def block_length(self) -> int:
        """Positions of a block."""
        length: int = self.config.block_size
        return length
