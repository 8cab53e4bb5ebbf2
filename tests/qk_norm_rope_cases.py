"""Calls of qk_norm_rope that its tests share, and a way to make them on any backend."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from backends import device_of, instruction_set

from diffusion_runtime import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# style, head_dim, rotary_dim
ROTATIONS = [
    ("half", 64, 64),
    ("half", 48, 20),
    ("half", 128, 32),
    ("half", 7, 4),
    ("interleaved", 64, 64),
    ("interleaved", 33, 14),
    ("interleaved", 40, 16),
    ("proportional", 64, 16),
    ("proportional", 64, 64),
    ("proportional", 512, 128),
    ("proportional", 22, 6),
    ("half", 16, 0),
    ("half", 2, 2),
]
NORMS: dict[str, dict[str, Any]] = {
    "rotation only": {},
    "no weights": {"eps": 1e-6},
    "plain": {"eps": 1e-6, "weights": True},
    "Qwen": {"eps": 1e-6, "weights": True, "round_before_weight": True},
    "Gemma": {"eps": 1e-5, "weights": True, "weight_offset": 1.0},
}


def heads(batch, num_heads, length, head_dim, dtype):
    """``[batch, num_heads, length, head_dim]``, in memory as a projection leaves it."""
    return (torch.randn(batch, length, num_heads, head_dim) * 2).to(dtype).transpose(1, 2)


def settings_of(norm, head_dim, dtype):
    settings = dict(NORMS[norm])
    if settings.pop("weights", False):
        settings |= {"query_weight": torch.randn(head_dim).to(dtype), "key_weight": torch.randn(head_dim).to(dtype)}
    return settings


def tables(rows, rotary_dim, *leading):
    angle = torch.randn(*leading, rows, rotary_dim // 2) * 3
    return angle.cos(), angle.sin()


def moved(x, to):
    return x.to(to) if isinstance(x, torch.Tensor) else x


def run(*tensors, backend, **settings):
    """On the device of the backend; results come back to the CPU. Skips where the backend is not available."""
    name, _, wanted = backend.partition("-")
    device = device_of(backend)
    if name not in ops.available_backends("qk_norm_rope", device.type, tensors[0].dtype):
        pytest.skip(ops.explain("qk_norm_rope", device.type, tensors[0].dtype).replace("\n", "; "))
    on_device = {k: moved(v, device) for k, v in settings.items()}
    with instruction_set(wanted) if name == "cpp" else nullcontext():
        query, key = ops.qk_norm_rope(*(moved(x, device) for x in tensors), backend=name, **on_device)
    for cache in ("cache_key", "cache_value"):
        if cache in settings and on_device[cache] is not settings[cache]:
            settings[cache].copy_(on_device[cache])
    return query.cpu(), None if key is None else key.cpu()


def in_double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
