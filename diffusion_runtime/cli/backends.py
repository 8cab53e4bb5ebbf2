"""Which backend runs an op here, and why the others do not."""

from __future__ import annotations

import os
from importlib import import_module

import torch

from diffusion_runtime.ops._registry import DEFAULT_BACKEND, REGISTRY, Implementation


def candidates(op: str, device: str, dtype: torch.dtype) -> dict[str, str | None]:
    """The backends of an op in order of preference, each with the reason why it cannot run, or None."""
    reasons = {each.backend: _rejection(each, device, dtype) for each in REGISTRY[op].implementations}
    return {**reasons, "reference": None}


def _rejection(implementation: Implementation, device: str, dtype: torch.dtype) -> str | None:
    try:
        return implementation.rejects(device, dtype)
    except Exception as error:  # a broken installation of one backend must not hide the others
        return f"fails to load: {type(error).__name__}: {error}"


def chosen(op: str, device: str, dtype: torch.dtype, backend: str | None = None) -> str | None:
    """The backend that a call would run on, or None if the named one cannot."""
    wanted = backend or DEFAULT_BACKEND
    usable = [name for name, reason in candidates(op, device, dtype).items() if reason is None]
    if wanted == "auto":
        return usable[0]
    return wanted if wanted in usable else None


def instruction_sets() -> list[str]:
    """Those that the C++ kernels can use on this CPU, the one in use first; empty where they are not built."""
    try:
        usable: list[str] = import_module("diffusion_runtime._C").instruction_sets()
    except (ImportError, OSError):
        return []
    wanted = os.environ.get("DIFFUSION_RUNTIME_INSTRUCTION_SET")
    return sorted(usable, key=lambda name: name != wanted)


def label(op: str, device: str, dtype: torch.dtype, backend: str | None = None) -> str:
    """The chosen backend with its instruction set, such as ``cpp/avx512``."""
    name = chosen(op, device, dtype, backend) or "none"
    return f"{name}/{instruction_sets()[0]}" if name == "cpp" else name
