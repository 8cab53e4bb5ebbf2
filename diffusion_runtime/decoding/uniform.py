"""Uniform diffusion: a canvas begins as noise over the whole vocabulary, and no position is ever settled.

At every step every position gets a candidate. The surest are kept, all others are noise again, so that a token kept in
one step may be gone in the next. What a canvas says is the most probable token of each position, not its noise.

Source: DiffusionGemma's generation in transformers 5.23 (``EntropyBoundSampler``, ``LinearTemperatureSchedule...``,
``StableAndConfidentStoppingCriteria``); the acceptance is that of the EB sampler (Ben-Hamu et al., 2025).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_runtime.ops import TokenSamples, commit_step, renoise


class NoisyCanvas(NamedTuple):
    """A canvas of uniform diffusion between two steps."""

    tokens: Tensor  # [batch, length] int64: what the model is shown next, kept tokens among noise
    answer: Tensor  # [batch, length] int64: the most probable token of each position at the last step; -1 before it
    commit_mask: Tensor  # [batch, length] bool: which candidates the last step kept
    num_stable: Tensor  # [batch] int64: for how many steps the answer has not changed
    live: Tensor  # [batch] bool: not finished; a finished row keeps what it has
    position: Tensor  # [length] int64: places in the sequence
    seed: Tensor  # [batch, 1] int64
    step: Tensor  # [batch, 1] int64: how many steps the row has taken, in earlier canvases too


@dataclass(frozen=True)
class UniformDiffusion:
    """The policy of uniform diffusion, with DiffusionGemma's rules and defaults.

    Args:
        vocab_size: noise is uniform over the tokens below it; the model must give as many logits.
        entropy_bound: in nats, finite. Of the positions in order of their entropy, those are kept before which the
            entropies sum up to at most this; the first always is. Ties go to the left.
        temperatures: of the first step and of the one that would come after the last, between which it falls (or
            rises) by equal parts; above 0. Draws, entropies and soft embeddings are those at this temperature.
        num_steps: of a canvas, at most; ``Denoiser(num_steps=...)`` goes before it.
        stable_steps: a row may finish once its answer has been the same for so many steps after the first that had it.
        confident_entropy: ... and if its entropies have a mean below this, in nats. 0: a row never finishes early.
        check_every: after how many steps the loop looks whether all rows have finished, which on a GPU waits for it. It
            changes no answer.

    A row finishes for itself: from then on it costs neither draws nor statistics, and keeps its answer.
    """

    vocab_size: int
    entropy_bound: float = 0.1
    temperatures: tuple[float, float] = (0.8, 0.4)
    num_steps: int = 48
    stable_steps: int = 1
    confident_entropy: float = 0.005
    check_every: int = 1

    def __post_init__(self) -> None:
        least = {"vocab_size": 1, "num_steps": 1, "stable_steps": 0, "check_every": 1}
        for name, smallest in least.items():
            if (value := getattr(self, name)) < smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {value}")
        if len(self.temperatures) != 2 or not all(math.isfinite(t) and t > 0 for t in self.temperatures):
            raise ValueError(f"temperatures must be two finite numbers above 0, got {self.temperatures}")
        if not math.isfinite(self.entropy_bound):
            raise ValueError(f"entropy_bound must be finite, got {self.entropy_bound}")
        if not self.confident_entropy >= 0:
            raise ValueError(f"confident_entropy must be at least 0, got {self.confident_entropy}")

    def temperature(self, index: int, num_steps: int) -> float:
        """Of step ``index`` of ``num_steps``."""
        first, last = self.temperatures
        return last + (first - last) * ((num_steps - index) / num_steps)

    def begin(self, position: Tensor, seed: Tensor, step: Tensor) -> NoisyCanvas:
        """A canvas of noise; shapes as in :class:`NoisyCanvas`."""
        batch, length = len(seed), len(position)
        nothing = torch.full((batch, length), -1, device=position.device)
        everywhere = torch.ones_like(nothing, dtype=torch.bool)
        return NoisyCanvas(
            tokens=renoise(nothing, everywhere, vocab=self.vocab_size, seed=seed, position=position, step=step),
            answer=nothing,
            commit_mask=~everywhere,
            num_stable=torch.zeros_like(seed[:, 0]),
            live=everywhere[:, 0],
            position=position,
            seed=seed,
            step=step,
        )

    def step(self, samples: TokenSamples, canvas: NoisyCanvas) -> NoisyCanvas:
        """The canvas after a step.

        Args:
            samples: at the canvas, drawn and measured at the step's temperature; finished rows do not matter.
            canvas: before the step.
        """
        live = canvas.live[:, None]
        step = canvas.step + live
        tokens, commit_mask = commit_step(
            canvas.tokens,
            samples.token,
            samples.entropy,
            live.expand_as(canvas.tokens),
            rule="entropy_bound",
            bound=self.entropy_bound,
            renoise_vocab=self.vocab_size,
            seed=canvas.seed,
            position=canvas.position,
            step=step,  # a canvas' first noise has the number of its first step, that of a step the next one
        )
        answer = torch.where(live, samples.argmax, canvas.answer)
        num_stable = (canvas.num_stable + 1) * (answer == canvas.answer).all(1)
        confident = samples.entropy.mean(1) < self.confident_entropy
        finished = (num_stable >= self.stable_steps) & confident
        return canvas._replace(
            tokens=tokens,
            answer=answer,
            commit_mask=commit_mask,
            num_stable=num_stable,
            live=canvas.live & ~finished,
            step=step,
        )
