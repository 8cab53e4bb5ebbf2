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

__all__ = [
    "POLICIES",
    "Canvas",
    "Policy",
    "Rule",
    "entropy",
    "linear_quotas",
    "low_confidence",
    "random",
    "threshold",
    "topk_margin",
]
