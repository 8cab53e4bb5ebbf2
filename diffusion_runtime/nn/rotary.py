"""Rotary position embedding (Su et al., 2021), in the two-halves layout of GPT-NeoX, Llama and LLaDA."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_runtime.ops._qk_norm_rope_problem import rotate


def rotary_table(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of ``position * theta ** (-2 i / head_dim)``.

    Where only ``rotary_dim`` elements of a head rotate, give that as ``head_dim``; for the ``"proportional"`` style of
    :func:`diffusion_runtime.ops.qk_norm_rope`, give the head's own and take the first ``rotary_dim / 2`` columns.

    Args:
        length: positions 0 to ``length - 1``.
        head_dim: even.
        theta: the base of the wavelengths.

    Returns:
        two ``[length, head_dim / 2]`` float32 tensors.
    """
    return rotary_angles(torch.arange(length, device=device), head_dim, theta)


def rotary_angles(positions: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """The rows of :func:`rotary_table` at these positions.

    Args:
        positions: ``[...]`` int64.
        rotary_dim: how many elements of a head rotate, even.
        theta: the base of the wavelengths.

    Returns:
        two ``[..., rotary_dim / 2]`` float32 tensors.
    """
    every_second = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float32)
    angle = positions[..., None].float() * theta ** -(every_second / rotary_dim)
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate element ``i`` with element ``i + head_dim / 2`` by the angle of its position.

    Args:
        x: ``[batch, heads, length, head_dim]``. The rotation is in float32 (float64 for float64 input), rounded once.
        table: of :func:`rotary_table`, for the same ``length`` and ``head_dim``.

    Returns:
        the shape and dtype of ``x``.
    """
    cos, sin = table
    return rotate(x.to(torch.promote_types(x.dtype, torch.float32)), cos, sin, "half").to(x.dtype)
