"""The feed-forward layer of a mixture of experts whose router is a softmax, as in OLMoE and Qwen3-MoE."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffusion_runtime.nn import Experts


class SoftmaxMixture(nn.Module):
    """Each token goes to the ``top_k`` experts that a softmax over all of them gives most.

    The router's product is in the dtype of the weights, its softmax in float32.

    Args:
        num_experts: how many there are.
        top_k: how many serve a token.
        dim: of the input and output.
        hidden: of what an expert gates.
        normalise: whether the weights of the chosen experts are scaled to a sum of 1.
    """

    def __init__(self, num_experts: int, top_k: int, dim: int, hidden: int, *, normalise: bool) -> None:
        super().__init__()
        self.top_k = top_k
        self.normalise = normalise
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.experts = Experts(num_experts, dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, length, dim]`` in, the same shape out."""
        rows = x.flatten(0, -2)
        weight, chosen = self.gate(rows).float().softmax(-1).topk(self.top_k)
        if self.normalise:
            weight = weight / weight.sum(-1, keepdim=True)
        out: Tensor = self.experts(rows, chosen, weight)
        return torch.unflatten(out, 0, x.shape[:-1])
