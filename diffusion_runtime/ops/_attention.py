"""Bidirectional attention: every query sees every key."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_runtime.ops._registry import OpSpec


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return ``softmax(scale * query @ key.T) @ value``, head by head, without a mask.

    Products, softmax and sums are in float32 (float64 for float64 inputs); the result is rounded once, to the
    dtype of ``query``. Differentiable.

    Args:
        query: ``[batch, heads, length, head_dim]``, any strides.
        key: ``[batch, kv_heads, num_keys, head_dim]``; ``kv_heads`` divides ``heads`` and each key head serves
            ``heads / kv_heads`` consecutive query heads.
        value: the shape of ``key``.
        scale: defaults to ``head_dim ** -0.5``.
        backend: ``"reference"`` or None. The op has no other backend yet.

    Returns:
        ``[batch, heads, length, head_dim]`` in the dtype of ``query``. With no keys at all: zeros.

    Raises:
        ValueError: shapes that do not fit together.
        TypeError: dtypes that differ or are not floating point.
        BackendUnavailableError: a named backend that cannot run this call.
    """
    _validate(query, key, value)
    run = SPEC.resolve(query.device.type, query.dtype, backend)
    out: Tensor = run(query, key, value, scale=query.shape[-1] ** -0.5 if scale is None else scale)
    return out


def _validate(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be [batch, heads, length, head_dim], got {tuple(tensor.shape)}")
        if tensor.dtype != query.dtype or not tensor.is_floating_point():
            raise TypeError(f"query, key and value must share one floating-point dtype, got {name} {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"query is on {query.device}, but {name} is on {tensor.device}")
    if key.shape != value.shape:
        raise ValueError(f"value must have the shape of key, {tuple(key.shape)}, got {tuple(value.shape)}")
    batch, heads, _, head_dim = query.shape
    if (key.shape[0], key.shape[3]) != (batch, head_dim) or key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(
            f"key must be [{batch}, a divisor of {heads}, num_keys, {head_dim}] to fit query, got {tuple(key.shape)}"
        )


def _reference(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    # [batch, kv_heads, group, length, head_dim] against [batch, kv_heads, 1, num_keys, head_dim]
    grouped = query.to(wide).unflatten(1, (key.shape[1], -1))
    scores = grouped @ key.to(wide).unsqueeze(2).transpose(-1, -2) * scale
    out: Tensor = scores.softmax(-1) @ value.to(wide).unsqueeze(2)
    return out.flatten(1, 2).to(query.dtype)


SPEC = OpSpec(name="attention", reference=_reference, validate=_validate)
