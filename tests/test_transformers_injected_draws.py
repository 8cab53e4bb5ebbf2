"""Whole generations of DiffusionGemma, transformers' draws in place of ours: the same tokens, step by step."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("transformers", reason="needs the transformers extra")

from test_transformers_diffusion_gemma import CANVAS, VOCAB, make
from test_transformers_diffusion_gemma import pytestmark as needs_diffusion_gemma
from transformers.models.diffusion_gemma import generation_diffusion_gemma as stock

from diffusion_runtime import ops
from diffusion_runtime.integrations import transformers as bridge

pytestmark = [
    needs_diffusion_gemma,
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),  # torch's own, of its compiler
]


@pytest.fixture(autouse=True)
def _unregistered_afterwards():
    yield
    bridge.unregister()


def case(seed: int):
    """A model of random weights, arguments of ``generate``, and the cache that ours has."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    window = choose.choice([4, 6, 9])
    model = make(
        "sdpa",
        sliding_window=window,
        hidden_size=choose.choice([32, 48]),
        num_key_value_heads=choose.choice([1, 2, 4]),
        global_head_dim=choose.choice([16, 32, 64]),
        top_k_experts=choose.choice([1, 2, 3]),
        final_logit_softcapping=choose.choice([4.0, 30.0]),
    )
    for name, weight in model.named_parameters():
        if weight.ndim > 1:  # tame inside, or a rounding would grow to another token; sure of some tokens outside
            weight.data *= choose.choice([0.5, 0.8]) if "embed_tokens" in name else 0.15
    batch, length = choose.randint(1, 3), choose.choice([3, window, 11, 19])
    given = {
        "input_ids": torch.randint(2, VOCAB - 3, (batch, length)),
        "max_new_tokens": 3 * CANVAS,
        "max_denoising_steps": choose.randint(3, 8),
        "sampler_config": stock.EntropyBoundSamplerConfig(entropy_bound=choose.choice([0.5, 5.0, 12.0])),
        "stability_threshold": choose.choice([1, 2]),
        "confidence_threshold": choose.choice([2.0, 4.0, 5.0]),
    }
    if seed % 2:
        padding = torch.tensor([choose.randint(0, length - 1) for _ in range(batch)])
        given["attention_mask"] = (torch.arange(length) >= padding[:, None]).long()
    return model, given, "static" if seed % 4 >= 2 else "dynamic"


def recorded(monkeypatch, model, given):
    """transformers' generation; what it drew, and what each step made and accepted, with entropies."""
    drawn, noise, steps = [], [], []
    multinomial, initialize = torch.multinomial, stock.EntropyBoundSampler.initialize_canvas
    step = type(model)._denoising_step

    def draw(*arguments, **settings):
        drawn.append(multinomial(*arguments, **settings))
        return drawn[-1]

    def make_noise(self, *arguments, **settings):
        noise.append(initialize(self, *arguments, **settings))
        return noise[-1]

    def watched(self, **settings):
        result = step(self, **settings)
        entropy = torch.distributions.Categorical(logits=result[2].float()).entropy()
        steps.append((result[:2], settings["sampler"].accepted_token_mask, entropy))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", draw)
        patch.setattr(stock.EntropyBoundSampler, "initialize_canvas", make_noise)
        patch.setattr(type(model), "_denoising_step", watched)
        out = model.generate(cache_implementation="dynamic", **given)
    return out, drawn, noise, steps


@pytest.mark.parametrize("seed", range(10))
def test_same_tokens(monkeypatch, seed):
    """Past the window with a static cache transformers is wrong, so that it always has a dynamic one."""
    model, given, cache = case(seed)
    expected, drawn, noise, steps = recorded(monkeypatch, model, given)
    bridge.accelerate(model)
    sample, commit = ops.sample_with_soft_embedding, ops.commit_step
    step, taken = model._denoising_step, []
    drawn, noise, seen = iter(drawn), iter(noise), []

    def with_their_draw(hidden, *arguments, **settings):
        samples, signal = sample(hidden, *arguments, **settings)
        seen.append(samples.entropy)
        return samples._replace(token=next(drawn).view(samples.token.shape)), signal

    def with_their_noise(tokens, candidates, score, masked, **settings):
        after, commit_mask = commit(tokens, candidates, score, masked, **settings)
        return ops.CommitStep(torch.where(masked & ~commit_mask, next(noise), after), commit_mask)

    def watched(**settings):
        live = ~settings["finished_denoising"].clone()
        result = step(**settings)
        taken.append((live, result[:2], settings["sampler"].accepted_token_mask))
        return result

    monkeypatch.setattr(stock.EntropyBoundSampler, "initialize_canvas", lambda self, *_, **__: next(noise))
    monkeypatch.setattr(ops, "sample_with_soft_embedding", with_their_draw)
    monkeypatch.setattr(ops, "commit_step", with_their_noise)
    monkeypatch.setattr(model, "_denoising_step", watched)
    got = model.generate(cache_implementation=cache, **given)
    assert len(taken) == len(steps) >= 3
    for i, ((live, canvases, accepted), entropy, their_step) in enumerate(zip(taken, seen, steps, strict=True)):
        their_canvases, their_accepted, their_entropy = their_step
        assert all(map(torch.equal, canvases, their_canvases)), i
        assert torch.equal(accepted[live], their_accepted[live]), i
        torch.testing.assert_close(entropy[live], their_entropy[live], rtol=1e-4, atol=1e-4)
    assert torch.equal(got.sequences, expected.sequences)
    assert torch.equal(got.tokens_per_forward, expected.tokens_per_forward)
    assert next(noise, None) is None
