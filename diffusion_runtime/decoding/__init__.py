"""Decoding rules as pure functions, by their published names."""

from diffusion_runtime.decoding.policies import (
    POLICIES,
    Canvas,
    Policy,
    Rule,
    entropy,
    low_confidence,
    random,
    threshold,
    topk_margin,
)
from diffusion_runtime.decoding.schedule import linear_quotas
from diffusion_runtime.decoding.uniform import NoisyCanvas, UniformDiffusion

__all__ = [
    "POLICIES",
    "Canvas",
    "NoisyCanvas",
    "Policy",
    "Rule",
    "UniformDiffusion",
    "entropy",
    "linear_quotas",
    "low_confidence",
    "random",
    "threshold",
    "topk_margin",
]
