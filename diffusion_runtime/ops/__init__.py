"""Every op of the runtime. An op is a function; how it runs is its ``backend``."""

from diffusion_runtime.ops import _attention_library, _library, _norm_library  # noqa: F401  register the operators
from diffusion_runtime.ops._attention import attention
from diffusion_runtime.ops._attention_arguments import Packed, PagedPrefix, Prefix
from diffusion_runtime.ops._attention_masks import (
    AttentionMask,
    Bidirectional,
    BlockCausal,
    Causal,
    PerSequence,
    PrefixWindow,
    SlidingWindow,
)
from diffusion_runtime.ops._commit import CommitStep, commit_step, commit_tokens, remask, renoise, select_commits
from diffusion_runtime.ops._merge_attention import merge_attention
from diffusion_runtime.ops._philox import DRAW_NOISE, DRAW_ORDER, DRAW_TOKEN, philox_uniforms
from diffusion_runtime.ops._qk_norm_rope import qk_norm_rope
from diffusion_runtime.ops._registry import BackendUnavailableError, available_backends, explain
from diffusion_runtime.ops._restriction import pack_allowed, unpack_allowed
from diffusion_runtime.ops._rms_norm import rms_norm
from diffusion_runtime.ops._sample_from_hidden import sample_from_hidden
from diffusion_runtime.ops._sample_tokens import TokenSamples, sample_tokens
from diffusion_runtime.ops._sample_with_soft_embedding import sample_with_soft_embedding
from diffusion_runtime.ops._scaled_dot_product_attention import scaled_dot_product_attention
from diffusion_runtime.ops._soft_embedding import soft_embedding, soft_embedding_from_hidden

__all__ = [
    "DRAW_NOISE",
    "DRAW_ORDER",
    "DRAW_TOKEN",
    "AttentionMask",
    "BackendUnavailableError",
    "Bidirectional",
    "BlockCausal",
    "Causal",
    "CommitStep",
    "Packed",
    "PagedPrefix",
    "PerSequence",
    "Prefix",
    "PrefixWindow",
    "SlidingWindow",
    "TokenSamples",
    "attention",
    "available_backends",
    "commit_step",
    "commit_tokens",
    "explain",
    "merge_attention",
    "pack_allowed",
    "philox_uniforms",
    "qk_norm_rope",
    "remask",
    "renoise",
    "rms_norm",
    "sample_from_hidden",
    "sample_tokens",
    "sample_with_soft_embedding",
    "scaled_dot_product_attention",
    "select_commits",
    "soft_embedding",
    "soft_embedding_from_hidden",
    "unpack_allowed",
]
