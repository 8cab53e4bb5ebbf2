"""What a rule is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffusion_runtime.ops import TokenSamples


@dataclass(frozen=True, eq=False)
class Canvas:
    """The positions that are denoised together, as they are before a step. A row is a request."""

    tokens: Tensor  # [batch, length] int64, the mask token where undecided
    masked: Tensor  # [batch, length] bool: undecided
    editable: Tensor  # [batch, length] bool: not given by the caller; the masked ones and what was decided before
    position: Tensor  # [length] or [batch, length] int64: places in the sequence
    seed: Tensor  # [batch, 1] int64
    step: Tensor  # [batch, 1] int64: how many steps the row has had something to decide in before this one
    index: Tensor  # [batch] int64: how many of them in this block
    num_steps: Tensor  # [batch] int64: steps that the block is to take, where the policy is scheduled
    num_positions: Tensor  # [batch] int64: of the row's block, which may be shorter than others
    num_masked: Tensor  # [batch] int64: how many of them were undecided when the block began
    num_mask_free: Tensor  # [batch] int64: how many steps of this block began with nothing undecided
    confidence: Tensor  # [batch, length] float32: the probability that a decided token had when it was committed, or 1

    @property
    def quota(self) -> Tensor:
        """``[batch]`` int64: how many positions LLaDA's schedule commits in this step (:func:`linear`)."""
        return linear(self)


class Decision(NamedTuple):
    """What a step does, where it is more than committing candidates until nothing is undecided."""

    commit_mask: Tensor  # [batch, length] bool: positions that take their candidate; only editable ones do
    candidates: Tensor | None = None  # [batch, length] int64; None: the sampled tokens
    remask: Tensor | None = None  # [batch, length] bool: decided positions that become undecided again
    finished: Tensor | None = None  # [batch] bool: the block is done; None: when nothing is undecided


Rule = Callable[[TokenSamples, Canvas], Tensor | Decision]
Schedule = Callable[[Canvas], Tensor]


def undecided_share(canvas: Canvas) -> Tensor:
    """Of the positions of a block, how many are undecided: ``[batch]`` float32 in [0, 1]."""
    return canvas.masked.sum(1) / canvas.num_positions.clamp(min=1)


@dataclass(frozen=True)
class Policy:
    """A rule, and how the loop drives it.

    Args:
        rule: a pure function of the samples and of the canvas that gives the ``[batch, length]`` bool commit mask, or a
            :class:`Decision`. A position that it may not change is left as it is.
        scheduled: the number of steps is fixed ahead. Otherwise a block goes on until it is finished; the rule must
            then change something in every step.
        confidence: which distribution the statistics of the samples are of: ``"raw"``, that at temperature 1;
            ``"scaled"``, the one that is drawn from. Both leave out what may not be drawn: the mask token, suppressed
            tokens, and what top-k, top-p and min-p cut off. They are float32 whatever the model computes in.
        adaptive: a scheduled block may be finished before its steps are over, and the loop looks whether it is.
        revises: decided positions get candidates too.
        remasks: decided positions may become undecided again: a block takes all of its steps.
        time: where in the noising process a canvas stands, ``[batch]`` in [0, 1]: a model that is conditioned on the
            noise level is told so.
    """

    rule: Rule
    scheduled: bool = True
    confidence: Literal["raw", "scaled"] = "raw"
    adaptive: bool = False
    revises: bool = False
    remasks: bool = False
    time: Schedule = undecided_share

    def __post_init__(self) -> None:
        if self.confidence not in ("raw", "scaled"):
            raise ValueError(f"confidence must be 'raw' or 'scaled', got {self.confidence!r}")


def _even_share(count: Tensor, canvas: Canvas) -> Tensor:
    steps = canvas.num_steps.clamp(min=1)
    return count // steps + (canvas.index < count % steps)


def linear(canvas: Canvas) -> Tensor:
    """LLaDA's schedule: as even as whole numbers allow, the larger shares first.

    Of ``n`` positions undecided when the block began, step ``s`` of ``S`` commits ``n // S``, plus one if
    ``s < n % S``. Source: ``get_num_transfer_tokens`` of the published LLaDA ``generate.py``.

    Returns:
        ``[batch]`` int64.
    """
    return _even_share(canvas.num_masked, canvas)


def of_block_length(canvas: Canvas) -> Tensor:
    """SDAR's and LLaDA2's schedule: the shares of :func:`linear`, of all positions of the block.

    A block that holds the end of a prompt is then done early. Source: ``get_num_transfer_tokens`` of SDAR's
    ``generate.py``.
    """
    return _even_share(canvas.num_positions, canvas)


def of_one(canvas: Canvas) -> Tensor:
    """One position in every step: ``[batch]`` int64."""
    return torch.ones_like(canvas.num_masked)


def of_times(canvas: Canvas, *, last_time: float = 1e-3) -> Tensor:
    """Dream's schedule: the share of what is undecided now that lies between two times, rounded down.

    Times fall evenly from 1 to ``last_time``; step ``i`` goes from ``t_i`` to ``t_(i+1)`` and commits
    ``1 - t_(i+1) / t_i`` of the undecided positions, the last step all of them. A step may commit nothing. Source:
    ``_sample`` of the published Dream ``generation_utils.py``, which counts the mean over the batch instead, and so
    turns decided positions of a row that has fewer back into masks.
    """
    masked = canvas.masked.sum(1)
    share = (masked.float() * unmasked_share(canvas, last_time=last_time)).long()
    return torch.where(canvas.index >= canvas.num_steps - 1, masked, share)


def unmasked_share(canvas: Canvas, *, last_time: float) -> Tensor:
    """``1 - t_(i+1) / t_i`` of times that fall evenly from 1 to ``last_time``: ``[batch]`` float32."""
    return 1 - time_of(canvas.index + 1, canvas.num_steps, last_time) / time_of(
        canvas.index, canvas.num_steps, last_time
    )


def time_of(index: Tensor, num_steps: Tensor, last_time: float) -> Tensor:
    """Entry ``index`` of ``torch.linspace(1, last_time, num_steps + 1)``, up to rounding: ``[batch]`` float32."""
    step = torch.tensor(last_time - 1.0, dtype=torch.float32, device=index.device) / num_steps
    from_start = 1 + step * index
    from_end = last_time - step * (num_steps - index)
    return torch.where(index < (num_steps + 1) // 2, from_start, from_end)
