"""What ops on rows of logits share: settings that are one value or one per row, and rows as the kernels see them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Setting = Tensor | float | int  # a tensor is contiguous [rows]


def as_rows(logits: Tensor) -> Tensor:
    """``[..., vocab]`` as ``[outer, inner, vocab]``, ``inner`` the last leading dimension, with stride 1 along vocab.

    A view for every slice of a batch; a copy only if the vocabulary is strided or three or more leading dimensions
    do not merge.
    """
    inner = logits.shape[-2] if logits.ndim > 1 else 1
    rows = logits.detach().reshape(math.prod(logits.shape[:-2]), inner, logits.shape[-1])
    return rows if rows.stride(2) == 1 or rows.shape[2] == 1 else rows.contiguous()


def float_setting(
    name: str,
    value: Tensor | float,
    leading: torch.Size,
    device: torch.device,
    *,
    zero: bool = True,
    most: float = math.inf,
    signed: bool = False,
    flat: bool = True,
) -> Tensor | float:
    """A finite number up to ``most``, positive or (if ``zero``) 0 or (if ``signed``) any; float32 where it is a tensor.

    The values of a tensor are checked on the CPU only: elsewhere that would synchronise. A tensor comes back as
    contiguous ``[rows]``, or if not ``flat`` as a view of the leading shape.
    """
    if isinstance(value, Tensor):
        rows = (_per_row if flat else broadcast)(name, value, leading, device, torch.float32)
        if rows.device.type == "cpu" and not torch.compiler.is_compiling():
            for extreme in rows.aminmax() if rows.numel() else ():  # NaN is both
                _check_float(name, float(extreme), zero, most, signed)
        return rows
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a float or a tensor, got {type(value).__name__}")
    _check_float(name, value, zero, most, signed)
    return float(value)


def int_setting(
    name: str, value: Tensor | int, leading: torch.Size, device: torch.device, bits: int, *, flat: bool = True
) -> Tensor | int:
    """An integer of at most ``bits`` bits (64: signed or unsigned, kept as signed), or an int64 tensor.

    ``flat`` as in :func:`float_setting`.
    """
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {value.dtype}")
        return (_per_row if flat else broadcast)(name, value, leading, device, torch.int64)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int or an int64 tensor, got {type(value).__name__}")
    low = -(2**63) if bits == 64 else 0
    if not low <= value < 2**bits:
        raise ValueError(f"{name} must be in [{low}, 2^{bits}), got {value}")
    return value - 2**64 if value >= 2**63 else value


def mask_setting(name: str, value: Tensor | None, leading: torch.Size, device: torch.device) -> Tensor | None:
    """A bool tensor broadcastable to the leading shape, or None."""
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    return _per_row(name, value, leading, device, torch.bool)


def _per_row(name: str, value: Tensor, leading: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    return broadcast(name, value, leading, device, dtype).reshape(-1).contiguous()


def broadcast(name: str, value: Tensor, leading: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A view of the leading shape; a copy only if the dtype differs."""
    if value.device != device:
        raise ValueError(f"the rows are on {device}, but {name} is on {value.device}")
    try:
        return value.detach().to(dtype).expand(leading)
    except RuntimeError:
        raise ValueError(f"{name} must broadcast to {tuple(leading)}, got {tuple(value.shape)}") from None


def _check_float(name: str, value: float, zero: bool, most: float, signed: bool) -> None:
    if math.isfinite(value) and (signed or value > 0 or (value == 0 and zero)) and value <= most:
        return
    expected = f"finite and {'at least' if zero else 'above'} 0" if most == math.inf else f"in [0, {most:g}]"
    expected = "finite" if signed else expected
    raise ValueError(f"{name} must be {expected}, got {value}")
