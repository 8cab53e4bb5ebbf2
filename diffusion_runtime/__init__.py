"""Fused kernels and a thin denoising loop for diffusion language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_runtime import ops
    from diffusion_runtime.denoiser import Denoiser, Request, Result, Step, wrap
    from diffusion_runtime.loading import load

    __version__: str

__all__ = ["Denoiser", "Request", "Result", "Step", "__version__", "load", "ops", "wrap"]

_HOMES = dict.fromkeys(("Denoiser", "Request", "Result", "Step", "wrap"), "denoiser") | {"load": "loading"}


def __getattr__(name: str) -> Any:
    # on first use, so that the command line answers --help without waiting for torch
    if name in _HOMES:
        return getattr(import_module(f"diffusion_runtime.{_HOMES[name]}"), name)
    if name == "ops":
        return import_module("diffusion_runtime.ops")
    if name == "__version__":
        from importlib.metadata import version

        return version("diffusion-runtime")
    raise AttributeError(f"module 'diffusion_runtime' has no attribute {name!r}")
