"""How many positions each step of a block commits."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_quotas(num_masked: Tensor, num_steps: int) -> Tensor:
    """LLaDA's schedule: as even as whole numbers allow, the larger shares first.

    With ``n`` masked positions and ``S`` steps, step ``s`` commits ``n // S``, plus one if ``s < n % S``; the sum is
    ``n``. Source: ``get_num_transfer_tokens`` of the published LLaDA ``generate.py``.

    Args:
        num_masked: ``[batch]`` int64.
        num_steps: at least 1.

    Returns:
        ``[num_steps, batch]`` int64.
    """
    step = torch.arange(num_steps, device=num_masked.device)[:, None]
    return num_masked // num_steps + (step < num_masked % num_steps)
