"""Requests whose answers must be texts of a language: what their positions may hold, and what a step may commit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diffusion_runtime.constraints import Automaton, Progress, judge
from diffusion_runtime.decoding import Canvas, Decision, Policy
from diffusion_runtime.denoising.requests import Request
from diffusion_runtime.ops import TokenSamples, pack_allowed

if TYPE_CHECKING:
    from diffusion_runtime.denoising.batch import Batch


class Constrained:
    """The constraint of one row: it covers the sequence from the first undecided position to the last.

    Args:
        constraint: the language.
        request: whose answer is in it.
        policy: of the row.
        tokens: of the whole sequence, one of them undecided.
        mask_token_id: where undecided.
        suppress, stop_token_ids: of the row.

    Raises:
        ValueError: nothing fits, or a setting that a constraint does not go with.
    """

    def __init__(
        self,
        constraint: Automaton,
        request: Request,
        policy: Policy,
        tokens: Sequence[int],
        mask_token_id: int,
        suppress: frozenset[int],
        stop_token_ids: frozenset[int],
    ) -> None:
        if policy.revises or policy.remasks:
            raise ValueError(
                "a constraint needs a policy that keeps what is decided: neither one that revises nor remasks"
            )
        if request.stop is not None:
            raise ValueError("a constraint says itself where an answer ends: it takes stop_token_ids, but no stop")
        automaton = constraint.with_end(stop_token_ids)
        places = [i for i, token in enumerate(tokens) if token == mask_token_id]
        self.start, stop = places[0], places[-1] + 1
        allowed = torch.ones(stop - self.start, automaton.vocab_size, dtype=torch.bool)
        allowed[:, [token for token in (*suppress, mask_token_id) if token < automaton.vocab_size]] = False
        early = max(0, len(tokens) - request.max_new_tokens + request.min_new_tokens - self.start)
        if request.min_new_tokens:
            allowed[:early, [token for token in stop_token_ids if token < automaton.vocab_size]] = False
        if request.allowed is not None:
            vocab = min(automaton.vocab_size, request.allowed.shape[1])
            allowed[:, :vocab] &= request.allowed[self.start : stop, :vocab].cpu()
        packed = pack_allowed(allowed).numpy()
        self.progress = Progress(automaton, tokens[self.start : stop], mask_token_id, packed)

    def undecided(self, block: slice) -> list[tuple[int, int]]:
        """Undecided positions of a block: where they are in it, and in the constraint."""
        covered = range(max(block.start, self.start), min(block.stop, self.start + len(self.progress.undecided)))
        places = ((p - block.start, p - self.start) for p in covered)
        return [(column, place) for column, place in places if self.progress.undecided[place]]


def allowed_by_constraints(batch: Batch, words: Tensor | None, vocab: int) -> Tensor | None:
    """What each position of the current blocks may draw, packed, where ``words`` is what other rules allow."""
    if not any(row.constrained for row in batch.rows):
        return words
    whole = pack_allowed(torch.ones(vocab, dtype=torch.bool)).repeat(len(batch.rows), batch.width, 1)
    for i, row in enumerate(batch.rows):
        if row.constrained is None or not row.blocks:
            continue
        for column, place in row.constrained.undecided(row.blocks[0]):
            own = torch.from_numpy(row.constrained.progress.words(place))[: whole.shape[2]]
            whole[i, column] = torch.nn.functional.pad(own, (0, whole.shape[2] - len(own)))
    whole = whole.to(batch.tokens.device)
    return whole if words is None else whole & words


def judge_rows(batch: Batch, decision: Decision, samples: TokenSamples, canvas: Canvas) -> Decision:
    """A complete decision, without the commits after which a constrained row could not be completed.

    A row whose steps are over goes on while something is undecided, and tries all of it.
    """
    if not any(row.constrained for row in batch.rows):
        return decision
    assert decision.candidates is not None
    assert decision.finished is not None
    commits, tokens, logprob = (
        x.cpu().numpy() for x in (decision.commit_mask, decision.candidates, samples.logprob.float())
    )
    accepted = commits.copy()
    for i, row in enumerate(batch.rows):
        if row.constrained is None or not row.blocks:
            continue
        overtime = row.policy.scheduled and row.index >= row.num_steps
        tried = [(c, p) for c, p in row.constrained.undecided(row.blocks[0]) if overtime or commits[i, c]]
        columns = np.array([column for column, _ in tried], np.int64)
        places = [place for _, place in tried]
        accepted[i, columns] = judge(
            row.constrained.progress, places, tokens[i, columns].tolist(), logprob[i, columns].tolist()
        )
    device = decision.commit_mask.device
    commit_mask = torch.from_numpy(accepted).to(device)
    judged = torch.tensor([row.constrained is not None for row in batch.rows], device=device)
    finished = torch.where(judged, ~(canvas.masked & ~commit_mask).any(1), decision.finished)
    return decision._replace(commit_mask=commit_mask, finished=finished)
