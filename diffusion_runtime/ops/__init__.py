"""Every op of the runtime. An op is a function; how it runs is its ``backend``."""

from diffusion_runtime.ops import _library  # noqa: F401  registers the operators
from diffusion_runtime.ops._attention import attention
from diffusion_runtime.ops._philox import DRAW_ORDER, DRAW_TOKEN, philox_uniforms
from diffusion_runtime.ops._registry import BackendUnavailableError, available_backends, explain
from diffusion_runtime.ops._sample_tokens import TokenSamples, sample_tokens

__all__ = [
    "DRAW_ORDER",
    "DRAW_TOKEN",
    "BackendUnavailableError",
    "TokenSamples",
    "attention",
    "available_backends",
    "explain",
    "philox_uniforms",
    "sample_tokens",
]
