"""The denoising loop: forward, sample, commit, until nothing is masked or nothing changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion_runtime import ops
from diffusion_runtime.decoding import POLICIES, Canvas, Policy, Rule, UniformDiffusion, linear_quotas


@dataclass(frozen=True)
class Step:
    """What one denoising step did."""

    index: int  # counts the forwards of the whole run, from 0
    block: slice  # the canvas, in the sequence
    tokens: Tensor  # [batch, length] int64 after this step; a copy. In uniform diffusion to the end of the block, the
    # most probable token at each of its positions
    commit_mask: Tensor  # [batch, length] bool: the positions that this step decided, or kept
    samples: ops.TokenSamples  # [batch, block length]; token -1 where nothing was undecided


class Denoiser:
    """Decides undecided positions of token sequences with a model, step by step.

    Args:
        model: a module, or any callable, from ``[batch, length]`` int64 tokens to ``[batch, length, vocab]`` logits, or
            to an object that has them as ``.logits``. It runs as it is: put it into evaluation mode if it has one that
            matters. In uniform diffusion it is shown the sequence to the end of the current block; if it has an
            attribute ``self_conditioning_embedding`` (``[vocab, dim]``), it is called with ``self_conditioning=`` as
            well: ``[batch, block length, dim]``, the embedding that the step before expects at each position of the
            block (0 at a block's first step).
        policy: what a step commits: a name of :data:`diffusion_runtime.decoding.POLICIES`, a
            :class:`~diffusion_runtime.decoding.Policy`, a rule of your own (which is then scheduled), or a
            :class:`~diffusion_runtime.decoding.UniformDiffusion`.
        num_steps: forwards in all, split evenly over the blocks, of whose number it must be a multiple; a block without
            masked positions takes none of its share. None: one position per forward in the row that has most. A
            policy without a schedule takes None only. In uniform diffusion, which may stop early, the most forwards;
            None: what the policy says, for each block.
        block_length: blocks are decided one after the other, from the left. None: everything is one block. The last
            block may be shorter.
        temperature: 0 takes the most probable token; above, tokens are drawn. Confidences stay those at temperature 1.
            Uniform diffusion has its own.
        mask_token_id: the token of an undecided position. None: ``model.mask_token_id``. It is never a candidate.
            Uniform diffusion has none.
        backend: of :func:`diffusion_runtime.ops.sample_tokens`, and of ``soft_embedding`` for self-conditioning.

    A row depends on its own tokens and seed alone, never on its neighbours in the batch, as far as the model's own
    arithmetic does not depend on the shape of its batch.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        policy: str | Policy | UniformDiffusion | Rule = "low_confidence",
        num_steps: int | None = None,
        block_length: int | None = None,
        temperature: float = 0.0,
        mask_token_id: int | None = None,
        backend: str | None = None,
    ) -> None:
        if isinstance(policy, str):
            if policy not in POLICIES:
                raise ValueError(f"unknown policy {policy!r}; expected one of {', '.join(POLICIES)}")
            policy = POLICIES[policy]
        self.policy = policy if isinstance(policy, Policy | UniformDiffusion) else Policy(policy)
        for name, value in (("num_steps", num_steps), ("block_length", block_length)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {value}")
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
        if isinstance(self.policy, UniformDiffusion):
            if temperature != 0.0 or mask_token_id is not None:
                raise ValueError(
                    "uniform diffusion has temperatures of its own and no mask token: temperature and mask_token_id "
                    f"must not be given, got {temperature} and {mask_token_id}"
                )
            mask_token_id = -1  # which no token is
        elif num_steps is not None and not self.policy.scheduled:
            raise ValueError(f"the policy decides itself when it is done: num_steps must be None, got {num_steps}")
        elif mask_token_id is None:
            mask_token_id = getattr(model, "mask_token_id", None)
            if mask_token_id is None:
                raise ValueError("mask_token_id is needed: the model has no attribute of that name")
        self.model = model
        self.num_steps = num_steps
        self.block_length = block_length
        self.temperature = temperature
        self.mask_token_id = mask_token_id
        self.backend = backend

    def generate(self, tokens: Tensor, *, max_new_tokens: int, seed: Tensor | int = 0) -> Tensor:
        """Append ``max_new_tokens`` tokens to each prompt.

        Args:
            tokens: ``[batch, length]`` int64 prompts without masked positions.
            max_new_tokens: at least 1.
            seed: of every row, or ``[batch]`` int64: one for each. Equal prompts with equal seeds get equal answers.

        Returns:
            ``[batch, length + max_new_tokens]`` int64.
        """
        return self._last(self.stream(tokens, max_new_tokens=max_new_tokens, seed=seed))

    def infill(self, tokens: Tensor, *, seed: Tensor | int = 0) -> Tensor:
        """Fill every position that holds the mask token; the others never change. Not in uniform diffusion.

        Args:
            tokens: ``[batch, length]`` int64, not written to.
            seed: as in :meth:`generate`.

        Returns:
            ``[batch, length]`` int64.
        """
        return self._last(self.stream(tokens, seed=seed), default=tokens)

    @torch.no_grad()
    def stream(self, tokens: Tensor, *, max_new_tokens: int | None = None, seed: Tensor | int = 0) -> Iterator[Step]:
        """Yield a :class:`Step` after each forward: of :meth:`generate`, or without ``max_new_tokens`` of infill."""
        self._check(tokens, max_new_tokens)
        seeds = self._seeds(seed, tokens)
        if isinstance(self.policy, Policy):
            yield from self._from_masks(self.policy, tokens, max_new_tokens, seeds)
        elif max_new_tokens is None:
            raise ValueError("uniform diffusion has no masked positions to fill; max_new_tokens must be given")
        else:
            yield from self._from_noise(self.policy, tokens, max_new_tokens, seeds)

    def _from_masks(self, policy: Policy, tokens: Tensor, max_new_tokens: int | None, seeds: Tensor) -> Iterator[Step]:
        origin = 0 if max_new_tokens is None else tokens.shape[1]
        tokens = torch.nn.functional.pad(tokens, (0, max_new_tokens or 0), value=self.mask_token_id)
        position = torch.arange(tokens.shape[1], device=tokens.device)
        steps = torch.zeros_like(seeds)
        index = 0
        for block in self._blocks_with_masks(tokens == self.mask_token_id, origin):
            num_masked = (tokens[:, block] == self.mask_token_id).sum(1)
            # one position a forward, or a share of all blocks, not of those that the batch has masks in: a row would
            # depend on its neighbours
            share = self._steps_of_block(tokens.shape[1] - origin) or int(num_masked.max())
            for quota in linear_quotas(num_masked, share):
                canvas = Canvas(tokens[:, block] == self.mask_token_id, quota, position[block], seeds, steps)
                if not policy.scheduled and not canvas.masked.any():
                    break
                logits = self._logits(tokens)
                samples = ops.sample_tokens(
                    logits[:, block],
                    temperature=self.temperature,
                    seed=canvas.seed,
                    position=canvas.position,
                    step=canvas.step,
                    masked=canvas.masked,
                    # a committed mask token would stay undecided for ever
                    suppress=[self.mask_token_id] if self.mask_token_id < logits.shape[-1] else None,
                    statistics="restricted",
                    backend=self.backend,
                )
                commit_mask = policy.rule(samples, canvas) & canvas.masked
                committed = ops.commit_tokens(tokens[:, block], samples.token, commit_mask)
                tokens = tokens.clone()  # the tensor of the previous Step stays as it was
                tokens[:, block] = committed
                yield Step(index, block, tokens, self._widen(commit_mask, block, tokens), samples)
                # a row counts the steps in which it had something to decide, or its draws would follow its neighbours
                steps = steps + canvas.masked.any(1, keepdim=True)
                index += 1

    def _from_noise(
        self, policy: UniformDiffusion, prompt: Tensor, max_new_tokens: int, seeds: Tensor
    ) -> Iterator[Step]:
        num_steps = self._steps_of_block(max_new_tokens) or policy.num_steps
        embedding: Tensor | None = getattr(self.model, "self_conditioning_embedding", None)
        steps = torch.zeros_like(seeds)
        tokens = prompt
        index = 0
        for block in self._blocks(prompt.shape[1], prompt.shape[1] + max_new_tokens):
            before = tokens
            canvas = policy.begin(torch.arange(block.start, block.stop, device=prompt.device), seeds, steps)
            expected = None if embedding is None else embedding.new_zeros(*canvas.tokens.shape, embedding.shape[1])
            for step in range(num_steps):
                logits = self._logits(torch.cat((before, canvas.tokens), 1), expected)[:, block]
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
                    backend=self.backend,
                )
                canvas = policy.step(samples, canvas)
                tokens = torch.cat((before, canvas.answer), 1)
                yield Step(index, block, tokens, self._widen(canvas.commit_mask, block, tokens), samples)
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
                        backend=self.backend,
                    )
            steps = canvas.step

    def _logits(self, tokens: Tensor, expected: Tensor | None = None) -> Tensor:
        output = self.model(tokens) if expected is None else self.model(tokens, self_conditioning=expected)
        logits: Tensor = getattr(output, "logits", output)
        if logits.shape[:2] != tokens.shape or logits.ndim != 3:
            raise ValueError(
                f"the model must give logits [{tokens.shape[0]}, {tokens.shape[1]}, vocab], got {tuple(logits.shape)}"
            )
        return logits

    def _check(self, tokens: Tensor, max_new_tokens: int | None) -> None:
        if tokens.ndim != 2 or tokens.dtype != torch.int64:
            raise ValueError(f"tokens must be [batch, length] int64, got {tuple(tokens.shape)} {tokens.dtype}")
        if max_new_tokens is None:
            return
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if (tokens == self.mask_token_id).any():
            raise ValueError(f"the prompt holds the mask token {self.mask_token_id}; infill fills masked positions")

    def _seeds(self, seed: Tensor | int, tokens: Tensor) -> Tensor:
        if not isinstance(seed, Tensor | int):
            raise TypeError(f"seed must be an int or a tensor, got {type(seed).__name__}")
        if isinstance(seed, int):
            if not -(2**63) <= seed < 2**64:
                raise ValueError(f"seed must have at most 64 bits, got {seed}")
            seed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed, device=tokens.device).expand(len(tokens))
        if seed.dtype != torch.int64 or seed.shape != tokens.shape[:1]:
            raise ValueError(f"seed must be an int or [{len(tokens)}] int64, got {tuple(seed.shape)} {seed.dtype}")
        return seed[:, None]

    def _blocks(self, origin: int, end: int) -> list[slice]:
        length = self.block_length or max(1, end - origin)
        return [slice(start, min(start + length, end)) for start in range(origin, end, length)]

    def _blocks_with_masks(self, masked: Tensor, origin: int) -> list[slice]:
        """The blocks of a grid that begins at ``origin`` in which any row has masked positions."""
        columns = masked.any(0).tolist()
        return [block for block in self._blocks(origin, masked.shape[1]) if any(columns[block])]

    def _steps_of_block(self, length: int) -> int | None:
        if self.num_steps is None:
            return None
        num_blocks = math.ceil(length / (self.block_length or length))
        if self.num_steps % num_blocks:
            raise ValueError(f"num_steps must be a multiple of the {num_blocks} blocks, got {self.num_steps}")
        return self.num_steps // num_blocks

    @staticmethod
    def _widen(commit_mask: Tensor, block: slice, tokens: Tensor) -> Tensor:
        wide = torch.zeros_like(tokens, dtype=torch.bool)
        wide[:, block] = commit_mask
        return wide

    @staticmethod
    def _last(steps: Iterator[Step], default: Tensor | None = None) -> Tensor:
        tokens = None if default is None else default.clone()
        for step in steps:
            tokens = step.tokens
        assert tokens is not None, "generate has at least one masked position"
        return tokens
