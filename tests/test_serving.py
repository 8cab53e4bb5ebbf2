"""Requests of all kinds in one batch: each as if it were alone, and each as a loop written out here has it."""

from __future__ import annotations

import math
import random

import pytest
import torch
from families import FAMILIES, MASK, VOCAB, random_weights

from diffusion_runtime import Denoiser, Request, wrap
from diffusion_runtime.decoding import POLICIES, Policy
from diffusion_runtime.denoiser import stop_strings

MODELS = ["LLaDA", "LLaDA-MoE", "LLaDA2", "Dream", "Fast-dLLM v2", "SDAR", "SDAR-MoE", "MDLM", "BD3LM"]


def random_request(rng: random.Random, policy: str) -> Request:
    prompt = [rng.randrange(MASK) for _ in range(rng.randrange(1, 12))]
    new = rng.randrange(1, 14)
    revisable, stops = None, rng.choice([None, list(range(8))])
    # infill, pinned tokens between; where there are none all positions have one state, and roundings break the ties
    if len(prompt) > 3 and rng.random() < 0.3:
        for place in rng.sample(range(len(prompt)), max(1, len(prompt) // 3)):
            prompt[place] = MASK
        new = rng.choice([0, new])
    elif (POLICIES[policy].revises or POLICIES[policy].remasks) and rng.random() < 0.5:
        revisable = torch.tensor([rng.random() < 0.5 for _ in prompt])
    return Request(
        torch.tensor(prompt),
        max_new_tokens=new,
        min_new_tokens=rng.randrange(new + 1) if stops else 0,
        revisable=revisable,
        seed=rng.randrange(2**64),
        temperature=rng.choice([0.0, 0.7, 1.3]),
        top_k=rng.choice([None, None, 20]),
        top_p=rng.choice([None, 0.9]),
        suppress=rng.choice([None, [3, 5]]),
        stop_token_ids=stops,
        policy=policy if revisable is not None or rng.random() < 0.8 else rng.choice(["random", "threshold"]),
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_request_is_the_same_whatever_shares_its_batch(name, model_of):
    rng = random.Random(name)
    for policy in rng.sample(sorted(POLICIES), 3):
        model = model_of(name)
        block = None if model.block_length else rng.choice([None, 4, 7])
        cache = rng.choice(["none", "block"] if model.block_length else ["none", "prefix", "dual"])
        denoiser = Denoiser(
            model,
            policy=policy,
            block_length=block,
            guidance_scale=rng.choice([0.0, 0.0, 0.8]),
            cache=cache,
            refresh_interval=rng.choice([None, 2]) if cache in ("prefix", "dual") else None,
        )
        requests = [random_request(rng, policy) for _ in range(5)]
        together = {id(r.request): r for r in denoiser.serve(requests, batch_size=3)}
        assert len(together) == 5
        for request in requests:
            (alone,) = denoiser.serve([request])
            result = together[id(request)]
            assert result.tokens.tolist() == alone.tokens.tolist(), (policy, request)
            assert (result.new_tokens, result.finish_reason, result.num_forwards) == (
                alone.new_tokens, alone.finish_reason, alone.num_forwards,
            )  # fmt: skip


def test_requests_leave_and_join_between_steps(model_of):
    denoiser = Denoiser(model_of("LLaDA"))
    taken = []

    def requests():
        for name, new in (("long", 9), ("short", 2), ("next", 3), ("last", 1)):
            taken.append(name)
            yield Request([1, 2, 3], max_new_tokens=new, name=name)

    served = denoiser.serve(requests(), batch_size=2)
    assert next(served).request.name == "short"
    assert taken == ["long", "short"]
    assert [result.request.name for result in served] == ["next", "last", "long"]


def published_llada_loop(logits_of, tokens: list[int], blocks: list[range]) -> list[int]:
    """Greedy, one position a forward, the surest first."""
    tokens = list(tokens)
    for block in blocks:
        while masked := [i for i in block if tokens[i] == MASK]:
            logits = logits_of(tokens).clone()
            logits[:, MASK] = -math.inf
            probability, token = logits.softmax(-1).max(-1)
            place = min(masked, key=lambda i: (-float(probability[i]), i))
            tokens[place] = int(token[place])
    return tokens


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_what_a_published_loop_decides(name, guidance, model_of):
    """Blocks on the grid of the model's attention, shifted logits, and guidance, from the plain forward."""
    family, model = FAMILIES[name], model_of(name)
    weights = random_weights(family)
    prompt = torch.randint(0, MASK, (6,), generator=torch.Generator().manual_seed(3)).tolist()
    tokens = prompt + [MASK] * 7
    size = model.block_length
    grid = [range(6, 9), range(9, 12), range(12, 13)]
    if size is not None:
        grid = [range(i, min(i + size, 13)) for i in range(0, 13, size)]

    def logits_of(tokens: list[int]) -> torch.Tensor:
        def one(tokens: list[int]) -> torch.Tensor:
            logits = family.logits(weights, torch.tensor(tokens))
            return torch.cat((logits[:1], logits[:-1])) if "bias" in str(list(weights)) and model.shifted else logits

        given = one(tokens)
        if not guidance:
            return given
        without = one([MASK] * 6 + tokens[6:])
        return without + (guidance + 1) * (given - without)

    denoiser = Denoiser(model, block_length=None if size else 3, guidance_scale=guidance)
    got = denoiser.generate(torch.tensor([prompt]), max_new_tokens=7)
    assert got[0].tolist() == published_llada_loop(logits_of, tokens, grid)


def test_stop_tokens_end_an_answer_and_are_repeated(model_of):
    model = model_of("LLaDA")
    prompt = torch.tensor([[5, 9, 2]])
    whole = Denoiser(model, block_length=4).generate(prompt, max_new_tokens=12)[0, 3:].tolist()
    stop = whole[5]
    first = whole.index(stop)
    denoiser = Denoiser(model, block_length=4, stop_token_ids=[stop])
    answer = denoiser.generate(prompt, max_new_tokens=12)[0, 3:].tolist()
    assert answer == whole[:first] + [stop] * (12 - first)
    (result,) = denoiser.serve([Request(prompt[0], max_new_tokens=12)])
    assert result.finish_reason == "stop"
    assert result.new_tokens == whole[:first]
    assert result.num_forwards == (first // 4 + 1) * 4  # the blocks behind it take none
    later = Request(prompt[0], max_new_tokens=12, min_new_tokens=first + 1)
    (result,) = denoiser.serve([later])
    assert stop not in result.tokens[3 : 3 + first + 1].tolist()


def test_a_stop_of_ones_own_and_stop_strings(model_of):
    denoiser = Denoiser(model_of("LLaDA"), block_length=2)

    def decode(tokens: list[int]) -> str:
        return "".join(f"<{token}>" for token in tokens)

    whole = denoiser.generate(torch.tensor([[5, 9]]), max_new_tokens=8)[0, 2:].tolist()
    text = f"{whole[3]}><{whole[4]}"
    request = Request([5, 9], max_new_tokens=8, stop=stop_strings(decode, ["no such text", text]))
    (result,) = denoiser.serve([request])
    assert text not in decode(result.new_tokens)
    assert result.new_tokens == whole[: next(n for n in range(9) if text in decode(whole[:n])) - 1]
    assert result.finish_reason == "stop"
    assert result.num_forwards == 2 * math.ceil((len(result.new_tokens) + 1) / 2)
    with pytest.raises(ValueError, match="strings must be at least one, and not empty"):
        stop_strings(decode, [""])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_suppressed_tokens_are_never_drawn(temperature, model_of):
    allowed = [7, 30]
    suppress = [token for token in range(VOCAB) if token not in allowed]
    denoiser = Denoiser(model_of("LLaDA"), temperature=temperature, suppress=suppress)
    answer = denoiser.generate(torch.tensor([[1, 2], [3, 4]]), max_new_tokens=6, seed=torch.tensor([1, 2]))[:, 2:]
    assert set(answer.flatten().tolist()) <= set(allowed)


def test_a_wrapped_module_with_a_head_or_logits(model_of):
    model = model_of("LLaDA")
    requests = [Request([1, 2, 3, 4], max_new_tokens=6, temperature=0.8, seed=4), Request([7], max_new_tokens=3)]

    def padded(function):
        def run(tokens, attention_mask=None):
            from diffusion_runtime.nn import AttentionContext

            lengths = None if attention_mask is None else attention_mask.sum(1)
            return function(tokens, AttentionContext(None, lengths))

        return run

    expected = [r.tokens.tolist() for r in Denoiser(model).serve(requests)]
    head = torch.nn.Linear(*model.head.weight.shape[::-1], bias=False)
    head.weight = torch.nn.Parameter(model.head.weight)
    for wrapped in (
        wrap(padded(model), mask_token_id=MASK, padding_mask="attention_mask"),
        wrap(padded(model.hidden), head=head, mask_token_id=MASK, padding_mask="attention_mask"),
        wrap(padded(model.hidden), head=head.weight, mask_token_id=MASK, padding_mask="attention_mask"),
    ):
        assert [r.tokens.tolist() for r in Denoiser(wrapped).serve(requests)] == expected
    blind = Denoiser(wrap(model, mask_token_id=MASK))
    with pytest.raises(ValueError, match="need a module that takes a padding mask"):
        list(blind.serve(requests))
    with pytest.raises(TypeError, match="head must be a linear layer or its weight, got str"):
        wrap(model, head="lm_head", mask_token_id=MASK)
    with pytest.raises(ValueError, match=r"the model must give states \[1, 5, dim\], got Size|got \(3,\)"):
        list(Denoiser(wrap(lambda t: torch.zeros(3), head=head, mask_token_id=MASK)).serve([Request([1], 4)]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": [[1]]}, r"tokens must be \[length\] int64, got \(1, 1\)"),
        ({"tokens": [0.5]}, "got .* torch.float32"),
        ({"tokens": []}, "there is nothing in tokens"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0"),
        ({"min_new_tokens": 2, "max_new_tokens": 1}, "min_new_tokens must be at most max_new_tokens, got 2 and 1"),
        ({"temperature": math.nan}, "temperature must be finite"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"steps_per_block": 0}, "steps_per_block must be at least 1"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"top_p": 1.5}, "top_p must be from 0 to 1, got 1.5"),
        ({"min_p": math.nan}, "min_p must be from 0 to 1, got nan"),
        ({"revisable": torch.ones(3)}, r"revisable must be \(1,\) bool"),
        ({"seed": 2**64}, "at most 64 bits"),
    ],
)
def test_rejects_requests(settings, message):
    with pytest.raises(ValueError, match=message):
        Request(**({"tokens": [1]} | settings))


def test_rejects_what_does_not_fit_the_denoiser(model_of):
    with pytest.raises(ValueError, match="block_length must be 4, as the model's attention has it, got 8"):
        Denoiser(model_of("SDAR"), block_length=8)
    denoiser = Denoiser(model_of("LLaDA"))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        list(denoiser.serve([], batch_size=0))
    with pytest.raises(ValueError, match="decides itself when it is done: num_steps must be None, got 4"):
        list(denoiser.serve([Request([1], 4, policy="threshold", num_steps=4)]))
    with pytest.raises(ValueError, match="revisable needs a policy that changes what is decided"):
        list(denoiser.serve([Request([1], 4, revisable=torch.tensor([True]))]))
    with pytest.raises(ValueError, match="min_new_tokens needs stop_token_ids"):
        list(denoiser.serve([Request([1], 4, min_new_tokens=2)]))
    with pytest.raises(ValueError, match="guidance_scale must be finite and at least 0, got -1"):
        Denoiser(model_of("LLaDA"), guidance_scale=-1)
    with pytest.raises(ValueError, match="check_every must be at least 1, got 0"):
        Denoiser(model_of("LLaDA"), check_every=0)
    with pytest.raises(ValueError, match=f"suppress holds token {VOCAB}, which is outside"):
        list(denoiser.serve([Request([1], 4, suppress=[VOCAB])]))


def test_a_rule_that_never_ends_is_an_error(model_of):
    nothing = Policy(lambda samples, canvas: canvas.masked & False, scheduled=False)
    with pytest.raises(RuntimeError, match="has not finished the block from 1 to 3 in 193 steps"):
        list(Denoiser(model_of("LLaDA"), policy=nothing).serve([Request([1], 2)]))


def test_room_is_given_back_however_it_ends(model_of):
    denoiser = Denoiser(model_of("SDAR"))
    pages = denoiser._forward.pages
    for step in denoiser.stream(torch.tensor([[1, 2]]), max_new_tokens=9):
        assert len(pages._users) == 1
        if step.index == 1:
            break
    served = denoiser.serve([Request([1, 2], 9), Request([3], 2)], batch_size=2)
    next(served)
    assert len(pages._users) == 1
    served.close()
    del step
    assert not pages._users


def test_a_model_conditioned_on_the_noise_level_is_told_it(model_of, monkeypatch):
    """MDLM's times and total noise; under other rules the share of the block that is undecided stands for the time."""
    model, told = model_of("MDLM with time conditioning"), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda *a, sigma: told.append(sigma) or hidden(*a, sigma=sigma))
    requests = [
        Request([1, 2, 3], max_new_tokens=6, policy="mdlm", num_steps=4, seed=5, temperature=1.0),
        Request([4, 5], max_new_tokens=8, policy="low_confidence", num_steps=4),
    ]
    denoiser = Denoiser(model, guidance_scale=0.5, cache="dual")
    together = {id(result.request): result for result in denoiser.serve(requests)}
    times = [[1 + (1e-5 - 1) * step / 3, 1 - step / 4] for step in range(3)]
    expected = torch.tensor([[-math.log(1 - 0.999 * t) for t in pair] for pair in times])
    torch.testing.assert_close(torch.stack(told[:3]), expected.repeat(1, 2))  # both branches
    for request in requests:
        (alone,) = denoiser.serve([request])
        assert alone.tokens.tolist() == together[id(request)].tokens.tolist()


def test_keys_of_other_noise_levels_are_not_kept(model_of):
    assert Denoiser(model_of("BD3LM with time conditioning"))._forward.cache == "none"
    with pytest.raises(ValueError, match="other noise levels"):
        Denoiser(model_of("BD3LM with time conditioning"), cache="block")
