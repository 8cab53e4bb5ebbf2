"""Fused kernels and a thin denoising loop for diffusion language models."""

from importlib.metadata import version

from diffusion_runtime import ops
from diffusion_runtime.denoiser import Denoiser, Step
from diffusion_runtime.loading import load

__all__ = ["Denoiser", "Step", "load", "ops"]
__version__ = version("diffusion-runtime")
