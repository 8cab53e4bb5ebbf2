"""The denoising loop: forward, sample, commit, until nothing is masked or nothing changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from diffusion_runtime import ops
from diffusion_runtime.cache import check_cache
from diffusion_runtime.constraints import Automaton
from diffusion_runtime.decoding import Policy, Rule, UniformDiffusion, as_policy
from diffusion_runtime.denoising import (
    Batch,
    Defaults,
    Forward,
    Request,
    Result,
    Step,
    blocks_between,
    check_prompts,
    decide,
    denoise_noise,
    judge_rows,
    last_tokens,
    num_steps_per_block,
    result_of,
    row_of,
    seeds_of,
    stop_strings,
)
from diffusion_runtime.models import LanguageModel, wrap

__all__ = ["Denoiser", "Request", "Result", "Step", "stop_strings", "wrap"]


class Denoiser:
    """Decides undecided positions of token sequences with a model, step by step.

    Args:
        model: a native model, or one that :func:`wrap` has made of any module; any other callable from ``[batch,
            length]`` int64 tokens to logits is wrapped here. It runs as it is: put it into evaluation mode if it has
            one that matters. In uniform diffusion it is called with the sequence to the end of the current block; if it
            has an attribute ``self_conditioning_embedding`` (``[vocab, dim]``), it is called with
            ``self_conditioning=`` as well: ``[batch, block length, dim]``, the embedding that the step before expects
            at each position of the block (0 at a block's first step).
        policy: what a step commits: a name of :data:`diffusion_runtime.decoding.POLICIES`, a
            :class:`~diffusion_runtime.decoding.Policy`, a rule of your own (which is then scheduled), or a
            :class:`~diffusion_runtime.decoding.UniformDiffusion`.
        num_steps: forwards in all, split evenly over the blocks, of whose number it must be a multiple; a block without
            masked positions takes none of its share. None: as many as a block has positions. A policy without a
            schedule takes None only. In uniform diffusion, which may stop early, the most forwards; None: what the
            policy says, for each block.
        steps_per_block: the same for one block, instead.
        block_length: blocks are decided one after the other, from the left. None: that of the model's attention, or
            everything is one block. The last block may be shorter. Where the model's attention is causal from block to
            block, blocks lie on its grid, which begins at the first token; else they begin behind the prompt.
        temperature: 0 takes the most probable token; above, tokens are drawn. Uniform diffusion has its own.
        top_k, top_p, min_p: which tokens may be drawn; see :func:`diffusion_runtime.ops.sample_tokens`.
        guidance_scale: classifier-free guidance ``w``: logits become ``u + (w + 1) (c - u)``, where ``u`` are those of
            the sequence with every given token masked (Nie et al., 2025, appendix A.2). It takes two forwards at once,
            whose states are combined before the head. 0: none.
        suppress: tokens that are never drawn, at any temperature, and have no share in a confidence.
        stop_token_ids: a sequence ends at the first of these, once everything before it is decided.
        constraint: a language that answers are in; see :class:`~diffusion_runtime.Request`.
        mask_token_id: the token of an undecided position. None: ``model.mask_token_id``. It is never a candidate.
            Uniform diffusion has none.
        cache: what is not computed again: see :mod:`diffusion_runtime.cache`. None: ``"block"``, which is exact, where
            the model's attention is causal from block to block and it is not conditioned on the noise level, else
            ``"none"``. With ``"block"`` the keys of prompts and answers stay for later requests and calls that begin
            with the same tokens.
        refresh_interval: of ``"prefix"`` and ``"dual"``: after how many steps of a block all keys are computed anew;
            None: at its first step only.
        backend: of the op that samples, and of ``soft_embedding`` for self-conditioning.
        check_every: after how many steps the loop looks which rows have finished their block, where a policy may
            finish early; on a GPU a look waits for it. It changes no answer. On a CPU the loop always looks.

    A row depends on its own tokens and seed alone, never on its neighbours in the batch, as far as the model's own
    arithmetic does not depend on the shape of its batch.
    """

    def __init__(
        self,
        model: LanguageModel | Callable[..., Any],
        *,
        policy: str | Policy | UniformDiffusion | Rule = "low_confidence",
        num_steps: int | None = None,
        steps_per_block: int | None = None,
        block_length: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        guidance_scale: float = 0.0,
        suppress: Sequence[int] = (),
        stop_token_ids: Sequence[int] = (),
        constraint: Automaton | None = None,
        mask_token_id: int | None = None,
        cache: str | None = None,
        refresh_interval: int | None = None,
        backend: str | None = None,
        check_every: int = 1,
    ) -> None:
        self.policy = as_policy(policy)
        if check_every < 1:
            raise ValueError(f"check_every must be at least 1, got {check_every}")
        if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
            raise ValueError(f"guidance_scale must be finite and at least 0, got {guidance_scale}")
        self.model = model
        if isinstance(self.policy, UniformDiffusion):
            options = (top_k, top_p, min_p, constraint, mask_token_id, cache, refresh_interval)
            if any(option is not None for option in options) or any((temperature, guidance_scale, check_every > 1)):
                raise ValueError(
                    "uniform diffusion has temperatures of its own and no mask token, cache, cuts or constraint"
                )
            if suppress or stop_token_ids:
                raise ValueError("uniform diffusion takes neither suppress nor stop_token_ids")
            mask_token_id = -1  # which no token is
        elif mask_token_id is None:
            mask_token_id = getattr(model, "mask_token_id", None)
            if mask_token_id is None:
                raise ValueError("mask_token_id is needed: the model has no attribute of that name")
        self.language_model = model if isinstance(model, LanguageModel) else wrap(model, mask_token_id=mask_token_id)
        grid = self.language_model.block_length
        if grid is not None and block_length not in (None, grid):
            raise ValueError(f"block_length must be {grid}, as the model's attention has it, got {block_length}")
        self.defaults = Defaults(
            policy=self.policy,
            num_steps=num_steps,
            steps_per_block=steps_per_block,
            block_length=block_length or grid,
            absolute=grid is not None,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            suppress=suppress,
            stop_token_ids=stop_token_ids,
            constraint=constraint,
        )
        cache = cache or ("none" if grid is None or self.language_model.noise_conditioned else "block")
        check_cache(cache, grid, refresh_interval, has_keys=self.language_model.key_shape is not None)
        self._forward = Forward(self.language_model, cache, refresh_interval, guidance_scale)
        self.mask_token_id = mask_token_id
        self.backend = backend
        self.check_every = check_every
        weight = next(self.language_model.parameters(), None)
        self._device = torch.device("cpu") if weight is None else weight.device

    def generate(self, tokens: Tensor, *, max_new_tokens: int, seed: Tensor | int = 0) -> Tensor:
        """Append ``max_new_tokens`` tokens to each prompt.

        Args:
            tokens: ``[batch, length]`` int64 prompts without masked positions. For prompts of different lengths, see
                :meth:`serve`.
            max_new_tokens: at least 1.
            seed: of every row, or ``[batch]`` int64: one for each. Equal prompts with equal seeds get equal answers.

        Returns:
            ``[batch, length + max_new_tokens]`` int64. Behind a stop token there are only copies of it.
        """
        return last_tokens(self.stream(tokens, max_new_tokens=max_new_tokens, seed=seed))

    def infill(self, tokens: Tensor, *, seed: Tensor | int = 0) -> Tensor:
        """Fill every position that holds the mask token; the others never change. Not in uniform diffusion.

        Args:
            tokens: ``[batch, length]`` int64, not written to.
            seed: as in :meth:`generate`.

        Returns:
            ``[batch, length]`` int64.
        """
        return last_tokens(self.stream(tokens, seed=seed), default=tokens)

    @torch.no_grad()
    def stream(self, tokens: Tensor, *, max_new_tokens: int | None = None, seed: Tensor | int = 0) -> Iterator[Step]:
        """Yield a :class:`Step` after each forward: of :meth:`generate`, or without ``max_new_tokens`` of infill."""
        check_prompts(tokens, max_new_tokens, self.mask_token_id)
        seeds = seeds_of(seed, tokens)
        if isinstance(self.policy, UniformDiffusion):
            if max_new_tokens is None:
                raise ValueError("uniform diffusion has no masked positions to fill; max_new_tokens must be given")
            blocks = blocks_between(
                tokens.shape[1], tokens.shape[1] + max_new_tokens, self.defaults.block_length, absolute=False
            )
            num_steps = self.defaults.steps_per_block or num_steps_per_block(self.defaults.num_steps, len(blocks))
            for done in denoise_noise(self.model, self.policy, tokens, blocks, num_steps, seeds, self.backend):
                yield Step(*done)
            return
        requests = [
            Request(row, max_new_tokens=max_new_tokens or 0, seed=int(s)) for row, s in zip(tokens, seeds, strict=True)
        ]
        batch = self._batch(requests, tokens.device)
        index = 0
        try:
            while batch.width:
                blocks = [row.blocks[0] if row.blocks else slice(0, 0) for row in batch.rows]
                samples, commit_mask = self._step(batch)
                wide = batch.spread(commit_mask)
                self._advance(batch)
                yield Step(index, blocks, batch.tokens, wide, samples)
                index += 1
        finally:
            self._forward.end(batch)

    @torch.no_grad()
    def serve(self, requests: Iterable[Request], *, batch_size: int = 8) -> Iterator[Result]:
        """Yield each request's :class:`Result` as it is finished, in that order.

        Finished requests leave, and the next ones join, between steps. A request's tokens are the same whatever shares
        its batch. Not in uniform diffusion.

        Args:
            requests: taken one by one, as there is room.
            batch_size: how many are denoised together.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if isinstance(self.policy, UniformDiffusion):
            raise ValueError("uniform diffusion does not serve requests: use generate")
        waiting = iter(requests)
        batch = self._batch([], self._device)
        try:
            while True:
                joining = list(islice(waiting, batch_size - len(batch.rows)))
                if joining:
                    batch.join(self._batch(joining, self._device))
                if not batch.rows:
                    return
                if batch.width:
                    self._step(batch)
                    self._advance(batch)
                ended = [i for i, row in enumerate(batch.rows) if not row.blocks]
                results = [result_of(batch.rows[i], batch.tokens[i].cpu()) for i in ended]
                if ended:
                    self._forward.end(batch, ended)
                    batch.keep([i for i, row in enumerate(batch.rows) if row.blocks])
                yield from results
        finally:
            self._forward.end(batch)

    def _step(self, batch: Batch) -> tuple[ops.TokenSamples, Tensor]:
        canvas = batch.canvas()
        states = self._forward.states(batch)
        head = self.language_model.head
        vocab = states.shape[-1] if head is None else head.weight.shape[0]
        arguments = batch.draws(canvas, vocab)
        if head is None:
            samples = ops.sample_tokens(states, **arguments, backend=self.backend)
        else:
            samples = ops.sample_from_hidden(states, head.weight, bias=head.bias, **arguments, backend=self.backend)
        decision = judge_rows(batch, decide(batch, samples, canvas), samples, canvas)
        commit_mask = batch.apply(decision, samples, canvas)
        for row in batch.rows:
            row.index += 1
            row.num_forwards += bool(row.blocks)
        return samples, commit_mask

    def _advance(self, batch: Batch) -> None:
        """Move the rows whose block is done on to the next one, or to their end."""
        looks = batch.tokens.device.type == "cpu" or (
            any(row.policy.adaptive or not row.fixed_steps for row in batch.rows)
            and max(row.index for row in batch.rows) % self.check_every == 0
        )
        live = batch.live.tolist() if looks else [True] * len(batch.rows)
        done = [
            i
            for i, row in enumerate(batch.rows)
            if row.blocks and (not live[i] or (row.fixed_steps and row.index >= row.num_steps))
        ]
        for i in done:
            batch.rows[i].next_block()
            batch.rows[i].stop(batch.tokens[i], self.mask_token_id)
        if done:
            batch.refresh()
        if looks:
            for row, goes_on in zip(batch.rows, live, strict=True):
                row.check_progress(goes_on)

    def _batch(self, requests: Sequence[Request], device: torch.device) -> Batch:
        rows, tokens = [], []
        for request in requests:
            padded = request.with_masks(self.mask_token_id)
            rows.append(row_of(request, self.defaults, padded.tolist(), self.mask_token_id))
            tokens.append(padded.to(device))
        self._forward.begin(rows)
        return Batch(rows, tokens, self.mask_token_id, device)
