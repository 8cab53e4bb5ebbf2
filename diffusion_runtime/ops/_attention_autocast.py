"""What ``torch.autocast`` does to attention: the inputs get its dtype, and nothing inside does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on for tensors of this device."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast does to torch's own attention: inputs of 32 bits or fewer in its dtype."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(x if x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype) for x in tensors)


def outside_autocast(device: torch.device, run: Callable[..., Result], *arguments: Any) -> Result:
    """Run what computes in float32 on purpose."""
    if not is_autocast(device):
        return run(*arguments)
    with torch.autocast(device.type, enabled=False):
        return run(*arguments)
