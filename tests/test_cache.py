"""Caches: the exact ones change nothing, the others what Fast-dLLM's change, and pages are used and given back."""

from __future__ import annotations

import math
import random

import plain_models
import pytest
import torch
from families import FAMILIES, MASK, random_weights
from hypothesis import given
from hypothesis import strategies as st

from diffusion_runtime import Denoiser, Request, wrap
from diffusion_runtime.cache import Pages
from diffusion_runtime.models import LanguageModel

BY_BLOCKS = ["LLaDA2", "Fast-dLLM v2", "SDAR", "SDAR-MoE", "BD3LM"]


class Counted:
    """How many tokens each forward of a model is given."""

    def __init__(self, model: LanguageModel, monkeypatch) -> None:
        self.forwards: list[tuple[int, ...]] = []
        hidden = model.hidden

        def counting(tokens, context=None):
            self.forwards.append(tuple(tokens.shape))
            return hidden(tokens, context)

        monkeypatch.setattr(model, "hidden", counting)


@pytest.mark.parametrize("name", BY_BLOCKS)
@pytest.mark.parametrize("guidance", [0.0, 0.7])
def test_the_block_cache_is_exact(name, guidance, model_of):
    """Over a whole generation that crosses pages, statistics included."""
    model = model_of(name)
    prompt = torch.randint(0, MASK, (2, 70), generator=torch.Generator().manual_seed(2))
    settings = {"policy": "threshold", "temperature": 0.9, "guidance_scale": guidance}
    plain, cached = (
        list(Denoiser(model, cache=cache, **settings).stream(prompt, max_new_tokens=70, seed=torch.tensor([1, 2])))
        for cache in ("none", "block")
    )
    assert len(plain) == len(cached)
    for a, b in zip(plain, cached, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        for x, y in zip(a.samples, b.samples, strict=True):
            torch.testing.assert_close(x.float(), y.float(), rtol=1e-5, atol=2e-5)


def test_the_block_cache_computes_the_block_alone(model_of, monkeypatch):
    model = model_of("SDAR")
    counted = Counted(model, monkeypatch)
    denoiser = Denoiser(model)
    denoiser.generate(torch.randint(0, MASK, (1, 10)), max_new_tokens=10)
    # the prompt and the rest of its last block; then block by block, the one before it once more to keep its keys
    assert counted.forwards == [(1, 12), (1, 4)] + ([(1, 8)] + [(1, 4)] * 3) * 2
    monkeypatch.undo()
    shifted = model_of("Fast-dLLM v2")
    counted = Counted(shifted, monkeypatch)
    Denoiser(shifted).generate(torch.randint(0, MASK, (1, 16)), max_new_tokens=8)
    assert counted.forwards == [(1, 24)] + [(1, 9)] * 7


def test_a_conversation_and_a_shared_prompt_are_computed_once(model_of, monkeypatch):
    model = model_of("SDAR")
    prompt = torch.randint(0, MASK, (130,)).tolist()
    (alone,) = Denoiser(model).serve([Request(prompt, max_new_tokens=66)])
    counted = Counted(model, monkeypatch)
    denoiser = Denoiser(model)
    first, second = denoiser.serve([Request(prompt, max_new_tokens=66) for _ in range(2)], batch_size=1)
    assert first.tokens.tolist() == second.tokens.tolist() == alone.tokens.tolist()
    # two pages of 64 are found again
    assert [length for _, length in counted.forwards if length > 8] == [132]
    assert counted.forwards.count((1, 132 - 128)) > 0
    counted.forwards.clear()
    turn = [*first.tokens.tolist(), *range(10)]
    (answer,) = denoiser.serve([Request(turn, max_new_tokens=4)])
    assert max(length for _, length in counted.forwards) == 208 - 192
    (fresh,) = Denoiser(model).serve([Request(turn, max_new_tokens=4)])
    assert answer.tokens.tolist() == fresh.tokens.tolist()
    changed = [*turn[:3], (turn[3] + 1) % MASK, *turn[4:]]
    counted.forwards.clear()
    (answer,) = denoiser.serve([Request(changed, max_new_tokens=4)])
    assert max(length for _, length in counted.forwards) == 208
    (fresh,) = Denoiser(model).serve([Request(changed, max_new_tokens=4)])
    assert answer.tokens.tolist() == fresh.tokens.tolist()


def fast_dllm(weights, config, tokens: list[int], block: int, kind: str, interval: int | None) -> list[int]:
    """Fast-dLLM's prefix and dual cache on LLaDA, greedy, one position a forward: keys of others are left stale."""
    length, dim = len(tokens), config["d_model"] // config["n_heads"]
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def w(name: str) -> torch.Tensor:
        return weights[f"model.transformer.{name}.weight"]

    def forward(chosen: list[int], stale: list[int], *, keep: bool) -> torch.Tensor:
        x = w("wte")[torch.tensor(tokens)[chosen]]
        for layer in range(config["n_layers"]):
            name = f"blocks.{layer}."
            h = plain_models.rms_norm(x, w(name + "attn_norm"), config["rms_norm_eps"])
            q, k, v = (h @ w(name + p).T for p in ("q_proj", "k_proj", "v_proj"))
            key, value = (torch.zeros(length, x.shape[1], dtype=x.dtype) for x in (k, v))
            if stale:
                key[stale], value[stale] = (old[stale] for old in kept[layer])
            key[chosen], value[chosen] = k, v
            if keep:
                kept[layer] = (key.clone(), value.clone())
            seen = sorted({*chosen, *stale})
            mixed = []
            for head in range(config["n_heads"]):
                shared = head * config["n_kv_heads"] // config["n_heads"]
                own, other = (slice(i * dim, (i + 1) * dim) for i in (head, shared))
                wide = torch.zeros(length, dim, dtype=x.dtype)
                wide[chosen] = q[:, own]
                turned = [plain_models.rotate(y, config["rope_theta"], dim) for y in (wide, key[:, other])]
                scores = turned[0][chosen] @ turned[1][seen].T / math.sqrt(dim)
                mixed.append(scores.softmax(-1) @ value[seen][:, other])
            x = x + torch.cat(mixed, -1) @ w(name + "attn_out").T
            h = plain_models.rms_norm(x, w(name + "ff_norm"), config["rms_norm_eps"])
            gate = h @ w(name + "ff_proj").T
            x = x + (gate * gate.sigmoid() * (h @ w(name + "up_proj").T)) @ w(name + "ff_out").T
        logits = torch.full((length, config["vocab_size"]), -math.inf, dtype=x.dtype)
        states = plain_models.rms_norm(x, w("ln_f"), config["rms_norm_eps"])
        logits[chosen] = (states @ w("ff_out").T)[:, : config["vocab_size"]]
        return logits

    tokens = list(tokens)
    first = tokens.index(MASK)
    for start in range(first, length, block):
        stop = min(start + block, length)
        for step in range(stop - start):
            if step == 0 or (interval and step % interval == 0):
                logits = forward(list(range(length)), [], keep=True)
            elif kind == "prefix":
                logits = forward(list(range(start, length)), list(range(start)), keep=False)
            else:
                rest = [i for i in range(length) if not start <= i < stop]
                logits = forward(list(range(start, stop)), rest, keep=True)
            logits[:, MASK] = -math.inf
            masked = [i for i in range(start, stop) if tokens[i] == MASK]
            probability, token = logits[masked].softmax(-1).max(-1)
            place = min(range(len(masked)), key=lambda i: (-float(probability[i]), i))
            tokens[masked[place]] = int(token[place])
    return tokens


@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.parametrize("interval", [None, 3])
def test_prefix_and_dual_leave_stale_what_fast_dllm_does(kind, interval, model_of):
    family, model = FAMILIES["LLaDA"], model_of("LLaDA")
    weights = {name: x.double() for name, x in random_weights(family).items()}
    prompt = torch.randint(0, MASK, (9,), generator=torch.Generator().manual_seed(4)).tolist()
    answers = {}
    kinds = {"none": {}, kind: {"refresh_interval": interval}, "always": {"refresh_interval": 1}}
    for name, settings in kinds.items():
        settings |= {"cache": "none" if name == "none" else kind}
        denoiser = Denoiser(model, block_length=6, **settings)
        answers[name] = denoiser.generate(torch.tensor([prompt]), max_new_tokens=18)[0].tolist()
    assert answers[kind] == fast_dllm(weights, family.config, prompt + [MASK] * 18, 6, kind, interval)
    assert answers["always"] == answers["none"]
    if interval is None:
        assert answers[kind] != answers["none"]  # else the test shows nothing


@pytest.mark.parametrize(("kind", "lengths"), [("prefix", [27, 18, 27, 12, 27, 6]), ("dual", [27, 6] * 3)])
def test_what_prefix_and_dual_compute(kind, lengths, model_of, monkeypatch):
    model = model_of("LLaDA")
    counted = Counted(model, monkeypatch)
    Denoiser(model, block_length=6, num_steps=6, cache=kind).generate(torch.zeros(1, 9, dtype=int), max_new_tokens=18)
    assert [length for _, length in counted.forwards] == lengths


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_a_row_that_fills_its_pages_beside_a_longer_one(kind, model_of):
    denoiser = Denoiser(model_of("LLaDA"), policy="threshold", block_length=8, cache=kind)
    requests = [
        Request(torch.randint(0, MASK, (length - 16,)), max_new_tokens=16, seed=length, temperature=0.7)
        for length in (64, 75, 128)
    ]
    together = {result.request: result.tokens.tolist() for result in denoiser.serve(requests)}
    for request in requests:
        (alone,) = denoiser.serve([request])
        assert together[request] == alone.tokens.tolist()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 300)), max_size=30), st.integers(0, 10))
def test_pages_are_never_two_sequences_at_once(requests, seed):
    """Random prompts that share beginnings come and go; what is published reads as it was written."""
    rng = random.Random(seed)
    pages = Pages(1, 1, 2, block_length=4, dtype=torch.float32, device=torch.device("cpu"))
    live: list[tuple[list[int], list[int], int]] = []
    for kind, length in requests:
        tokens = [kind] * (length // 2) + [rng.randrange(2)] * (length - length // 2)
        shared = pages.find(tokens)
        pages.hold(shared)
        held = [*shared, *pages.take(pages.pages_of(length) - len(shared))]
        assert len(set(held)) == len(held) == -(-length // 64)
        for number in range(len(shared)):  # every token up to there is as it was
            assert pages.pool[0, 0, held[number], :, 0, 0].tolist() == tokens[number * 64 : (number + 1) * 64]
        private = set(held[len(shared) :])
        assert 0 not in private
        assert not any(private & set(others) for _, others, _ in live)
        for number in range(len(shared), len(held)):
            part = tokens[number * 64 : (number + 1) * 64]
            pages.pool[0, 0, held[number], : len(part), 0, 0] = torch.tensor(part, dtype=torch.float32)
        live.append((tokens, held, length))
        if rng.random() < 0.6:
            gone, held, _ = live.pop(rng.randrange(len(live)))
            pages.publish(gone, held)
            pages.release(held)
    most = sum(-(-length // 64) for _, length in requests) + 1
    assert pages.pool.shape[2] <= most


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("LLaDA", {"cache": "all"}, "cache must be one of none, prefix, dual, block, got 'all'"),
        ("LLaDA", {"cache": "block"}, "here every position sees all"),
        ("SDAR", {"cache": "dual"}, "cache 'dual' is for attention both ways: 'block' is exact"),
        ("LLaDA", {"refresh_interval": 2}, "belongs to 'prefix' and 'dual', got 2 and 'none'"),
        ("LLaDA", {"cache": "prefix", "refresh_interval": 0}, "refresh_interval must be at least 1"),
    ],
)
def test_rejects_what_is_not_exact_or_not_possible(name, settings, message, model_of):
    with pytest.raises(ValueError, match=message):
        Denoiser(model_of(name), **settings)


def test_a_wrapped_module_has_no_keys(model_of):
    with pytest.raises(ValueError, match="cache 'dual' needs a native model"):
        Denoiser(wrap(model_of("LLaDA"), mask_token_id=MASK), cache="dual")
