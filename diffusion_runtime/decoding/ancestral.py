"""Rules that follow the reverse process: each position is unmasked, or masked again, by a draw of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from diffusion_runtime.decoding.canvas import Canvas, Decision, time_of, unmasked_share
from diffusion_runtime.decoding.ranked import order_noise
from diffusion_runtime.ops import TokenSamples

_TINY = 1e-300  # where a share is 0 / 0, and does not matter


def origin(samples: TokenSamples, canvas: Canvas, *, last_time: float = 1e-3) -> Tensor:
    """Dream's ``origin``: each undecided position takes its candidate with probability ``1 - s / t``, the last all.

    Times fall evenly from 1 to ``last_time`` (``_sample`` of the published ``generation_utils.py``).
    """
    del samples
    chance = torch.where(canvas.index >= canvas.num_steps - 1, 1.0, unmasked_share(canvas, last_time=last_time))
    return canvas.masked & (order_noise(canvas) < chance[:, None])


def falling_time(canvas: Canvas, *, last_time: float = 1e-5) -> Tensor:
    """The time of a step of :func:`ancestral`, whose last one stands at ``last_time``: ``[batch]`` float32."""
    return time_of(canvas.index, (canvas.num_steps - 1).clamp(min=1), last_time)


def ancestral(samples: TokenSamples, canvas: Canvas, *, last_time: float = 1e-5) -> Decision:
    """MDLM's sampler (Sahoo et al., 2024, equation 6 with the log-linear schedule, where the share masked is ``t``).

    From ``t`` to ``s`` each undecided position takes a drawn token with probability ``(t - s) / t``. Of ``num_steps``
    steps the last is the published ``noise_removal``: whatever is still undecided takes its most probable token; the
    others go through times that fall evenly from 1 to ``last_time``. The published code draws a position's fate and its
    token at once, from weights in float32.
    """
    last = canvas.index >= canvas.num_steps - 1
    chance = unmasked_share(replace(canvas, num_steps=(canvas.num_steps - 1).clamp(min=1)), last_time=last_time)
    commits = canvas.masked & (last[:, None] | (order_noise(canvas) < chance[:, None]))
    return Decision(commits, candidates=torch.where(last[:, None], samples.argmax, samples.token))


def remask(
    samples: TokenSamples,
    canvas: Canvas,
    *,
    kind: Literal["cap", "rescale", "conf", "loop"],
    eta: float,
    last_time: float = 1e-5,
    loop_start: float = 0.55,
    loop_end: float = 0.05,
    loop_alpha: float = 0.9,
) -> Decision:
    """ReMDM (Wang et al., 2025, arXiv 2503.00307): decided positions may be masked again, with probability ``sigma``.

    With ``alpha = 1 - t`` the share that is decided, a step from ``t`` to ``s`` masks each decided position again with
    probability ``sigma``, and decides each undecided one with probability ``(alpha_s - (1 - sigma) alpha_t) / (1 -
    alpha_t)``. The last step decides everything, by its most probable token.

    Args:
        kind: of ``sigma``, whose largest possible value is ``sigma_max = min(1, (1 - alpha_s) / alpha_t)``:

            * ``"cap"``: ``min(eta, sigma_max)``;
            * ``"rescale"``: ``eta * sigma_max``;
            * ``"conf"``: ``eta * sigma_max``, shared out over the decided positions by ``softmax(-confidence)``, the
              confidence a token had when it was committed; undecided ones go by MDLM's steps;
            * ``"loop"``: MDLM's steps while ``t > loop_start``, rescaled to reach ``loop_alpha`` there; then a constant
              ``alpha`` and ``sigma = eta``; then MDLM's steps again, from ``t <= loop_end`` on.
        eta: in [0, 1]. Released runs: 0.008 (cap), 0.015 (rescale), 1 (conf), 0.02 (loop).
        last_time: of the step before the last.
        loop_start, loop_end, loop_alpha: of ``"loop"``.
    """
    num_times = (canvas.num_steps - 1).clamp(min=1)
    now, then = (time_of(canvas.index + i, num_times, last_time).double() for i in (0, 1))
    if kind == "loop":
        alpha_now, alpha_then = (_loop_alpha(now, t, loop_start, loop_end, loop_alpha) for t in (now, then))
        sigma = torch.where((now <= loop_start) & (now > loop_end), eta, 0.0)
    else:
        alpha_now, alpha_then = 1 - now, 1 - then
        most = ((1 - alpha_then) / alpha_now.clamp(min=_TINY)).clamp(max=1)
        sigma = most.clamp(max=eta) if kind == "cap" else eta * most
    sigmas = sigma[:, None].expand(canvas.masked.shape)
    decided = canvas.editable & ~canvas.masked
    if kind == "conf":
        doubt = (-canvas.confidence.double()).masked_fill(~decided, -torch.inf)
        sigmas, sigma = sigmas * doubt.softmax(1), torch.zeros_like(sigma)
    chance = (alpha_then - (1 - sigma) * alpha_now) / (1 - alpha_now).clamp(min=_TINY)
    noise = order_noise(canvas)
    last = (canvas.index >= canvas.num_steps - 1)[:, None]
    commits = canvas.masked & (last | (noise < chance[:, None]))
    again = decided & (noise < sigmas) & ~last
    return Decision(commits, candidates=torch.where(last, samples.argmax, samples.token), remask=again)


def _loop_alpha(segment: Tensor, t: Tensor, start: float, end: float, plateau: float) -> Tensor:
    """The share that is decided at ``t``, by the formula that holds at the time ``segment``."""
    before = (1 - t) * (plateau / (1 - start))
    after = 1 - t * ((1 - plateau) / end)
    return torch.where(segment > start, before, torch.where(segment > end, plateau, after))
