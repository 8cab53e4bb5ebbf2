"""The loop, step by step against loops written out here from the published rules."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from models import random_llada

from diffusion_runtime import Denoiser, ops, tracing
from diffusion_runtime.decoding import POLICIES, Policy, threshold

MASK = 60


def published_loop(model, tokens, blocks, policy: str, num_steps: int | None) -> Iterator[torch.Tensor]:
    """One row, greedy, plain PyTorch: yields the tokens after each forward.

    LLaDA's ``generate.py`` (quota schedule, blocks, softmax of the candidate), Dream's margin and negative entropy as
    scores, Fast-dLLM's threshold of 0.9. The mask token is no candidate; ties go to the left.
    """
    tokens = tokens.clone()
    for start, stop in blocks:
        count = int((tokens[start:stop] == MASK).sum())
        steps = num_steps or count
        quotas = [count // steps + (1 if s < count % steps else 0) for s in range(steps)]
        for quota in quotas:
            masked = [i for i in range(start, stop) if tokens[i] == MASK]
            if policy == "threshold" and not masked:
                break
            logits = model(tokens[None])[0].clone()
            logits[:, MASK] = -math.inf
            probability = torch.softmax(logits, -1)
            best = probability.topk(2, -1).values
            score = {
                "low_confidence": best[:, 0],
                "threshold": best[:, 0],
                "topk_margin": best[:, 0] - best[:, 1],
                "entropy": torch.special.xlogy(probability, probability).sum(-1),
            }[policy]
            ranked = sorted(masked, key=lambda i: (-float(score[i]), i))
            if policy == "threshold":
                chosen = ranked[:1] + [i for i in ranked[1:] if score[i] >= 0.9]
            else:
                chosen = ranked[:quota]
            for i in chosen:
                tokens[i] = logits[i].argmax()
            yield tokens.clone()


@pytest.mark.parametrize("policy", ["low_confidence", "topk_margin", "entropy", "threshold"])
@pytest.mark.parametrize(("block_length", "num_steps"), [(None, None), (None, 5), (4, 9), (12, 12)])
def test_commits_what_the_published_loop_commits(policy, block_length, num_steps):
    model = random_llada(scale=2.0)
    prompt = torch.randint(0, MASK, (3, 7))
    if policy == "threshold":
        num_steps = None
    denoiser = Denoiser(model, policy=policy, block_length=block_length, num_steps=num_steps)
    length = block_length or 12
    blocks = [(7 + start, 7 + start + length) for start in range(0, 12, length)]
    steps_a_block = None if num_steps is None else num_steps // len(blocks)
    for row in prompt:
        masked = torch.cat((row, torch.full((12,), MASK)))
        expected = list(published_loop(model, masked, blocks, policy, steps_a_block))
        steps = list(denoiser.stream(row[None], max_new_tokens=12))
        assert len(steps) == len(expected)
        for step, tokens in zip(steps, expected, strict=True):
            assert step.tokens[0].tolist() == tokens.tolist()


def test_steps_per_block_are_those_of_every_block():
    model, prompt = random_llada(), torch.randint(0, MASK, (1, 7))
    shared, each = (
        list(Denoiser(model, block_length=4, **steps).stream(prompt, max_new_tokens=12))
        for steps in ({"num_steps": 6}, {"steps_per_block": 2})
    )
    assert len(shared) == len(each) == 6
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(shared, each, strict=True))
    with pytest.raises(ValueError, match="num_steps and steps_per_block say the same: give one, got 6 and 2"):
        Denoiser(model, num_steps=6, steps_per_block=2)


def test_random_commits_what_its_keys_say():
    model, prompt = random_llada(), torch.randint(0, MASK, (1, 4))
    steps = list(Denoiser(model, policy="random", num_steps=3).stream(prompt, max_new_tokens=7, seed=5))
    tokens = torch.nn.functional.pad(prompt, (0, 7), value=MASK)
    for index, (step, quota) in enumerate(zip(steps, (3, 2, 2), strict=True)):
        score, _ = ops.philox_uniforms(5, torch.arange(4, 11), index, ops.DRAW_ORDER)
        score[tokens[0, 4:] != MASK] = -1
        chosen = score.argsort(descending=True)[:quota] + 4
        logits = model(tokens)[0]
        logits[:, MASK] = -math.inf
        tokens[0, chosen] = logits.argmax(-1)[chosen]
        assert torch.equal(step.tokens, tokens)


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_infill_fills_every_mask_and_nothing_else(policy, temperature):
    tokens = torch.randint(0, MASK, (4, 15))
    holes = torch.rand(4, 15) < torch.tensor([[0.3], [0.9], [0.0], [1.0]])
    tokens[holes] = MASK
    before = tokens.clone()
    denoiser = Denoiser(random_llada(), policy=policy, temperature=temperature, block_length=6)
    filled = denoiser.infill(tokens, seed=9)
    assert torch.equal(tokens, before)
    assert torch.equal(filled[~holes], tokens[~holes])
    assert not (filled == MASK).any()
    assert torch.equal(filled, denoiser.infill(tokens, seed=9))


def test_nothing_to_fill_is_not_an_error():
    tokens = torch.randint(0, MASK, (2, 5))
    denoiser = Denoiser(random_llada())
    assert list(denoiser.stream(tokens)) == []
    filled = denoiser.infill(tokens)
    assert torch.equal(filled, tokens)
    assert filled.data_ptr() != tokens.data_ptr()


@pytest.mark.parametrize("policy", list(POLICIES))
def test_a_row_does_not_depend_on_its_batch(policy):
    denoiser = Denoiser(random_llada(), policy=policy, temperature=0.7, block_length=4)
    prompts, seeds = torch.randint(0, MASK, (5, 6)), torch.tensor([1, 2, 3, 4, 2**40])
    together = denoiser.generate(prompts, max_new_tokens=8, seed=seeds)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(denoiser.generate(prompts[order], max_new_tokens=8, seed=seeds[order]), together[order])
    for row in range(5):
        alone = denoiser.generate(prompts[row : row + 1], max_new_tokens=8, seed=int(seeds[row]))
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("policy", ["low_confidence", "random", "threshold"])
def test_a_row_does_not_depend_on_what_others_have_to_fill(policy):
    """Rows with masks in other blocks, more of them, or decided faster."""
    model, num_steps = random_llada(), 12
    if policy == "threshold":  # low enough to commit several positions at once
        policy, num_steps = Policy(partial(threshold, threshold=0.2), scheduled=False), None
    tokens = torch.randint(0, MASK, (6, 12))
    for row, masked in enumerate((range(12), range(8, 12), range(4, 5), (0, 5, 11), (), range(0, 12, 2))):
        tokens[row, list(masked)] = MASK
    seeds = torch.arange(6)
    denoiser = Denoiser(model, policy=policy, temperature=0.8, block_length=4, num_steps=num_steps)
    together = denoiser.infill(tokens, seed=seeds)
    for row in range(6):
        alone = list(denoiser.stream(tokens[row : row + 1], seed=int(seeds[row])))
        if alone:
            assert torch.equal(alone[-1].tokens[0], together[row])
        if num_steps is None and row == 0:
            assert len(alone) < 12  # else the test shows nothing


def test_seeds_make_samples_differ():
    denoiser, prompt = Denoiser(random_llada(), temperature=1.0), torch.randint(0, MASK, (1, 6))
    answers = denoiser.generate(prompt.expand(8, 6), max_new_tokens=8, seed=torch.arange(8))
    assert len({tuple(row) for row in answers.tolist()}) == 8
    same = denoiser.generate(prompt.expand(2, 6), max_new_tokens=8, seed=3)
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], answers[3])


def test_torch_generator_is_never_read():
    denoiser, prompt = Denoiser(random_llada(), policy="random", temperature=1.0), torch.randint(0, MASK, (1, 6))
    state = torch.random.get_rng_state()
    denoiser.generate(prompt, max_new_tokens=4)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_backends_agree():
    prompt = torch.randint(0, MASK, (2, 6))
    answers = [
        Denoiser(random_llada(), temperature=0.9, backend=backend).generate(prompt, max_new_tokens=6, seed=2)
        for backend in ops.available_backends("sample_tokens", "cpu", torch.float32)
    ]
    assert len(answers) >= 2
    assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_any_callable_and_any_rule():
    """A model is anything that gives logits; a rule is any function."""
    model = random_llada()

    def wrapped(tokens):
        return SimpleNamespace(logits=model(tokens))

    def leftmost(samples, canvas):
        return canvas.masked & (canvas.masked.cumsum(-1) <= canvas.quota[:, None])

    prompt = torch.randint(0, MASK, (2, 3))
    steps = list(Denoiser(wrapped, policy=leftmost, mask_token_id=MASK).stream(prompt, max_new_tokens=4))
    assert [step.commit_mask.nonzero()[:, 1].tolist() for step in steps] == [[3, 3], [4, 4], [5, 5], [6, 6]]
    everything = Policy(lambda samples, canvas: canvas.masked, scheduled=False)
    assert len(list(Denoiser(model, policy=everything).stream(prompt, max_new_tokens=4))) == 1


def test_the_mask_token_is_never_committed():
    def model(tokens):
        logits = torch.zeros(*tokens.shape, 5)
        logits[..., 4] = 100.0
        return logits

    filled = Denoiser(model, mask_token_id=4).generate(torch.zeros(1, 2, dtype=torch.int64), max_new_tokens=3)
    assert filled.tolist() == [[0, 0, 0, 0, 0]]


def test_steps_and_trace():
    denoiser, prompt = Denoiser(random_llada(), num_steps=4, block_length=4), torch.randint(0, MASK, (2, 3))
    lines: list[str] = []
    file = SimpleNamespace(write=lines.append)
    run = denoiser.stream(prompt, max_new_tokens=8)
    steps = list(tracing.write(run, file, tokens=prompt, mask_token_id=MASK))
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert [(step.blocks[0].start, step.blocks[0].stop) for step in steps] == [(3, 7), (3, 7), (7, 11), (7, 11)]
    seen = torch.zeros(2, 11, dtype=torch.bool)
    for step, line in zip(steps, lines[1:], strict=True):
        assert not (seen & step.commit_mask).any()
        seen |= step.commit_mask
        assert torch.equal(step.tokens != MASK, seen | (torch.arange(11) < 3))
        record = json.loads(line)
        assert record["step"] == step.index
        assert record["blocks"] == [[block.start, block.stop] for block in step.blocks]
        for row, changes in enumerate(record["rows"]):
            assert changes["position"] == step.commit_mask[row].nonzero()[:, 0].tolist()
            assert changes["token"] == step.tokens[row, changes["position"]].tolist()
            places = torch.tensor(changes["position"]) - step.blocks[row].start
            assert changes["logprob"] == pytest.approx(step.samples.logprob[row, places].tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "best"}, "unknown policy 'best'; expected one of low_confidence, random"),
        ({"num_steps": 0}, "num_steps must be at least 1 or None, got 0"),
        ({"block_length": -1}, "block_length must be at least 1"),
        ({"policy": "threshold", "num_steps": 3}, "num_steps must be None, got 3"),
        ({"temperature": -0.1}, "temperature must be finite and at least 0, got -0.1"),
    ],
)
def test_rejects_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Denoiser(random_llada(), **settings)


def test_rejects_inputs():
    model, prompt = random_llada(), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="mask_token_id is needed"):
        Denoiser(lambda tokens: tokens)
    with pytest.raises(ValueError, match=r"tokens must be \[batch, length\] int64, got \(3,\)"):
        Denoiser(model).infill(prompt[0])
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        Denoiser(model).generate(prompt, max_new_tokens=0)
    with pytest.raises(ValueError, match="the prompt holds the mask token 60; infill"):
        Denoiser(model).generate(torch.full((1, 3), MASK), max_new_tokens=2)
    with pytest.raises(ValueError, match="num_steps must be a multiple of the 2 blocks, got 3"):
        Denoiser(model, num_steps=3, block_length=4).generate(prompt, max_new_tokens=8)
    with pytest.raises(ValueError, match="at most 64 bits"):
        Denoiser(model).infill(prompt, seed=2**64)
    with pytest.raises(TypeError, match="seed must be an int or a tensor, got float"):
        Denoiser(model).infill(prompt, seed=1.0)
    with pytest.raises(ValueError, match=r"seed must be an int or \[2\] int64, got \(3,\)"):
        Denoiser(model).generate(prompt, max_new_tokens=2, seed=torch.arange(3))
    with pytest.raises(ValueError, match=r"the model must give logits \[2, 5, vocab\], got \(2, 3, 7\)"):
        Denoiser(lambda t: torch.zeros(2, 3, 7), mask_token_id=6).generate(prompt, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"row \[0, 0\] of the logits holds NaN"):
        Denoiser(lambda t: torch.full((2, 5, 7), math.nan), mask_token_id=6).generate(prompt, max_new_tokens=2)


def test_the_logits_of_the_model_stay_as_they_are():
    given = []
    model = random_llada()

    def remembering(tokens):
        logits = model(tokens)
        given.append((logits, logits.clone()))
        return logits

    prompt = torch.randint(0, MASK, (2, 5))
    Denoiser(remembering, mask_token_id=MASK, temperature=0.7).generate(prompt, max_new_tokens=4)
    assert given
    assert all(torch.equal(logits, before) for logits, before in given)
