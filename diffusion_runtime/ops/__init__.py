"""Every op of the runtime. An op is a function; how it runs is its ``backend``."""

from diffusion_runtime.ops import _library  # noqa: F401  registers the operators
from diffusion_runtime.ops._attention import attention
from diffusion_runtime.ops._philox import DRAW_ORDER, DRAW_TOKEN, philox_uniforms
from diffusion_runtime.ops._registry import BackendUnavailableError, available_backends, explain
from diffusion_runtime.ops._restriction import pack_allowed, unpack_allowed
from diffusion_runtime.ops._sample_from_hidden import sample_from_hidden
from diffusion_runtime.ops._sample_tokens import TokenSamples, sample_tokens
from diffusion_runtime.ops._soft_embedding import soft_embedding, soft_embedding_from_hidden

__all__ = [
    "DRAW_ORDER",
    "DRAW_TOKEN",
    "BackendUnavailableError",
    "TokenSamples",
    "attention",
    "available_backends",
    "explain",
    "pack_allowed",
    "philox_uniforms",
    "sample_from_hidden",
    "sample_tokens",
    "soft_embedding",
    "soft_embedding_from_hidden",
    "unpack_allowed",
]
