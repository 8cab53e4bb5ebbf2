"""Rules that commit a set number of positions, the best first."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion_runtime.decoding.canvas import Canvas, Schedule, linear
from diffusion_runtime.ops import DRAW_ORDER, TokenSamples, philox_uniforms, select_commits


def low_confidence(
    samples: TokenSamples, canvas: Canvas, *, schedule: Schedule = linear, order_temperature: float = 0.0
) -> Tensor:
    """The candidates of highest probability are kept: LLaDA's ``low_confidence``, Dream's ``maskgit_plus``.

    LLaDA takes the probability at temperature 1, drawn or not (Nie et al., 2025, algorithm 5 and ``generate.py``);
    Dream and SDAR (``low_confidence_static``) that under the distribution that is drawn from.

    Args:
        schedule: how many are kept.
        order_temperature: Dream's ``alg_temp``; see :func:`ranked`.
    """
    return ranked(samples.logprob.exp() if order_temperature else samples.logprob, canvas, schedule, order_temperature)


def random(samples: TokenSamples, canvas: Canvas, *, schedule: Schedule = linear) -> Tensor:
    """Positions by keyed uniform noise: LLaDA's ``random``; one at a time, BD3LM's first hitting sampler."""
    del samples
    return ranked(order_noise(canvas).float(), canvas, schedule)


def topk_margin(
    samples: TokenSamples, canvas: Canvas, *, schedule: Schedule = linear, order_temperature: float = 0.0
) -> Tensor:
    """Where the best token leads the second best by most (Kim et al., 2025; Dream's ``topk_margin``)."""
    return ranked(samples.margin, canvas, schedule, order_temperature)


def entropy(
    samples: TokenSamples, canvas: Canvas, *, schedule: Schedule = linear, order_temperature: float = 0.0
) -> Tensor:
    """Where the entropy is lowest (Dream's ``entropy``, which adds 1e-10 to each probability)."""
    return ranked(-samples.entropy, canvas, schedule, order_temperature)


def sequential(samples: TokenSamples, canvas: Canvas, *, schedule: Schedule = linear) -> Tensor:
    """From the left (SDAR's ``sequential``, which counts from the first mask and overwrites what is decided)."""
    del samples
    return canvas.masked & (canvas.masked.cumsum(1) <= schedule(canvas)[:, None])


def ranked(score: Tensor, canvas: Canvas, schedule: Schedule = linear, order_temperature: float = 0.0) -> Tensor:
    """The masked positions of highest score, ties to the left.

    With ``order_temperature`` ``T`` above 0 they are drawn without replacement from ``softmax(score / T)``, which is to
    take the highest of ``score / T`` plus Gumbel noise (Dream's ``alg_temp``; Kool et al., 2019).

    Args:
        score: ``[batch, length]`` float32.
        canvas: whose masked positions are ranked.
        schedule: how many are taken.
        order_temperature: at least 0.

    Returns:
        ``[batch, length]`` bool.
    """
    if order_temperature > 0:
        uniform = order_noise(canvas).clamp(min=2.0**-54)
        score = (score.double() / order_temperature - (-uniform.log()).log()).float()
    return select_commits(score, canvas.masked, rule="quota", bound=schedule(canvas))


def order_noise(canvas: Canvas) -> Tensor:
    """A uniform in [0, 1) for each position of this step: ``[batch, length]`` float64."""
    uniform: Tensor = philox_uniforms(canvas.seed, canvas.position, canvas.step, DRAW_ORDER)[0]
    return torch.broadcast_to(uniform, canvas.masked.shape)
