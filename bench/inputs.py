"""What suites are made of: random tensors, and the backends to run."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_runtime import ops


def noise(rows: int, columns: int, device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """``[rows, columns]``, normal; the same for the same shape and device."""
    generator = torch.Generator(device).manual_seed(columns)
    return torch.randn(rows, columns, generator=generator, device=device).mul_(scale).to(dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """Without ``torch.``"""
    return str(dtype).removeprefix("torch.")


def backends(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """What a user can get: not the reference, and not Triton's interpreter."""
    skipped = {"reference", "triton"} if device.type == "cpu" else {"reference"}
    return [name for name in ops.available_backends(op, device.type, dtype) if name not in skipped]


def instruction_sets() -> list[str]:
    """Those of the C++ backend that this CPU has, the fastest first; none where it is not built."""
    try:
        from diffusion_runtime import _C
    except ImportError:
        return []
    return list(_C.instruction_sets())
