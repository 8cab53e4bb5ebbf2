"""SDAR (Cheng et al., 2025, arXiv 2510.06303): Qwen3 made into a block diffusion model, dense or with experts.

Queries and keys are normalised head by head; attention is causal from block to block, and nothing is shifted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from diffusion_runtime.models._decoder import Decoder, DecoderConfig
from diffusion_runtime.models._mixture import SoftmaxMixture

# switches of the training code that share the file
_TRAINING = frozenset("debug ep_size fuse_cross_entropy micro_forward skip_checkpoint use_deepep".split())


@dataclass(frozen=True)
class SDARConfig(DecoderConfig):
    """The keys of an SDAR ``config.json``."""

    block_size: int = 4
    mask_token_id: int = 151669

    NAME: ClassVar[str] = "SDAR"
    IGNORED: ClassVar[frozenset[str]] = DecoderConfig.IGNORED | _TRAINING

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_mask_token(self.mask_token_id, self.vocab_size)


@dataclass(frozen=True)
class SDARMoEConfig(SDARConfig):
    """The keys of an SDAR ``config.json`` with experts, which are those of Qwen3-MoE."""

    num_experts: int = 128
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 768
    norm_topk_prob: bool = True

    NAME: ClassVar[str] = "SDAR-MoE"
    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **DecoderConfig.FIXED,
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([], None),
    }
    IGNORED: ClassVar[frozenset[str]] = SDARConfig.IGNORED | {"output_router_logits", "router_aux_loss_coef"}


class SDAR(Decoder):
    """Every position sees its own block of ``block_size`` and those before it."""

    qk_norm = True

    @property
    def block_length(self) -> int:
        """Positions of a block."""
        length: int = self.config.block_size
        return length


class SDARMoE(SDAR):
    """SDAR with experts in every layer."""

    def feed_forward(self, layer: int) -> nn.Module:
        del layer
        c = self.config
        hidden = c.moe_intermediate_size
        return SoftmaxMixture(c.num_experts, c.num_experts_per_tok, c.hidden_size, hidden, normalise=c.norm_topk_prob)
