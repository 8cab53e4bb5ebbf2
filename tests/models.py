"""Small random-weight models for tests."""

from __future__ import annotations

import torch

from diffusion_runtime.models import LLaDA, LLaDAConfig

CONFIG = LLaDAConfig(
    d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, mlp_hidden_size=96, vocab_size=61, mask_token_id=60, rope_theta=100
)


def random_llada(config: LLaDAConfig = CONFIG, *, scale: float = 4.0, kind: type[LLaDA] = LLaDA) -> LLaDA:
    """A LLaDA whose logits differ enough between positions to give every policy something to choose from."""
    torch.manual_seed(1)
    model = kind(config).requires_grad_(False).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(scale)
    return model


class SelfConditionedLLaDA(LLaDA):
    """A LLaDA that hears what the step before expected, beside the embeddings of the last positions."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        width = config.d_model
        self.condition = torch.nn.Sequential(
            torch.nn.Linear(width, width, bias=False), torch.nn.SiLU(), torch.nn.Linear(width, width, bias=False)
        )
        self.signal: torch.Tensor | None = None
        self.model["transformer"]["wte"].register_forward_hook(self._add_signal)

    @property
    def self_conditioning_embedding(self) -> torch.Tensor:
        weight: torch.Tensor = self.model["transformer"]["wte"].weight
        return weight

    def _add_signal(self, module, arguments, embedded):
        del module, arguments
        heard = self.condition(self.signal)
        return torch.cat((embedded[:, : -heard.shape[1]], embedded[:, -heard.shape[1] :] + heard), 1)

    def forward(self, tokens: torch.Tensor, self_conditioning: torch.Tensor) -> torch.Tensor:
        self.signal = self_conditioning
        return super().forward(tokens)
