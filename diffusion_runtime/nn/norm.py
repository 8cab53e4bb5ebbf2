"""Root mean square normalisation (Zhang and Sennrich, 2019, equation 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffusion_runtime import ops


class LlamaRMSNorm(nn.Module):
    """``x / sqrt(mean(x ** 2) + eps) * weight`` over the last dimension.

    The mean and the division are in float32, the result is rounded to the dtype of ``x`` *before* it is multiplied
    by ``weight``, as OLMo, LLaDA and Llama do; ``torch.nn.RMSNorm`` rounds after, and differs in bfloat16.

    Args:
        size: the last dimension of the input.
        eps: added to the mean of squares.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``[..., size]`` in, the same shape and dtype out."""
        return ops.rms_norm(x, self.weight, eps=self.eps, round_before_weight=True)
