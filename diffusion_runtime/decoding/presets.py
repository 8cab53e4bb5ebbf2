"""Policies by the names they were published under."""

from __future__ import annotations

from functools import partial
from typing import Literal

from diffusion_runtime.decoding.ancestral import ancestral, falling_time, origin, remask
from diffusion_runtime.decoding.canvas import Policy, Rule, of_block_length, of_one, of_times
from diffusion_runtime.decoding.parallel import entropy_bounded, factor, joint_threshold, threshold
from diffusion_runtime.decoding.ranked import entropy, low_confidence, random, sequential, topk_margin
from diffusion_runtime.decoding.uniform import UniformDiffusion


def _remdm(kind: Literal["cap", "rescale", "conf", "loop"], eta: float) -> Policy:
    return Policy(partial(remask, kind=kind, eta=eta), confidence="scaled", remasks=True, time=falling_time)


POLICIES: dict[str, Policy] = {
    # LLaDA, with its schedule for all orders
    "low_confidence": Policy(low_confidence),
    "random": Policy(random),
    "topk_margin": Policy(topk_margin),
    "entropy": Policy(entropy),
    # Fast-dLLM, and what came of it
    "threshold": Policy(partial(threshold, threshold=0.9), scheduled=False),
    "factor": Policy(partial(factor, factor=1.0), scheduled=False),
    "eb_sampler": Policy(partial(entropy_bounded, bound=0.1), scheduled=False),
    # Dream
    "dream_origin": Policy(origin, confidence="scaled"),
    "dream_maskgit_plus": Policy(partial(low_confidence, schedule=of_times), confidence="scaled"),
    "dream_topk_margin": Policy(partial(topk_margin, schedule=of_times), confidence="scaled"),
    "dream_entropy": Policy(partial(entropy, schedule=of_times), confidence="scaled"),
    # block diffusion
    "sdar_sequential": Policy(partial(sequential, schedule=of_block_length), confidence="scaled"),
    "sdar_static": Policy(partial(low_confidence, schedule=of_block_length), confidence="scaled"),
    "sdar_dynamic": Policy(
        partial(threshold, threshold=0.85, inclusive=False, at_least=of_block_length),
        confidence="scaled",
        adaptive=True,
    ),
    "sdar_entropy_bounded": Policy(partial(entropy_bounded, bound=0.35), scheduled=False, confidence="scaled"),
    "llada2": Policy(
        partial(threshold, threshold=0.95, inclusive=False, at_least=of_block_length),
        confidence="scaled",
        adaptive=True,
    ),
    "llada2.1": Policy(
        partial(joint_threshold, threshold=0.95, edit_threshold=0.9),
        scheduled=False,
        confidence="scaled",
        revises=True,
    ),
    "fast_dllm_v2": Policy(partial(threshold, threshold=0.95, inclusive=False), scheduled=False),
    "bd3lm_first_hitting": Policy(partial(random, schedule=of_one), scheduled=False),
    # discrete diffusion
    "mdlm": Policy(ancestral, time=falling_time),
    "remdm_cap": _remdm("cap", 0.008),
    "remdm_rescale": _remdm("rescale", 0.015),
    "remdm_conf": _remdm("conf", 1.0),
    "remdm_loop": _remdm("loop", 0.02),
}


def as_policy(policy: str | Policy | UniformDiffusion | Rule) -> Policy | UniformDiffusion:
    """A policy by its name, of a rule, or as it is.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(f"unknown policy {policy!r}; expected one of {', '.join(POLICIES)}")
        return POLICIES[policy]
    return policy if isinstance(policy, Policy | UniformDiffusion) else Policy(policy)
