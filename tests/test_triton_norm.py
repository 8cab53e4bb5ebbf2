"""What is special to the Triton backends of rms_norm and qk_norm_rope: blocks, and places that nobody has checked."""

from __future__ import annotations

import pytest
import torch
from backends import device_of
from qk_norm_rope_cases import heads, settings_of, tables

pytest.importorskip("triton")

from diffusion_runtime.kernels import qk_norm_rope as rope_kernel
from diffusion_runtime.kernels import rms_norm as norm_kernel

from diffusion_runtime import ops
from diffusion_runtime.ops._qk_norm_rope_problem import QKNormRope

DEVICE = device_of("triton")


def test_how_many_rows_a_block_has_changes_nothing(monkeypatch):
    x, weight = torch.randn(70, 100, device=DEVICE), torch.randn(100, device=DEVICE)
    query, key = (heads(3, n, 11, 24, torch.bfloat16).to(DEVICE) for n in (4, 2))
    settings = {
        k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v
        for k, v in settings_of("Qwen", 24, torch.bfloat16).items()
    }
    cos, sin = (t.to(DEVICE) for t in tables(11, 24))
    found = []
    for interpreted in (True, False):
        monkeypatch.setattr(norm_kernel, "_INTERPRETED", interpreted)
        monkeypatch.setattr(rope_kernel, "_INTERPRETED", interpreted)
        rows = ops.rms_norm(x, weight, eps=1e-6, backend="triton")
        found.append((rows, *ops.qk_norm_rope(query, key, None, cos, sin, backend="triton", **settings)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_places_that_do_not_exist():
    query, key, value = (heads(1, 1, 3, 8, torch.float32).to(DEVICE) for _ in range(3))
    cos, sin = (x[None].to(DEVICE) for x in tables(6, 8))
    around = torch.full((2, 1, 1, 25, 8), 7.0, device=DEVICE)
    cache_key, cache_value = around[:, :, :, 10:15]
    positions, slots = torch.tensor([[1, -2, 6]], device=DEVICE), torch.tensor([[4, -1, 5]], device=DEVICE)
    call = QKNormRope(
        query, key, value, cos, sin, None, None, positions, cache_key, cache_value, slots, True, 1e-6, 0.0, False, 0
    )
    out, _ = call.outputs()
    rope_kernel.qk_norm_rope(*call, out, None)
    assert not out[:, :, 0].isnan().any()
    assert out[:, :, 1:].isnan().all()
    assert torch.equal(cache_value[0, 0, 4], value[0, 0, 0])
    around[:, :, :, 14] = 7
    assert (around == 7).all()
