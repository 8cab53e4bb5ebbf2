"""Schedules and rules, as pure functions."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_runtime import ops
from diffusion_runtime.decoding import (
    Canvas,
    entropy,
    linear_quotas,
    low_confidence,
    random,
    threshold,
    topk_margin,
)


def canvas(masked: list[list[int]], quota: list[int], *, seed: int = 3, step: int = 0) -> Canvas:
    mask = torch.tensor(masked, dtype=torch.bool)
    return Canvas(
        mask, torch.tensor(quota), torch.arange(mask.shape[1]), torch.full((len(mask), 1), seed), torch.tensor(step)
    )


def samples(**fields: list[list[float]]) -> ops.TokenSamples:
    zero = torch.zeros(torch.tensor(next(iter(fields.values()))).shape)
    named = {name: torch.tensor(value) for name, value in fields.items()}
    return ops.TokenSamples(**{name: named.get(name, zero) for name in ops.TokenSamples._fields})


@given(st.lists(st.integers(0, 200), min_size=1, max_size=4), st.integers(1, 70))
def test_quotas_are_even_and_complete(counts, steps):
    quotas = linear_quotas(torch.tensor(counts), steps)
    assert quotas.shape == (steps, len(counts))
    assert quotas.sum(0).tolist() == counts
    for column, n in zip(quotas.T.tolist(), counts, strict=True):
        assert column == sorted(column, reverse=True)
        assert set(column) <= {n // steps, n // steps + 1}


def test_quotas_of_the_published_example():
    assert linear_quotas(torch.tensor([10]), 4)[:, 0].tolist() == [3, 3, 2, 2]


@pytest.mark.parametrize(
    ("rule", "field", "values"),
    [
        (low_confidence, "logprob", [-3.0, -1.0, -2.0, -1.0, -0.5]),
        (topk_margin, "margin", [0.1, 0.4, 0.2, 0.4, 0.9]),
        (entropy, "entropy", [3.0, 1.0, 2.0, 1.0, 0.1]),
    ],
)
def test_scores_and_ties(rule, field, values):
    """The best masked positions win, the lowest one at a tie; position 4 scores best but is not masked."""
    scored = samples(**{field: [values]})
    for quota, expected in ((0, []), (1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])):
        commit_mask = rule(scored, canvas([[1, 1, 1, 1, 0]], [quota]))
        assert commit_mask[0].nonzero()[:, 0].tolist() == expected


def test_ties_among_many_positions():
    scored = samples(logprob=[[-1.0] * 100])
    commit_mask = low_confidence(scored, canvas([[0, 0] + [1] * 98], [5]))
    assert commit_mask[0].nonzero()[:, 0].tolist() == [2, 3, 4, 5, 6]


def test_rows_have_their_own_quota():
    scored = samples(logprob=[[-1.0, -2.0, -3.0], [-3.0, -2.0, -1.0]])
    commit_mask = low_confidence(scored, canvas([[1, 1, 1], [1, 1, 0]], [2, 1]))
    assert commit_mask.tolist() == [[True, True, False], [False, True, False]]


def test_random_order_is_keyed_and_uniform():
    counts = torch.zeros(4)
    for step in range(4000):
        counts += random(samples(logprob=[[0.0] * 4]), canvas([[1, 1, 1, 1]], [1], step=step))[0]
    assert ((counts - 1000).abs() < 130).all()  # 4.7 standard deviations
    same = [random(samples(logprob=[[0.0] * 64]), canvas([[1] * 64], [9], seed=s)) for s in (1, 1, 2)]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])


def test_threshold_takes_what_reaches_it_and_at_least_the_best():
    rule = partial(threshold, threshold=0.5)
    probabilities = torch.tensor([[0.5, 0.49999, 0.7, 0.9], [0.1, 0.3, 0.3, 0.9], [0.1, 0.2, 0.3, 0.4]])
    scored = samples(logprob=probabilities.log().tolist())
    masked = [[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert rule(scored, canvas(masked, [0, 0, 0])).int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
