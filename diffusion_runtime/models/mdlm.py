"""MDLM (Sahoo et al., 2024, arXiv 2406.07524): a diffusion transformer that sees all positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusion_runtime.models._dit import DiT, DiTConfig


@dataclass(frozen=True)
class MDLMConfig(DiTConfig):
    """The keys of an MDLM ``config.json``."""

    NAME: ClassVar[str] = "MDLM"


class MDLM(DiT):
    """Every position sees all others; the mask token is the last of the vocabulary."""
