"""Every rule, step by step, against the published one written out on lists."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import published_rules as published
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_rows import PROBABILITIES, canvas_of, chosen, fixed_row, rows, samples_of

from diffusion_runtime import decoding
from diffusion_runtime.decoding import POLICIES, Policy


@given(rows())
def test_llada_and_sdar_in_order_of_a_score(row):
    quota = published.even_share(row.num_masked, row.num_steps, row.index)
    samples_of(row)
    scores = {
        "low_confidence": row.probability, "topk_margin": row.margin, "entropy": [-x for x in row.entropy],
    }  # fmt: skip
    for name, score in scores.items():
        assert chosen(row, POLICIES[name].rule) == published.best(score, row.masked, quota)
    quota = published.even_share(row.length, row.num_steps, row.index)
    assert chosen(row, POLICIES["sdar_static"].rule) == published.best(row.probability, row.masked, quota)
    assert chosen(row, POLICIES["sdar_sequential"].rule) == set(row.masked[:quota])


@given(rows(), st.sampled_from(PROBABILITIES))
def test_thresholds(row, bound):
    bound = float(np.float32(bound))
    quota = published.even_share(row.length, row.num_steps, row.index)
    samples_of(row)
    for inclusive in (True, False):
        rule = partial(decoding.threshold, threshold=bound, inclusive=inclusive)
        expected = published.above(row.probability, row.masked, bound, 1, inclusive=inclusive)
        assert chosen(row, rule) == expected
        expected = published.above(row.probability, row.masked, bound, quota, inclusive=inclusive)
        assert chosen(row, partial(rule, at_least=decoding.of_block_length)) == expected
        left = partial(rule, at_least=decoding.of_block_length, fallback="leftmost")
        passing = {i for i in row.masked if row.probability[i] >= bound and (inclusive or row.probability[i] != bound)}
        assert chosen(row, left) == (passing if len(passing) >= quota else set(row.masked[:quota]))


@given(rows())
def test_thresholds_by_name(row):
    samples_of(row)
    quota = published.even_share(row.length, row.num_steps, row.index)
    for name, bound, least, inclusive in (
        ("threshold", 0.9, 1, True),
        ("fast_dllm_v2", 0.95, 1, False),
        ("sdar_dynamic", 0.85, quota, False),
        ("llada2", 0.95, quota, False),
    ):
        bound = float(np.float32(bound))
        expected = published.above(row.probability, row.masked, bound, least, inclusive=inclusive)
        assert chosen(row, POLICIES[name].rule) == expected, name


@given(rows(), st.sampled_from([0.0, 0.5, 1.0, 1.5, 3.0]))
def test_the_factor_rule_is_the_papers(row, f):
    samples_of(row)
    expected = published.factor([np.float32(x) for x in row.probability], row.masked, f) if row.masked else set()
    assert chosen(row, partial(decoding.factor, factor=f)) == expected


def test_the_published_factor_code_commits_one_more():
    row = fixed_row(probability=[0.99, 0.99, 0.99, 0.01])
    assert chosen(row, POLICIES["factor"].rule) == {0, 1, 2}  # the published code: all four


@given(
    rows(), st.sampled_from([0.0, 0.03125, 0.09375, 0.25, 1.0]), st.sampled_from(["entropy", "confidence", "margin"])
)
def test_the_entropy_bound(row, bound, order):
    score = {"entropy": [-x for x in row.entropy], "confidence": row.confidence, "margin": row.margin}[order]
    expected = published.entropy_bounded(score, row.entropy, row.masked, bound)
    assert chosen(row, partial(decoding.entropy_bounded, bound=bound, order=order)) == expected


@given(rows())
def test_dreams_times(row):
    exact = published.dream_count(len(row.masked), row.num_steps, row.index)
    got = int(decoding.of_times(canvas_of(row))[0])
    last = row.index == row.num_steps - 1
    assert got == math.floor(exact) or (not last and abs(exact - round(exact)) < 1e-4)  # float32 may tip a whole number
    samples_of(row)
    for name, score in {
        "dream_maskgit_plus": row.probability, "dream_topk_margin": row.margin,
        "dream_entropy": [-x for x in row.entropy],
    }.items():  # fmt: skip
        assert chosen(row, POLICIES[name].rule) == published.best(score, row.masked, got)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 64, 512])
def test_times_are_those_of_linspace(num_steps):
    from diffusion_runtime.decoding.canvas import time_of

    index = torch.arange(num_steps + 1)
    for last in (1e-3, 1e-5):
        got = time_of(index, torch.full_like(index, num_steps), last)
        torch.testing.assert_close(got, torch.linspace(1, last, num_steps + 1), rtol=1e-7, atol=1e-7)
        assert got[0] == 1
        assert got[-1] == torch.tensor(last)


@given(rows(), st.data(), st.integers(1, 3), st.integers(1, 16))
def test_joint_threshold_edits_what_was_decided(row, data, least, most):
    samples_of(row)
    bound, edit_bound = (data.draw(st.sampled_from([0.0, 0.5, *row.probability])) for _ in range(2))
    rule = partial(
        decoding.joint_threshold, threshold=bound, edit_threshold=edit_bound, at_least=least, max_edit_steps=most
    )
    decision = rule(samples_of(row), canvas_of(row))
    commits = published.above(row.probability, row.masked, bound, least, inclusive=False)
    edits = {
        i for i in row.decided if row.candidates[i] != row.tokens[i] and np.float32(row.probability[i]) > edit_bound
    }
    assert set(decision.commit_mask[0].nonzero()[:, 0].tolist()) == commits | edits
    over = not row.masked and (not edits or row.num_mask_free + 1 >= most)
    assert decision.finished.tolist() == [over]


def test_joint_threshold_stops_after_so_many_edits():
    for num_mask_free, over in ((1, False), (2, True), (3, True)):
        row = fixed_row(2, masked=[], decided=[0, 1], candidates=[1, 1], num_mask_free=num_mask_free)
        rule = partial(decoding.joint_threshold, threshold=0.9, edit_threshold=0.4, max_edit_steps=3)
        decision = rule(samples_of(row), canvas_of(row))
        assert decision.commit_mask.all()
        assert decision.finished.tolist() == [over]


def test_near_the_best_goes_with_it():
    """dInfer's rule."""
    row = fixed_row(4, probability=[0.49, 0.500004, 0.3, 0.50001])
    rule = partial(decoding.threshold, threshold=0.9)
    assert chosen(row, rule) == {3}
    assert chosen(row, partial(rule, near_best=1e-5)) == {1, 3}


def test_a_policy_says_what_it_cannot():
    with pytest.raises(ValueError, match="confidence must be 'raw' or 'scaled', got 'cooked'"):
        Policy(decoding.random, confidence="cooked")
    with pytest.raises(ValueError, match="unknown policy 'best'; expected one of low_confidence"):
        decoding.as_policy("best")
