"""LLaDA-MoE (Zhu et al., 2025, arXiv 2509.24389): OLMoE's layout, and attention that sees both ways.

Released checkpoints say ``model_type: "llada"``, as LLaDA-8B does; copies say ``"lladamoe"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn

from diffusion_runtime.models._decoder import Decoder, DecoderConfig
from diffusion_runtime.models._mixture import SoftmaxMixture


@dataclass(frozen=True)
class LLaDAMoEConfig(DecoderConfig):
    """The keys of a LLaDA-MoE ``config.json``; ``intermediate_size`` is that of an expert."""

    num_experts: int = 64
    num_experts_per_tok: int = 8
    mask_token_id: int = 156895
    rms_norm_eps: float = 1e-5

    NAME: ClassVar[str] = "LLaDA-MoE"
    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **DecoderConfig.FIXED,
        "clip_qkv": (None,),
        "moe_router_enable_expert_bias": (None, False),
        "moe_router_score_function": (None, "softmax"),
        "norm_topk_prob": (None, False),
        "partial_rotary_factor": (1,),
        "qk_layernorm": (True,),
        "routed_scaling_factor": (1,),
        "router_num_group": (None,),
        "router_topk_group": (None,),
        "shared_expert_intermediate_size": (None,),
    }
    IGNORED: ClassVar[frozenset[str]] = DecoderConfig.IGNORED | frozenset(
        "dense_intermediate_size output_router_logits router_aux_loss_coef".split()
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_mask_token(self.mask_token_id, self.vocab_size)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a ``config.json``; see :meth:`ModelConfig.from_dict`."""
        config = dict(config)
        if not all(config.pop("moe_layer_freq", None) or [1]):
            raise ValueError(f"the {cls.NAME} config asks for layers without experts in moe_layer_freq")
        if "expert_intermediate_size" in config:
            config["intermediate_size"] = config.pop("expert_intermediate_size")
        return super().from_dict(config)


class LLaDAMoE(Decoder):
    """Every position sees all others; the router's weights are not scaled to a sum of 1."""

    qk_norm = True

    def feed_forward(self, layer: int) -> nn.Module:
        del layer
        c = self.config
        hidden = c.intermediate_size
        return SoftmaxMixture(c.num_experts, c.num_experts_per_tok, c.hidden_size, hidden, normalise=False)
