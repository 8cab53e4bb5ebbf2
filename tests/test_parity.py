"""A loop with a fault planted in it is told from ours at the first step that shows it, and the fault is named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_cases import error_of, write_model
from models import random_llada
from torch import Tensor

from diffusion_runtime import Denoiser, wrap
from diffusion_runtime.cli import main
from diffusion_runtime.decoding import Policy, UniformDiffusion, threshold
from diffusion_runtime.parity import compare

MASK, BLOCK = 60, 8
PROMPT = torch.tensor([[5, 6, 7], [8, 9, 10]])

Choose = Callable[[Tensor, Tensor], Tensor]  # probabilities of the undecided positions of a block -> which are decided


def loop(
    module: Any,
    tokens: Tensor,
    choose: Choose,
    *,
    logits_of: Callable[[Any, Tensor, int], Tensor] = lambda module, tokens, step: module(tokens),
    pick: Callable[[Tensor], Tensor] = lambda logits: logits.argmax(-1),
    block: int = BLOCK,
) -> Iterator[Tensor]:
    """Rows one after the other inside a step; blocks behind the prompt."""
    step = 0
    for start in range(3, tokens.shape[1], block):
        inside = slice(start, start + block)
        while (tokens[:, inside] == MASK).any():
            logits = logits_of(module, tokens, step)[:, inside].float().clone()
            logits[..., MASK] = -math.inf
            for row in range(len(tokens)):
                undecided = (tokens[row, inside] == MASK).nonzero()[:, 0]
                if len(undecided):
                    token = pick(logits[row, undecided])
                    probability = logits[row, undecided].softmax(-1).gather(1, token[:, None])[:, 0]
                    chosen = choose(probability, logits[row, undecided])
                    tokens[row, start + undecided[chosen]] = token[chosen]
            yield tokens.clone()
            step += 1


def best(count: int, score: Tensor) -> Tensor:
    return score.sort(descending=True, stable=True).indices[:count]


def by_confidence(probability: Tensor, logits: Tensor) -> Tensor:
    del logits
    return best(1, probability)


def by_entropy(probability: Tensor, logits: Tensor) -> Tensor:
    del probability
    return best(1, (logits.log_softmax(-1).clamp(min=-1e4) * logits.softmax(-1)).sum(-1))


def above(bound: float, *, inclusive: bool = True) -> Choose:
    def choose(probability: Tensor, logits: Tensor) -> Tensor:
        del logits
        passing = probability >= bound if inclusive else probability > bound
        return passing.nonzero()[:, 0] if passing.any() else best(1, probability)

    return choose


def denoiser(model: Any = None, **settings: Any) -> Denoiser:
    return Denoiser(random_llada() if model is None else model, block_length=BLOCK, **settings)


@pytest.mark.parametrize(
    ("choose", "settings"),
    [
        (by_confidence, {}),
        (by_entropy, {"policy": "entropy"}),
        (above(0.3), {"policy": Policy(partial(threshold, threshold=0.3), scheduled=False)}),
    ],
)
def test_the_same_loop_is_the_same(choose, settings):
    for prompt in PROMPT.split(1):
        assert compare(partial(loop, choose=choose), denoiser(**settings), prompt, max_new_tokens=20) is None


def test_a_loop_may_ask_about_a_part():
    """A model whose attention is causal by blocks, asked for the sequence to the end of the block only."""

    def to_the_end_of_the_block(module, tokens, step):
        stop = 3 + BLOCK * (1 + step // BLOCK)
        return torch.nn.functional.pad(module(tokens[:, :stop]), (0, 0, 0, tokens.shape[1] - stop))

    found = compare(
        partial(loop, choose=by_confidence, logits_of=to_the_end_of_the_block), denoiser(), PROMPT, max_new_tokens=16
    )
    assert found is not None  # LLaDA sees what comes after
    assert found.cause == "stale cache"
    assert found.detail.startswith("theirs: logits at position")


def test_logits_of_an_earlier_step():
    kept: dict[str, Tensor] = {}

    def every_second(module, tokens, step):
        if step % 2 == 0:
            kept["logits"] = module(tokens)
        return kept["logits"]

    found = compare(partial(loop, choose=by_confidence, logits_of=every_second), denoiser(), PROMPT, max_new_tokens=16)
    assert (found.step % 2, found.cause) == (1, "stale cache")
    assert "not asked in this step" in found.detail


def test_a_cache_that_is_not_refreshed():
    """A module with a cache of its own, which keeps the answer for what lies outside of the first positions asked."""

    class Caching(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.kept = random_llada(), None

        def forward(self, input_ids, fresh=None):
            logits = self.model(input_ids)
            if fresh:
                self.kept = logits
            return SimpleNamespace(logits=logits if fresh is None else torch.cat((logits[:, :5], self.kept[:, 5:]), 1))

    module = Caching()
    found = compare(
        partial(loop, choose=by_confidence, logits_of=lambda m, tokens, step: m(tokens, fresh=step == 0).logits),
        denoiser(wrap(module, mask_token_id=MASK)),
        PROMPT,
        max_new_tokens=16,
    )
    assert found.cause == "stale cache"
    assert found.step > 0
    assert found.detail.startswith("theirs: logits at position")


def test_other_tokens_than_those_there_are():
    def of_the_prompt(module, tokens, step):
        return module(torch.where(torch.arange(tokens.shape[1]) < 4 + step, tokens, 0))

    found = compare(partial(loop, choose=by_confidence, logits_of=of_the_prompt), denoiser(), PROMPT, max_new_tokens=16)
    assert found.cause == "stale cache"
    assert "about other tokens" in found.detail


def test_our_own_approximate_cache():
    found = compare(partial(loop, choose=by_confidence), denoiser(cache="dual"), PROMPT, max_new_tokens=16)
    assert found.cause == "stale cache"
    assert found.detail.startswith("ours: ")


def module_of(table: Tensor) -> Any:
    """Logits by position only; ``[length, vocab]``."""
    return wrap(lambda tokens: table[: tokens.shape[1]].expand(len(tokens), -1, -1), mask_token_id=MASK)


def table_of(sure: dict[int, float], length: int = 3 + BLOCK) -> Tensor:
    """Two candidates at each position; ``sure`` says by how much the first leads."""
    table = torch.full((length, 61), -1e5)
    table[:, 20] = 0.0
    for place in range(length):
        table[place, 10] = sure.get(place, 0.5 + 0.01 * place)
    return table


def test_a_strict_comparison():
    """Two candidates have a probability of exactly 1, which is the threshold."""
    model = module_of(table_of({5: 1e5, 8: 1e5}))
    ours = denoiser(model, policy=Policy(partial(threshold, threshold=1.0), scheduled=False))
    assert compare(partial(loop, choose=above(1.0)), ours, PROMPT, max_new_tokens=BLOCK) is None
    found = compare(partial(loop, choose=above(1.0, inclusive=False)), ours, PROMPT, max_new_tokens=BLOCK)
    assert (found.step, found.row, found.position, found.cause) == (0, 0, 8, "different rule")
    assert "inclusive=False" in found.detail


def test_ties_between_tokens_and_between_positions():
    model = module_of(table_of({4: 0.0}))
    last = lambda logits: logits.shape[-1] - 1 - logits.flip(-1).argmax(-1)  # noqa: E731
    found = compare(partial(loop, choose=by_confidence, pick=last), denoiser(model), PROMPT, max_new_tokens=BLOCK)
    assert (found.position, found.cause) == (4, "tie")
    assert "ours took token 10 (logit 0) and theirs 20 (0)" in found.detail

    def rightmost(probability, logits):
        del logits
        return (probability == probability.max()).nonzero()[-1]

    model = module_of(table_of({4: 3.0, 7: 3.0}))
    found = compare(partial(loop, choose=rightmost), denoiser(model), PROMPT, max_new_tokens=BLOCK)
    assert (found.step, found.position, found.cause) == (0, 4, "tie")
    assert "ours decided position 4 and theirs 7" in found.detail


def test_confidences_in_few_bits():
    def rounded(probability, logits):
        return by_confidence(probability.bfloat16(), logits)

    model = module_of(table_of({place: 1 + 0.001 * place for place in range(3, 11)}))
    found = compare(partial(loop, choose=rounded), denoiser(model), PROMPT, max_new_tokens=BLOCK)
    assert found.cause == "precision"
    assert "bfloat16" in found.detail


def test_another_order():
    found = compare(partial(loop, choose=by_entropy), denoiser(), PROMPT, max_new_tokens=16)
    assert found.cause == "different rule"
    assert "policy 'entropy'" in found.detail
    two = partial(loop, choose=lambda probability, logits: best(2, probability))
    found = compare(two, denoiser(), PROMPT, max_new_tokens=16)
    assert (found.step, found.cause) == (0, "different rule")


def test_one_that_ends_sooner():
    def short(module, tokens):
        for number, step in enumerate(loop(module, tokens, by_confidence)):
            if number < 5:
                yield step

    found = compare(short, denoiser(), PROMPT, max_new_tokens=16)
    assert (found.step, found.cause, found.detail) == (5, "different end", "the reference has ended, ours goes on")
    longer = partial(loop, choose=by_confidence, block=BLOCK)
    ours = denoiser(stop_token_ids=list(range(60)))
    found = compare(longer, ours, PROMPT, max_new_tokens=16)
    assert (found.cause, found.detail) == ("different end", "ours ended the answer at a stop token and repeated it")


def test_a_loop_that_leaves_the_block():
    prompt = torch.tensor([[5, 6, 7, 8], [8, 9, MASK, MASK]])  # of the first row nothing is undecided
    found = compare(lambda module, tokens: [torch.zeros_like(tokens)], Denoiser(random_llada()), prompt)
    assert (found.row, found.cause) == (0, "different rule")
    assert "theirs changed position 0, outside of the block" in found.detail
    found = compare(partial(loop, choose=by_confidence, block=20), denoiser(), PROMPT, max_new_tokens=20)
    assert "outside of the block" in found.detail


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        ({"temperature": 0.5}, "temperature 0"),
        ({"policy": UniformDiffusion(61)}, "temperature 0"),
        ({"suppress": [3]}, "neither guidance_scale nor suppress"),
        ({"guidance_scale": 0.5}, "neither guidance_scale nor suppress"),
    ],
)
def test_rejects_what_cannot_be_compared(ours, message):
    made = Denoiser(random_llada(), **ours)
    with pytest.raises(ValueError, match=message):
        compare(partial(loop, choose=by_confidence), made, PROMPT)


def test_rejects_other_shapes():
    with pytest.raises(ValueError, match=r"must yield \(2, 19\) tokens, got \(2, 3\)"):
        compare(lambda module, tokens: [PROMPT], denoiser(), PROMPT, max_new_tokens=16)


LOOP = """
import torch

def best(module, tokens, score=lambda p: p):
    while (tokens == 0).any():
        logits = module(tokens)
        logits[..., 0] = -torch.inf
        probability, token = logits.softmax(-1).max(-1)
        place = int(score(probability[0]).masked_fill(tokens[0] != 0, -2).argmax())
        tokens[0, place] = token[0, place]
        yield tokens.clone()

def worst(module, tokens):
    return best(module, tokens, lambda p: -p)
"""


def test_from_the_command_line(tmp_path, capsys):
    model = write_model(tmp_path / "model", 30)
    (tmp_path / "loop.py").write_text(LOOP)
    run = ["--model", model, "--tokens", "3,4,5", "--max-new-tokens", "6"]
    assert main(["compare", f"{tmp_path}/loop.py:best", *run]) == 0
    assert capsys.readouterr().out == "the same to the end\n"
    assert main(["compare", f"{tmp_path}/loop.py:worst", *run]) == 1
    assert capsys.readouterr().out.startswith("step 0, row 0, position ")
    assert main(["compare", f"{tmp_path}/loop.py:worst", *run, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["cause"] in ("different rule", "tie", "precision")
    assert "has no function 'none'" in error_of(capsys, ["compare", f"{tmp_path}/loop.py:none", *run], 2)
    assert "FILE.py:FUNCTION" in error_of(capsys, ["compare", "loop", *run], 2)
    assert "numbers with commas" in error_of(capsys, ["compare", f"{tmp_path}/loop.py:best", *run, "--tokens", "a"], 2)
    assert "tokenizer.json" in error_of(
        capsys, ["compare", f"{tmp_path}/loop.py:best", "--model", model, "--prompt", "a"], 3
    )
