"""The ways to run ``sample_tokens`` that a test goes through: every backend, and every instruction set of the CPU."""

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
    with patch.object(_sample_tokens, "run_cpp", lambda rows, default: run_cpp(rows, instruction_set or default)):
        samples = ops.sample_tokens(logits.to(device), backend=name, **settings)
    return ops.TokenSamples(*(x.cpu() for x in samples))
