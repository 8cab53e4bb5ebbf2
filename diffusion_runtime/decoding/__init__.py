"""Decoding rules as pure functions, and policies by their published names."""

from diffusion_runtime.decoding.ancestral import ancestral, origin, remask
from diffusion_runtime.decoding.canvas import (
    Canvas,
    Decision,
    Policy,
    Rule,
    Schedule,
    linear,
    of_block_length,
    of_one,
    of_times,
    undecided_share,
)
from diffusion_runtime.decoding.parallel import entropy_bounded, factor, joint_threshold, threshold
from diffusion_runtime.decoding.presets import POLICIES, as_policy
from diffusion_runtime.decoding.ranked import entropy, low_confidence, random, ranked, sequential, topk_margin
from diffusion_runtime.decoding.uniform import NoisyCanvas, UniformDiffusion

__all__ = [
    "POLICIES",
    "Canvas",
    "Decision",
    "NoisyCanvas",
    "Policy",
    "Rule",
    "Schedule",
    "UniformDiffusion",
    "ancestral",
    "as_policy",
    "entropy",
    "entropy_bounded",
    "factor",
    "joint_threshold",
    "linear",
    "low_confidence",
    "of_block_length",
    "of_one",
    "of_times",
    "origin",
    "random",
    "ranked",
    "remask",
    "sequential",
    "threshold",
    "topk_margin",
    "undecided_share",
]
