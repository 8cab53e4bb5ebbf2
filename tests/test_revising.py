"""Policies that change what is decided: token editing and masking again."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from families import MASK

from diffusion_runtime import Denoiser, Request
from diffusion_runtime.decoding import Policy, joint_threshold, remask
from diffusion_runtime.models import LanguageModel


def published_editing(
    model: LanguageModel, tokens: list[int], prompt_length: int, bound: float, edit_bound: float, most: int
) -> tuple[list[int], int]:
    """LLaDA2.1's ``generate``, greedy, without a cache: the tokens, and how many forwards they took."""
    size = model.block_length
    assert size is not None
    tokens, forwards = list(tokens), 0
    for start in range(prompt_length // size * size, len(tokens), size):
        stop = min(start + size, len(tokens))
        mask_free = 0
        while True:
            masked = [i for i in range(start, stop) if tokens[i] == MASK]
            mask_free += not masked
            if mask_free > most:
                break
            logits = model(torch.tensor([tokens[:stop]]))[0].double()
            logits[:, MASK] = -torch.inf
            probability, best = logits.softmax(-1).max(-1)
            forwards += 1
            commits = [i for i in masked if probability[i] > bound]
            if masked and not commits:
                commits = [max(masked, key=lambda i: (float(probability[i]), -i))]
            edits = [
                i
                for i in range(max(start, prompt_length), stop)
                if i not in masked and best[i] != tokens[i] and probability[i] > edit_bound
            ]
            for i in commits + edits:
                tokens[i] = int(best[i])
            if not masked and not edits:
                break
    return tokens, forwards


@pytest.mark.parametrize("name", ["SDAR", "LLaDA2"])
@pytest.mark.parametrize(("edit_bound", "most"), [(0.0, 2), (0.0, 5), (0.4, 16), (0.9, 16)])
def test_token_editing_is_the_published_loop(name, edit_bound, most, model_of):
    model = model_of(name)
    prompt = torch.randint(0, MASK, (6,), generator=torch.Generator().manual_seed(3)).tolist()
    rule = partial(joint_threshold, threshold=0.5, edit_threshold=edit_bound, max_edit_steps=most)
    new = 14 if name == "SDAR" else 40
    expected, forwards = published_editing(model, prompt + [MASK] * new, 6, 0.5, edit_bound, most)
    for kept in ("none", "block"):
        denoiser = Denoiser(model, policy=Policy(rule, scheduled=False, revises=True), cache=kept)
        (result,) = denoiser.serve([Request(prompt, max_new_tokens=new)])
        assert result.tokens.tolist() == expected
        assert result.num_forwards == forwards


def test_a_draft_is_revised_where_it_may_be(model_of):
    model = model_of("LLaDA2")
    tokens = torch.randint(0, MASK, (20,), generator=torch.Generator().manual_seed(1))
    revisable = torch.arange(20) % 2 == 1
    rule = partial(joint_threshold, threshold=0.5, edit_threshold=0.0)
    denoiser = Denoiser(model, policy=Policy(rule, scheduled=False, revises=True))
    (result,) = denoiser.serve([Request(tokens, revisable=revisable)])
    changed = result.tokens != tokens
    assert changed.any()
    assert not changed[~revisable].any()
    assert result.num_forwards <= 16
    (untouched,) = denoiser.serve([Request(tokens)])
    assert torch.equal(untouched.tokens, tokens)
    assert untouched.num_forwards == 0


@pytest.mark.parametrize("kind", ["cap", "rescale", "conf", "loop"])
def test_remasking_never_touches_what_was_given(kind, model_of):
    tokens = torch.tensor([[4, MASK, 8, MASK, MASK, 1, MASK, MASK]])
    policy = Policy(partial(remask, kind=kind, eta=0.11), confidence="scaled", remasks=True)
    denoiser = Denoiser(model_of("MDLM"), policy=policy, num_steps=40, temperature=1.0)
    steps = list(denoiser.stream(tokens, seed=5))
    given = tokens != MASK
    assert len(steps) == 40
    again = 0
    for before, step in itertools.pairwise(steps):
        assert torch.equal(step.tokens[given], tokens[given])
        again += int(((before.tokens != MASK) & (step.tokens == MASK)).sum())
    assert again > 0
    assert not (steps[-1].tokens == MASK).any()


def test_a_draft_is_masked_again_by_draws_of_every_step(model_of):
    """Where nothing is undecided too: each step has draws of its own."""
    tokens = torch.randint(0, MASK, (64,), generator=torch.Generator().manual_seed(1))
    again = []

    def noted(samples, canvas):
        decision = remask(samples, canvas, kind="cap", eta=0.2)
        again.append(decision.remask[0])
        return decision._replace(commit_mask=canvas.masked)  # so that the next step begins with what this one masked

    def nothing_masked(samples, canvas):
        return noted(samples, canvas)._replace(remask=canvas.masked & False)

    for rule in (noted, nothing_masked):
        again.clear()
        denoiser = Denoiser(model_of("MDLM"), policy=Policy(rule, remasks=True), num_steps=20)
        (result,) = denoiser.serve([Request(tokens, revisable=torch.ones(64, dtype=torch.bool))])
        assert result.num_forwards == 20
        masks = {tuple(mask.tolist()) for mask in again[10:19]}
        assert len(masks) == 9
