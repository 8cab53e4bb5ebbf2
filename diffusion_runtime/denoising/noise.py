"""The loop of uniform diffusion: every position of a canvas is judged anew at each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion_runtime import ops
from diffusion_runtime.decoding import UniformDiffusion

# index, blocks, tokens, commit_mask, samples: the fields of a Step
Fields = tuple[int, Sequence[slice], Tensor, Tensor, ops.TokenSamples]


def denoise_noise(
    model: Callable[..., Any],
    policy: UniformDiffusion,
    prompt: Tensor,
    blocks: Sequence[slice],
    num_steps: int | None,
    seeds: Tensor,
    backend: str | None,
) -> Iterator[Fields]:
    """Denoise one block after the other.

    Args:
        model: as :class:`diffusion_runtime.Denoiser` calls it in uniform diffusion.
        policy: the rules.
        prompt: ``[batch, length]`` int64.
        blocks: behind the prompt, one after the other.
        num_steps: of a block, at most; None for the policy's own.
        seeds: ``[batch]`` int64.
        backend: of the ops.
    """
    num_steps = num_steps or policy.num_steps
    embedding: Tensor | None = getattr(model, "self_conditioning_embedding", None)
    seeds = seeds[:, None]
    steps = torch.zeros_like(seeds)
    tokens = prompt
    index = 0
    for block in blocks:
        before = tokens
        canvas = policy.begin(torch.arange(block.start, block.stop, device=prompt.device), seeds, steps)
        expected = None if embedding is None else embedding.new_zeros(*canvas.tokens.shape, embedding.shape[1])
        for step in range(num_steps):
            logits = _logits(model, torch.cat((before, canvas.tokens), 1), expected)[:, block]
            if logits.shape[-1] != policy.vocab_size:
                raise ValueError(f"the model must give {policy.vocab_size} logits, got {logits.shape[-1]}")
            temperature = policy.temperature(step, num_steps)
            samples = ops.sample_tokens(
                logits,
                temperature=temperature,
                statistics_temperature=temperature,
                seed=canvas.seed,
                position=canvas.position,
                step=canvas.step,
                masked=canvas.live[:, None],
                backend=backend,
            )
            canvas = policy.step(samples, canvas)
            tokens = torch.cat((before, canvas.answer), 1)
            wide = torch.zeros_like(tokens, dtype=torch.bool)
            wide[:, block] = canvas.commit_mask
            yield index, [block] * len(tokens), tokens, wide, samples
            index += 1
            if (step + 1) % policy.check_every == 0 and not canvas.live.any():
                break
            if embedding is not None:
                expected = ops.soft_embedding(
                    logits,
                    embedding,
                    temperature=temperature,
                    masked=canvas.live[:, None],
                    logsumexp=samples.logsumexp,
                    backend=backend,
                )
        steps = canvas.step


def _logits(model: Callable[..., Any], tokens: Tensor, expected: Tensor | None) -> Tensor:
    output = model(tokens) if expected is None else model(tokens, self_conditioning=expected)
    logits: Tensor = getattr(output, "logits", output)
    if logits.shape[:2] != tokens.shape or logits.ndim != 3:
        raise ValueError(
            f"the model must give logits [{tokens.shape[0]}, {tokens.shape[1]}, vocab], got {tuple(logits.shape)}"
        )
    return logits
