"""Small random-weight models for tests."""

from __future__ import annotations

import torch

from diffusion_runtime.models import LLaDA, LLaDAConfig

CONFIG = LLaDAConfig(
    d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, mlp_hidden_size=96, vocab_size=61, mask_token_id=60, rope_theta=100
)


def random_llada(config: LLaDAConfig = CONFIG, *, scale: float = 4.0) -> LLaDA:
    """A LLaDA whose logits differ enough between positions to give every policy something to choose from."""
    torch.manual_seed(1)
    model = LLaDA(config).requires_grad_(False).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(scale)
    return model
