"""Uniform diffusion in the denoising loop: canvases of noise, the policy of DiffusionGemma, self-conditioning."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from models import SelfConditionedLLaDA, random_llada

from diffusion_runtime import Denoiser, ops
from diffusion_runtime.decoding import UniformDiffusion
from diffusion_runtime.models import LLaDA

VOCAB = 61
POLICY = UniformDiffusion(VOCAB, entropy_bound=2.0, num_steps=12, confident_entropy=2.0)


class Watched:
    """A model that prefers a token at each place, so that answers settle; remembers what it was shown."""

    def __init__(self, kind: str) -> None:
        self.model = random_llada(kind=SelfConditionedLLaDA if kind == "self-conditioned" else LLaDA, scale=2.0)
        self.preferred = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(3)) * 10
        self.shown: list[torch.Tensor] = []
        if kind == "self-conditioned":
            self.self_conditioning_embedding = self.model.self_conditioning_embedding

    def __call__(self, tokens, **given):
        self.shown.append(tokens.clone())
        return self.model(tokens, **given) + self.preferred[: tokens.shape[1]]


def published_loop(model, prompt, num_new, block_length, policy, seed):
    """One row in plain PyTorch and float64, in transformers' order: what the model is shown, says and keeps.

    Only the uniforms come from the library: of a candidate through the op, of noise directly.
    """
    tokens, taken = prompt, 0
    for start in range(len(prompt), len(prompt) + num_new, block_length):
        position = torch.arange(start, min(start + block_length, len(prompt) + num_new))

        def noise(step, position=position):
            return (ops.philox_uniforms(seed, position, step, ops.DRAW_NOISE)[0] * VOCAB).long()

        canvas, history, signal = noise(taken), [], None
        for left in range(policy.num_steps, 0, -1):
            shown = torch.cat((tokens, canvas))[None]
            if hasattr(model, "self_conditioning_embedding"):
                embedding = model.self_conditioning_embedding
                signal = torch.zeros(len(canvas), embedding.shape[1]) if signal is None else signal
                logits = model(shown, self_conditioning=signal[None])
            else:
                logits = model(shown)
            t_max, t_min = policy.temperatures
            temperature = t_min + (t_max - t_min) * left / policy.num_steps
            scaled = logits[0, len(tokens) :].double() / temperature
            probability = scaled.softmax(-1)
            entropy = -torch.special.xlogy(probability, probability).sum(-1)
            drawn = ops.sample_tokens(scaled.float(), temperature=1.0, seed=seed, position=position, step=taken).token
            order = entropy.argsort(stable=True)
            before = entropy[order].cumsum(0) - entropy[order]
            kept = torch.zeros(len(canvas), dtype=torch.bool)
            kept[order] = before <= policy.entropy_bound
            taken += 1
            canvas = torch.where(kept, drawn, noise(taken))
            answer = scaled.argmax(-1)
            yield shown, answer, kept, entropy
            stable = len(history) >= policy.stable_steps and all(
                torch.equal(answer, earlier) for earlier in history[len(history) - policy.stable_steps :]
            )
            history.append(answer)
            if stable and entropy.mean() < policy.confident_entropy:
                break
            if signal is not None:
                signal = (probability @ embedding.double()).float()
        tokens = torch.cat((tokens, answer))


@pytest.mark.parametrize("kind", ["plain", "self-conditioned"])
@pytest.mark.parametrize("block_length", [None, 4, 5])
@pytest.mark.parametrize("stable_steps", [0, 1, 2])
def test_takes_the_published_steps(kind, block_length, stable_steps):
    model = Watched(kind)
    policy = dataclasses.replace(POLICY, stable_steps=stable_steps)
    denoiser = Denoiser(model, policy=policy, block_length=block_length)
    most = policy.num_steps * math.ceil(10 / (block_length or 10))
    lengths = []
    for seed in range(4):
        prompt = torch.randint(0, VOCAB, (6,), generator=torch.Generator().manual_seed(seed))
        expected = list(published_loop(model, prompt, 10, block_length or 10, policy, seed))
        model.shown.clear()
        steps = list(denoiser.stream(prompt[None], max_new_tokens=10, seed=seed))
        assert len(steps) == len(expected) == len(model.shown)
        lengths.append(len(steps))
        for step, shown, (their_input, answer, kept, entropy) in zip(steps, model.shown, expected, strict=True):
            assert torch.equal(shown, their_input)
            assert torch.equal(step.tokens[0, step.blocks[0]], answer)
            assert torch.equal(step.commit_mask[0, step.blocks[0]], kept)
            torch.testing.assert_close(step.samples.entropy[0].double(), entropy, rtol=1e-4, atol=1e-4)
        assert steps[-1].tokens.shape == (1, 16)
        assert torch.equal(steps[-1].tokens[0, :6], prompt)
    assert min(lengths) < most, "none stopped early: the test shows nothing of the stop"


@pytest.mark.parametrize("kind", ["plain", "self-conditioned"])
@pytest.mark.parametrize("check_every", [1, 3, 100])
def test_a_row_does_not_depend_on_its_batch_nor_on_when_the_loop_looks(kind, check_every):
    policy = dataclasses.replace(POLICY, check_every=check_every, num_steps=9)
    prompts, seeds = torch.randint(0, VOCAB, (5, 6)), torch.tensor([1, 2, 3, 2**40, -7])
    denoiser = Denoiser(Watched(kind), policy=policy, block_length=4)
    together = list(denoiser.stream(prompts, max_new_tokens=8, seed=seeds))
    every_step = Denoiser(Watched(kind), policy=dataclasses.replace(policy, check_every=1), block_length=4)
    alone = [
        list(every_step.stream(prompts[row : row + 1], max_new_tokens=8, seed=int(seeds[row]))) for row in range(5)
    ]
    for row in range(5):
        assert torch.equal(together[-1].tokens[row], alone[row][-1].tokens[0])
    lengths = [len(steps) for steps in alone]
    assert min(lengths) < max(lengths)  # or no row waited for another
    assert len(together) >= max(lengths)
    if check_every == 100:
        assert len(together) == 2 * 9


def test_a_finished_row_keeps_what_it_has_and_costs_nothing():
    settled = 60 * torch.eye(VOCAB)[torch.arange(8) * 5]

    def model(tokens):
        logits = torch.zeros(*tokens.shape, VOCAB)
        logits[0] = settled[: tokens.shape[1]]
        return logits

    policy = UniformDiffusion(VOCAB, num_steps=6)
    steps = list(Denoiser(model, policy=policy).stream(torch.zeros(2, 3, dtype=torch.int64), max_new_tokens=5))
    assert len(steps) == 6  # the other row is never sure
    assert all(step.tokens[0, 3:].tolist() == settled[3:8].argmax(-1).tolist() for step in steps)
    assert all((step.samples.token[0] >= 0).all() for step in steps[:2])
    assert all((step.samples.token[0] == -1).all() for step in steps[2:])
    assert all((step.samples.token[1] >= 0).all() for step in steps)
    # equal logits everywhere: one position is kept at a time, the others are noise again
    assert all(step.commit_mask[1].sum() == 1 for step in steps)


def test_finds_what_the_data_hold():
    """A model that is exact for a language of two sentences: each comes whole, and about as often as the other."""
    sentences = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(5))
    kept = 0.3  # the probability that noise leaves a token; what is shown is compared at this level of noise

    def model(tokens):
        hit, miss = math.log(kept + (1 - kept) / VOCAB), math.log((1 - kept) / VOCAB)
        agrees = tokens[:, None, 1:] == sentences
        evidence = torch.where(agrees, hit, miss).sum(-1, keepdim=True) - torch.where(agrees, hit, miss)
        weight = evidence.softmax(1)  # [batch, sentence, position], each position's from all others
        probability = (weight[..., None] * torch.nn.functional.one_hot(sentences, VOCAB)).sum(1)
        everything = torch.zeros(len(tokens), 13, VOCAB)
        everything[:, 1:] = probability
        return (everything + 1e-6).log()

    denoiser = Denoiser(model, policy=UniformDiffusion(VOCAB, entropy_bound=0.5))
    said = denoiser.generate(torch.zeros(600, 1, dtype=torch.int64), max_new_tokens=12, seed=torch.arange(600))[:, 1:]
    first = (said == sentences[0]).all(1)
    assert (first | (said == sentences[1]).all(1)).all()
    assert abs(int(first.sum()) - 300) < 4 * math.sqrt(150)


def test_noise_is_uniform_over_the_whole_vocabulary():
    seen = []

    def model(tokens):
        seen.append(tokens[:, 1:])
        return torch.zeros(*tokens.shape, VOCAB)

    policy = UniformDiffusion(VOCAB, entropy_bound=-1.0, num_steps=3)
    Denoiser(model, policy=policy).generate(
        torch.zeros(2000, 1, dtype=torch.int64), max_new_tokens=5, seed=torch.arange(2000)
    )
    for tokens in seen:  # equal logits: the token that is kept is uniform as well
        counts = torch.bincount(tokens.flatten(), minlength=VOCAB).double()
        expected = tokens.numel() / VOCAB
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_square - (VOCAB - 1)) < 4 * math.sqrt(2 * (VOCAB - 1))
    assert len(seen) == 3
    # and each step's is new: as often the same as by chance
    same = (seen[1] == seen[2]).double().mean()
    assert abs(same - 1 / VOCAB) < 4 * math.sqrt(1 / VOCAB / 10_000)


def test_backends_agree():
    prompt = torch.randint(0, VOCAB, (2, 6))
    answers = [
        Denoiser(Watched("self-conditioned"), policy=POLICY, backend=backend).generate(prompt, max_new_tokens=6)
        for backend in ops.available_backends("sample_tokens", "cpu", torch.float32)
    ]
    assert len(answers) >= 2
    assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_num_steps_of_the_denoiser_goes_before_the_policy():
    model = Watched("plain")
    never_sure = dataclasses.replace(POLICY, confident_entropy=0.0)
    prompt = torch.randint(0, VOCAB, (1, 3))
    for settings, expected in (({}, 24), ({"num_steps": 6}, 6)):
        denoiser = Denoiser(model, policy=never_sure, block_length=4, **settings)
        steps = list(denoiser.stream(prompt, max_new_tokens=8))
        assert len(steps) == expected
        assert [step.index for step in steps] == list(range(expected))
        assert steps[0].tokens.shape == (1, 7) == steps[0].commit_mask.shape
        assert (steps[-1].blocks[0].start, steps[-1].blocks[0].stop) == (7, 11)
    with pytest.raises(ValueError, match="num_steps must be a multiple of the 2 blocks, got 3"):
        Denoiser(model, policy=never_sure, block_length=4, num_steps=3).generate(prompt, max_new_tokens=8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"stable_steps": -1}, "stable_steps must be at least 0, got -1"),
        ({"check_every": 0}, "check_every must be at least 1, got 0"),
        ({"temperatures": (0.8, 0.0)}, "temperatures must be two finite numbers above 0"),
        ({"temperatures": (math.nan, 0.4)}, "temperatures must be two finite numbers above 0"),
        ({"entropy_bound": math.inf}, "entropy_bound must be finite, got inf"),
        ({"confident_entropy": math.nan}, "confident_entropy must be at least 0, got nan"),
    ],
)
def test_rejects_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(POLICY, **settings)


def test_rejects_what_has_no_meaning():
    model, prompt = random_llada(), torch.zeros(1, 3, dtype=torch.int64)
    for settings in ({"temperature": 0.5}, {"mask_token_id": 0}, {"cache": "dual"}, {"check_every": 2}, {"top_k": 0}):
        with pytest.raises(ValueError, match="temperatures of its own and no mask token"):
            Denoiser(model, policy=POLICY, **settings)
    with pytest.raises(ValueError, match="takes neither suppress nor stop_token_ids"):
        Denoiser(model, policy=POLICY, suppress=[0])
    with pytest.raises(ValueError, match="no masked positions to fill; max_new_tokens must be given"):
        Denoiser(model, policy=POLICY).infill(prompt)
    with pytest.raises(ValueError, match="the model must give 50 logits, got 61"):
        Denoiser(model, policy=dataclasses.replace(POLICY, vocab_size=50)).generate(prompt, max_new_tokens=2)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        Denoiser(model, policy=POLICY).generate(prompt, max_new_tokens=0)
