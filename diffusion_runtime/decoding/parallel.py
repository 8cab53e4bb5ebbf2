"""Rules that commit as many positions as the model is sure of."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from diffusion_runtime.decoding.canvas import Canvas, Decision, Schedule
from diffusion_runtime.ops import TokenSamples, select_commits


def threshold(
    samples: TokenSamples,
    canvas: Canvas,
    *,
    threshold: float,
    inclusive: bool = True,
    at_least: int | Schedule = 1,
    fallback: Literal["best", "leftmost"] = "best",
    near_best: float | None = None,
) -> Tensor:
    """Every candidate of probability at or above ``threshold``; if those are too few, a set number instead.

    Compared in float32, as the statistics are; Fast-dLLM's code for LLaDA compares in float64.

    ========================== ============= =========== ======================= ============
    system                     ``inclusive`` confidence  ``at_least``            ``fallback``
    ========================== ============= =========== ======================= ============
    Fast-dLLM v1 (LLaDA)       True          raw         1                       best
    Fast-dLLM v1 (Dream)       True          scaled      1                       best
    Fast-dLLM v2               False         raw         1                       best
    SDAR dynamic               False         scaled      :func:`of_block_length` best
    LLaDA2.0                   False         scaled      :func:`of_block_length` best
    JetEngine, in batches      False         scaled      :func:`of_block_length` leftmost
    dInfer (``near_best`` 1e-5) True         raw         1                       best
    ========================== ============= =========== ======================= ============

    Args:
        threshold: a probability.
        inclusive: whether a candidate of exactly that probability passes.
        at_least: how many positions are committed where fewer pass: a number, or a schedule.
        fallback: which: those of highest probability, or the leftmost.
        near_best: candidates within this of the best one pass as well.
    """
    score = samples.logprob.exp()
    bound = _float32(threshold, score, strictly_above=not inclusive)
    if near_best is not None:
        best = score.masked_fill(~canvas.masked, -math.inf).amax(1)
        bound = torch.minimum(bound, best - near_best)
    return _passing(score, canvas, bound, at_least, fallback)


def _float32(threshold: float, beside: Tensor, *, strictly_above: bool) -> Tensor:
    """The smallest float32 that passes."""
    bound = torch.tensor(threshold, dtype=torch.float32, device=beside.device)
    return torch.nextafter(bound, torch.full_like(bound, math.inf)) if strictly_above else bound


def _passing(score: Tensor, canvas: Canvas, bound: Tensor, at_least: int | Schedule, fallback: str = "best") -> Tensor:
    if at_least == 1 and fallback == "best":
        return select_commits(score, canvas.masked, rule="threshold", bound=bound)
    passing = canvas.masked & (score >= bound.view(-1, 1))
    least = torch.full_like(canvas.index, at_least) if isinstance(at_least, int) else at_least(canvas)
    places = torch.arange(score.shape[1], device=score.device)
    order = score if fallback == "best" else -places.float().expand_as(score)
    instead = select_commits(order, canvas.masked, rule="quota", bound=least)
    return torch.where((passing.sum(1) >= least)[:, None], passing, instead)


def factor(samples: TokenSamples, canvas: Canvas, *, factor: float) -> Tensor:
    """Fast-dLLM's factor rule: the ``n`` surest, ``n`` the largest with ``(n + 1) (1 - c_n) < factor``; at least one.

    The paper's rule (Wu et al., 2025, theorem 1). The published code commits one more where the last position of a
    block is the first to fail.
    """
    return select_commits(samples.logprob.exp(), canvas.masked, rule="factor", bound=factor)


def entropy_bounded(
    samples: TokenSamples,
    canvas: Canvas,
    *,
    bound: float,
    order: Literal["entropy", "confidence", "margin"] = "entropy",
) -> Tensor:
    """The EB sampler (Ben-Hamu et al., 2025): the longest start of the order whose joint error is bounded.

    With the entropies ``H_1, H_2, ...`` of the positions in order, the largest ``n`` with ``H_1 + ... + H_n - max(H_1,
    ..., H_n) <= bound``; at least one. Ordered by entropy, the maximum is the last. SDAR's ``entropy_bounded``, which
    as published does not run, means the same without subtracting the maximum.

    Args:
        bound: in nats.
        order: lowest entropy, highest probability of the most probable token, or highest margin first. Ties go to the
            left.
    """
    if order == "entropy":
        return select_commits(samples.entropy, canvas.masked, rule="entropy_bound", bound=bound)
    score = samples.confidence if order == "confidence" else samples.margin
    ranking = score.masked_fill(~canvas.masked, -math.inf).sort(stable=True, dim=1, descending=True).indices
    entropies = samples.entropy.double().masked_fill(~canvas.masked, math.inf).gather(1, ranking)
    within = entropies.cumsum(1) - entropies.cummax(1).values <= bound
    within[:, 0] = True
    # what comes before never shrinks, so the positions that hold are a start; inf - inf behind it does not compare
    return torch.zeros_like(canvas.masked).scatter(1, ranking, within) & canvas.masked


def joint_threshold(
    samples: TokenSamples,
    canvas: Canvas,
    *,
    threshold: float,
    edit_threshold: float,
    at_least: int = 1,
    max_edit_steps: int = 16,
) -> Decision:
    """LLaDA2.1: masked positions are committed, and decided ones overwritten, in the same step.

    A masked position is committed if its candidate's probability is above ``threshold``; if fewer than ``at_least``
    are, the best instead. A decided position that the caller did not give takes its candidate if that differs and is
    above ``edit_threshold``. The block is finished when nothing was undecided and nothing changed, or after
    ``max_edit_steps`` steps that began with nothing undecided (Bie et al., 2026, arXiv 2602.08676, and the released
    ``generate``).

    Args:
        threshold, edit_threshold: probabilities; compared as strictly greater. Where another runtime edits only if the
            second is above 0 (diffusers), leave this rule out instead.
        at_least: see :func:`threshold`.
        max_edit_steps: at least 1.
    """
    probability = samples.logprob.exp()
    commits = _passing(probability, canvas, _float32(threshold, probability, strictly_above=True), at_least)
    edits = canvas.editable & ~canvas.masked & (samples.token != canvas.tokens) & (probability > edit_threshold)
    nothing_masked = ~canvas.masked.any(1)
    finished = nothing_masked & (~edits.any(1) | (canvas.num_mask_free + 1 >= max_edit_steps))
    return Decision(commits | edits, finished=finished)
