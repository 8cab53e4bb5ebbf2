"""The ways to run ``sample_tokens`` that a test goes through, and when two of them may draw different tokens."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch

from diffusion_runtime import ops
from diffusion_runtime.ops import _sample_tokens

KERNELS = ["cpp-avx512", "cpp-avx2", "cpp-portable", "triton", pytest.param("cuda", marks=pytest.mark.gpu)]
ALL = ["reference", *KERNELS]


def device_of(backend: str) -> torch.device:
    """Where a backend's inputs must be: on a GPU, Triton is compiled rather than interpreted."""
    on_gpu = backend == "cuda" or (backend == "triton" and torch.cuda.is_available())
    return torch.device("cuda" if on_gpu else "cpu")


def sample_tokens(logits: torch.Tensor, *, backend: str, **settings: Any) -> ops.TokenSamples:
    """``ops.sample_tokens`` on the device of the backend; results come back to the CPU."""
    name, _, instruction_set = backend.partition("-")
    device = device_of(backend)
    if instruction_set:
        usable = pytest.importorskip("diffusion_runtime._C").instruction_sets()
        if instruction_set not in usable:
            pytest.skip(f"this CPU has {', '.join(usable)}")
    settings = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in settings.items()}
    run_cpp = _sample_tokens.run_cpp
    with patch.object(_sample_tokens, "run_cpp", lambda *rows: run_cpp(*rows[:2], instruction_set or rows[2])):
        samples = ops.sample_tokens(logits.to(device), backend=name, **settings)
    return ops.TokenSamples(*(x.cpu() for x in samples))


def is_rounding_boundary(logits: torch.Tensor, temperature: float, uniforms: tuple[float, float], tokens: set[int]):
    """Whether rounding can send this draw to each of ``tokens``: their intervals all touch the uniforms."""
    weight = (logits.double() / temperature).softmax(-1)
    tiles = torch.nn.functional.pad(weight, (0, -len(weight) % 128)).unflatten(0, (-1, 128))
    masses = tiles.sum(1)
    for token in tokens:
        tile, lane = divmod(token, 128)
        for mass, at, uniform in ((masses, tile, uniforms[0]), (tiles[tile], lane, uniforms[1])):
            end = mass.cumsum(0)[at] / mass.sum()
            begin = end - mass[at] / mass.sum()
            if not begin - 1e-5 <= uniform <= end + 1e-5:
                return False
    return True


def assert_same_tokens(got: torch.Tensor, expected: torch.Tensor, logits: torch.Tensor, temperature: float, seed: int):
    """Equal, except where the two backends' roundings of a mass straddle the uniform; returns how many do."""
    rows = logits.reshape(-1, logits.shape[-1])
    differ = (got.flatten() != expected.flatten()).nonzero()[:, 0].tolist()
    for r in differ:
        u = ops.philox_uniforms(seed, r % logits.shape[-2], 0, ops.DRAW_TOKEN)
        tokens = {int(got.flatten()[r]), int(expected.flatten()[r])}
        assert is_rounding_boundary(rows[r], temperature, (float(u[0]), float(u[1])), tokens), f"row {r}: {tokens}"
    assert len(differ) <= 2 + len(rows) // 1000
    return len(differ)
