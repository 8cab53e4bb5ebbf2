"""Rules that pick which candidates a step commits, each as it was published.

A rule is a pure function of the samples at the canvas and of the canvas itself; it returns a ``commit_mask``. Ties
among positions go to the lowest one. Confidences are float32 whatever the model computes in: in bfloat16 they
collapse, and ties then decide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor

from diffusion_runtime.ops import DRAW_ORDER, TokenSamples, philox_uniforms, select_commits


class Canvas(NamedTuple):
    """The positions that are denoised together, at one step."""

    masked: Tensor  # [batch, length] bool: still undecided
    quota: Tensor  # [batch] int64: how many a scheduled policy commits in this step
    position: Tensor  # [length] int64: places in the sequence
    seed: Tensor  # [batch, 1] int64
    step: Tensor  # [batch, 1] int64: how many steps the row has had something to decide in before this one


Rule = Callable[[TokenSamples, Canvas], Tensor]


@dataclass(frozen=True)
class Policy:
    """A rule, and how the loop drives it.

    Args:
        rule: returns the ``[batch, length]`` bool commit mask; True at a position that is not masked is an error of the
            rule and has no effect.
        scheduled: the number of steps is fixed ahead, and ``quota`` counts. Otherwise the loop goes on until nothing is
            masked, which it looks up after each step; the rule must commit at least one position of each row that has
            any.
    """

    rule: Rule
    scheduled: bool = True


def low_confidence(samples: TokenSamples, canvas: Canvas) -> Tensor:
    """LLaDA's ``low_confidence`` remasking: the ``quota`` candidates of highest probability are kept.

    The probability is the candidate's under the distribution at temperature 1, drawn or not (Nie et al., 2025,
    algorithm 5 and ``generate.py``).
    """
    return _highest(samples.logprob, canvas)


def random(samples: TokenSamples, canvas: Canvas) -> Tensor:
    """LLaDA's ``random`` remasking: ``quota`` positions by keyed uniform noise."""
    del samples
    return _highest(philox_uniforms(canvas.seed, canvas.position, canvas.step, DRAW_ORDER)[0].float(), canvas)


def topk_margin(samples: TokenSamples, canvas: Canvas) -> Tensor:
    """The ``quota`` positions where the best token leads the second best by most (Kim et al., 2025; Dream)."""
    return _highest(samples.margin, canvas)


def entropy(samples: TokenSamples, canvas: Canvas) -> Tensor:
    """The ``quota`` positions of lowest entropy (Dream's ``entropy``)."""
    return _highest(-samples.entropy, canvas)


def threshold(samples: TokenSamples, canvas: Canvas, *, threshold: float) -> Tensor:
    """Fast-dLLM's parallel decoding (Wu et al., 2025): every candidate of probability >= ``threshold``.

    The most probable candidate of a row is always committed. The published code compares in float64, this in float32.
    """
    return select_commits(samples.logprob.exp(), canvas.masked, rule="threshold", bound=threshold)


def _highest(score: Tensor, canvas: Canvas) -> Tensor:
    return select_commits(score, canvas.masked, rule="quota", bound=canvas.quota)


POLICIES = {
    "low_confidence": Policy(low_confidence),
    "random": Policy(random),
    "topk_margin": Policy(topk_margin),
    "entropy": Policy(entropy),
    "threshold": Policy(partial(threshold, threshold=0.9), scheduled=False),
}
