"""Rules that draw: how often, against the published chances."""

from __future__ import annotations

import math
from functools import partial

import published_rules as published
import pytest
import torch
from policy_rows import Row, canvas_of, fixed_row, samples_of

from diffusion_runtime import decoding, ops
from diffusion_runtime.decoding import POLICIES, Canvas


def frequencies(row: Row, rule, count: int = 3000) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each position is committed, and masked again, over many steps' draws."""
    canvas, samples = canvas_of(row), samples_of(row)
    many = {
        name: getattr(canvas, name).expand(count, *getattr(canvas, name).shape[1:])
        for name in ("tokens", "masked", "editable", "seed", "confidence")
    }
    for name in ("index", "num_steps", "num_positions", "num_masked", "num_mask_free"):
        many[name] = getattr(canvas, name).expand(count)
    canvas = Canvas(**many, position=canvas.position, step=torch.arange(count)[:, None])
    samples = ops.TokenSamples(*(x.expand(count, -1) for x in samples))
    decided = rule(samples, canvas)
    if isinstance(decided, torch.Tensor):
        return decided.double().mean(0), torch.zeros(row.length)
    again = torch.zeros(row.length) if decided.remask is None else decided.remask.double().mean(0)
    return decided.commit_mask.double().mean(0), again


def assert_close_to(frequency: torch.Tensor, expected: list[float], count: int = 3000) -> None:
    for got, chance in zip(frequency.tolist(), expected, strict=True):
        assert abs(got - chance) < 4.7 * math.sqrt(max(chance * (1 - chance), 1e-3) / count), (got, chance)


@pytest.mark.parametrize("index", [0, 3, 7])
def test_origin_and_ancestral_unmask_by_chance(index):
    row = fixed_row(8, num_steps=8, index=index, masked=[0, 1, 2, 5, 6, 7], decided=[3])
    commits, _ = frequencies(row, POLICIES["dream_origin"].rule)
    t = published.times(8, 1e-3)
    chance = 1.0 if index == 7 else 1 - t[index + 1] / t[index]
    assert_close_to(commits, [chance if i in row.masked else 0.0 for i in range(8)])
    commits, again = frequencies(row, POLICIES["mdlm"].rule)
    t = published.times(7, 1e-5)
    chance = 1.0 if index == 7 else (t[index] - t[index + 1]) / t[index]
    assert_close_to(commits, [chance if i in row.masked else 0.0 for i in range(8)])
    assert again.sum() == 0


@pytest.mark.parametrize("name", ["mdlm", "remdm_cap", "remdm_loop"])
def test_the_last_step_takes_the_most_probable_tokens(name):
    row = fixed_row(4, index=3)
    decision = POLICIES[name].rule(samples_of(row), canvas_of(row))
    assert decision.commit_mask.all()
    assert torch.equal(decision.candidates, samples_of(row).argmax)
    row = fixed_row(4, index=2)
    assert torch.equal(POLICIES[name].rule(samples_of(row), canvas_of(row)).candidates, samples_of(row).token)


@pytest.mark.parametrize("kind", ["cap", "rescale", "conf", "loop"])
@pytest.mark.parametrize("index", [0, 5, 9, 15, 19])
def test_remdm_masks_again_by_chance(kind, index):
    row = fixed_row(
        6, num_steps=21, index=index, masked=[0, 2], decided=[1, 3, 4], committed_at=[0.5, 0.1, 0.5, 0.9, 0.5, 1.0]
    )  # position 5 is given
    eta = 0.1 if kind == "loop" else 0.3  # above 1/9 there is no such process
    commits, again = frequencies(row, partial(decoding.remask, kind=kind, eta=eta))
    decided = {i: row.committed_at[i] for i in row.decided}
    chance, chances = published.remask_chances(kind, index, 20, eta, decided)
    assert_close_to(commits, [chance if i in row.masked else 0.0 for i in range(6)])
    assert_close_to(again, [chances.get(i, 0.0) for i in range(6)])


def test_random_order_is_keyed_and_uniform():
    row = fixed_row(4)
    commits, _ = frequencies(row, POLICIES["random"].rule)
    assert_close_to(commits, [0.25] * 4)
    commits, _ = frequencies(fixed_row(4, num_steps=1), POLICIES["bd3lm_first_hitting"].rule)
    assert_close_to(commits, [0.25] * 4)
    wide = fixed_row(64, num_steps=8)
    first, same, other = (POLICIES["random"].rule(samples_of(wide), canvas_of(wide, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_an_order_temperature_draws_positions_without_replacement(temperature):
    """Dream's ``alg_temp``: two of four positions, as drawn one after the other."""
    probability = [0.9, 0.8, 0.8, 0.1]
    row = fixed_row(4, num_steps=2, probability=probability)
    commits, _ = frequencies(row, partial(decoding.low_confidence, order_temperature=temperature))
    weight = [math.exp(p / temperature) for p in probability]
    total = sum(weight)
    expected = [
        w / total + sum(v / total * w / (total - v) for j, v in enumerate(weight) if j != i)
        for i, w in enumerate(weight)
    ]
    assert_close_to(commits, expected)
