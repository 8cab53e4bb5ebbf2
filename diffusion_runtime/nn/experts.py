"""A mixture of SwiGLU experts, whose weights lie one after the other so that one product serves all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Experts(nn.Module):
    """The sum over a token's chosen experts of ``weight * down(silu(gate(x)) * up(x))``.

    A token's result depends on that token alone, as far as torch's products do: its experts are added in the order they
    were chosen in, not in that of the batch. Nothing waits for the device.

    Args:
        num_experts: how many there are.
        dim: of the input and output.
        hidden: of what an expert gates.
    """

    def __init__(self, num_experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, 2 * hidden, dim) * dim**-0.5)
        self.down_proj = nn.Parameter(torch.randn(num_experts, dim, hidden) * hidden**-0.5)

    def released_parts(self) -> dict[str, dict[str, tuple[int | slice, ...]]]:
        """Of each parameter, the tensors that checkpoints have instead, and where in the parameter each belongs."""
        num_experts, hidden = self.down_proj.shape[0], self.down_proj.shape[2]
        halves = {"gate_proj": slice(None, hidden), "up_proj": slice(hidden, None)}
        return {
            "gate_up_proj": {
                f"{expert}.{name}.weight": (expert, half)
                for expert in range(num_experts)
                for name, half in halves.items()
            },
            "down_proj": {f"{expert}.down_proj.weight": (expert,) for expert in range(num_experts)},
        }

    def forward(self, x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        """Run each token through its experts.

        Args:
            x: ``[tokens, dim]``.
            chosen: ``[tokens, k]`` int64.
            weight: ``[tokens, k]``, any floating dtype; the sum is taken in float32.

        Returns:
            the shape and dtype of ``x``.
        """
        expert, order = chosen.flatten().sort(stable=True)
        numbers = torch.arange(len(self.down_proj), device=x.device)
        ends = torch.searchsorted(expert, numbers, right=True).to(torch.int32)
        gate, up = grouped_linear(x[order // chosen.shape[1]], self.gate_up_proj, ends).chunk(2, -1)
        out = grouped_linear(functional.silu(gate) * up, self.down_proj, ends)
        by_token = torch.empty_like(out).index_copy(0, order, out).unflatten(0, chosen.shape)
        total: Tensor = (by_token.float() * weight[..., None].float()).sum(1)
        return total.to(x.dtype)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``x @ weight[i].T`` for the rows of each group ``i``.

    Args:
        x: ``[rows, dim]`` float32, bfloat16 or float16, the rows of group 0 first.
        weight: ``[groups, out, dim]``.
        ends: ``[groups]`` int32, one past the last row of each.

    Returns:
        ``[rows, out]``.
    """
    out: Tensor = functional.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    return out
