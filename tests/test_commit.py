"""Commits on every backend: which positions, what is written, where new tokens come from."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from backends import device_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_draws import z_score

from diffusion_runtime import ops
from diffusion_runtime.ops._commit_reference import Problem

BACKENDS = ["reference", "cpp", "triton", pytest.param("cuda", marks=pytest.mark.gpu)]
RULES = ["quota", "threshold", "factor", "entropy_bound"]


def on(backend, **arguments):
    device = device_of(backend)
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()} | {"backend": backend}


def holds(rule, c, n, bound):
    """Whether the rule holds of the n best of the scores ``c``, which are in order."""
    if rule == "quota":
        return n <= bound
    if rule == "threshold":
        return c[n - 1] >= bound
    if rule == "factor":
        return (n + 1) * (1 - c[n - 1]) < bound
    return math.fsum(c[: n - 1]) <= bound


def stated(score, masked, rule, bound):
    """The rules in plain Python, a row at a time, as their docstring says."""
    chosen = torch.zeros_like(masked)
    bounds = (
        torch.as_tensor(bound, dtype=torch.int64 if rule == "quota" else torch.float32).expand(len(masked)).tolist()
    )
    for r in range(len(masked)):
        values = {i: float(score[r, i]) for i in range(masked.shape[1]) if masked[r, i]}
        sign = 1 if rule == "entropy_bound" else -1
        places = sorted(values, key=lambda i, v=values: (math.isnan(v[i]), 0 if math.isnan(v[i]) else sign * v[i], i))
        c = [values[i] for i in places]
        last = max([n for n in range(1, len(c) + 1) if holds(rule, c, n, bounds[r])], default=0)
        for i in places[: max(last, 0 if rule == "quota" else 1)]:
            chosen[r, i] = True
    return chosen


# eighths, so that sums are exact and ties and bounds are hit
VALUES = st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 0.875, 1.0, -0.0, math.nan, -math.inf])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rules_are_as_stated(backend, rule, data):
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 5, 9, 33]))
    count = batch * length
    score = torch.tensor(data.draw(st.lists(VALUES, min_size=count, max_size=count))).view(batch, length)
    masked = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count))).view(batch, length)
    if rule == "quota":
        bounds = st.integers(0, length + 1)
    else:
        bounds = st.sampled_from([0.0, 0.125, 0.5, 0.75, 1.0, 2.0, -1.0])
    bound = data.draw(bounds)
    if data.draw(st.booleans()):
        bound = torch.tensor(data.draw(st.lists(bounds, min_size=batch, max_size=batch)))
    got = ops.select_commits(**on(backend, score=score, masked=masked, rule=rule, bound=bound))
    assert torch.equal(got.cpu(), stated(score, masked, rule, bound))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [31, 32, 63, 64, 65, 257, 1025])
def test_long_canvases(backend, rule, length):
    generator = torch.Generator().manual_seed(length)
    score = torch.rand(2, length, generator=generator)
    masked = torch.rand(2, length, generator=generator) < 0.8
    bound = {"quota": length // 3, "threshold": 0.7, "factor": 3.0, "entropy_bound": length / 7}[rule]
    got = ops.select_commits(**on(backend, score=score, masked=masked, rule=rule, bound=bound)).cpu()
    assert torch.equal(got, stated(score, masked, rule, bound))
    assert 0 < got.sum() < masked.sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rule", "score", "bound", "expected"),
    [
        ("threshold", [0.9, 2.0, 0.8], 0.9, [True, True, False]),
        ("entropy_bound", [0.1, 0.2, 0.9], 0.1, [True, True, False]),
        # in float64 the sum of the first two is above the bound, in float32 it would be the bound
        ("entropy_bound", [2.0**-24, 3.0, 4.0], 3.0, [True, True, False]),
        ("quota", [-math.inf, math.inf, 0.0], 2, [False, True, True]),
    ],
)
def test_bounds_and_sums_that_rounding_would_move(backend, rule, score, bound, expected):
    score = torch.tensor([score])
    for as_number_and_tensor in (bound, torch.tensor([bound])):
        got = ops.select_commits(
            **on(
                backend,
                score=score,
                masked=torch.ones_like(score, dtype=torch.bool),
                rule=rule,
                bound=as_number_and_tensor,
            )
        )
        assert got.cpu().tolist() == [expected]


@pytest.mark.parametrize("backend", BACKENDS)
class TestSteps:
    def test_a_step_commits_and_renoises(self, backend):
        tokens, candidates = torch.arange(12).view(2, 6), 100 + torch.arange(12).view(2, 6)
        score = torch.tensor([[0.9, 0.1, 0.8, 0.2, 0.3, 0.4], [0.1, 0.2, 0.9, 0.95, 0.1, 0.1]])
        masked = torch.tensor([[True, True, False, True, True, True], [True] * 6])
        arguments = {"tokens": tokens, "candidates": candidates, "score": score, "masked": masked}
        arguments |= {"rule": "threshold", "bound": 0.85}
        after, commit_mask = (x.cpu() for x in ops.commit_step(**on(backend, **arguments)))
        expected = torch.tensor([[True] + [False] * 5, [False, False, True, True, False, False]])
        assert torch.equal(commit_mask, expected)
        assert torch.equal(after, torch.where(expected, candidates, tokens))

        noisy, again = (
            x.cpu() for x in ops.commit_step(**on(backend, **arguments, renoise_vocab=1000, seed=3, step=2))
        )
        assert torch.equal(again, expected)
        fresh = ops.renoise(**on(backend, tokens=tokens, renoise_mask=masked & ~expected, vocab=1000, seed=3, step=2))
        assert torch.equal(noisy, torch.where(expected, candidates, fresh.cpu()))
        assert noisy[0, 2] == tokens[0, 2]

    def test_new_tokens_are_keyed_by_their_place(self, backend):
        tokens, mask = torch.zeros(3, 40, dtype=torch.int64), torch.ones(3, 40, dtype=torch.bool)
        seed = torch.tensor([[5], [-1], [2**40]])
        position, step = torch.arange(40) + 2**31, torch.tensor([[0], [7], [2**32 - 1]])
        keys = {"seed": seed, "position": position, "step": step}
        got = ops.renoise(**on(backend, tokens=tokens, renoise_mask=mask, vocab=262_144, **keys)).cpu()
        uniform, _ = ops.philox_uniforms(seed, position, step, ops.DRAW_NOISE)
        assert torch.equal(got, (uniform * 262_144).floor().long())
        alone = ops.renoise(
            **on(backend, tokens=tokens[1:2, :1], renoise_mask=mask[1:2, :1], vocab=262_144, seed=-1,
                 position=position[:1], step=7)
        )  # fmt: skip
        assert alone.item() == got[1, 0]
        default = ops.renoise(**on(backend, tokens=tokens, renoise_mask=mask, vocab=9, seed=2**64 - 1)).cpu()
        uniform, _ = ops.philox_uniforms(-1, torch.arange(40), 0, ops.DRAW_NOISE)
        assert torch.equal(default, (uniform * 9).floor().long().expand(3, -1))

    @pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
    def test_empty(self, backend, shape):
        tokens, masked = torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.bool)
        arguments = {"tokens": tokens, "candidates": tokens, "score": torch.zeros(shape), "masked": masked}
        step = ops.commit_step(**on(backend, **arguments, rule="quota", bound=1, renoise_vocab=5, seed=1))
        assert step.tokens.shape == step.commit_mask.shape == shape

    def test_slices_and_strides(self, backend):
        wide = torch.randn(3, 80).abs()
        masked = torch.rand(3, 80) < 0.7
        tokens = torch.randint(0, 50, (3, 80))
        for cut in (slice(7, 40), slice(1, 80, 2)):
            arguments = {"tokens": tokens[:, cut], "candidates": tokens[:, cut] + 100, "masked": masked[:, cut]}
            arguments |= {"score": wide[:, cut], "rule": "entropy_bound", "bound": torch.tensor(2.0).expand(3)}
            before = [x.clone() for x in (wide, masked, tokens)]
            got = ops.commit_step(**on(backend, **arguments))
            assert torch.equal(got.commit_mask.cpu(), stated(wide[:, cut], masked[:, cut], "entropy_bound", 2.0))
            assert all(map(torch.equal, before, (wide, masked, tokens)))

    def test_a_row_is_the_same_alone(self, backend):
        score, masked = torch.rand(5, 70), torch.rand(5, 70) < 0.6
        together = ops.select_commits(**on(backend, score=score, masked=masked, rule="factor", bound=2.0)).cpu()
        for r in range(5):
            one = ops.select_commits(
                **on(backend, score=score[r : r + 1], masked=masked[r : r + 1], rule="factor", bound=2.0)
            )
            assert torch.equal(one.cpu()[0], together[r])


@pytest.mark.parametrize(("backend", "rows"), [("reference", 60), ("cpp", 400), ("triton", 20)])
@pytest.mark.parametrize("vocab", [7, 262_144])
def test_new_tokens_are_uniform(backend, rows, vocab):
    mask = torch.ones(rows, 500, dtype=torch.bool)
    tokens = ops.renoise(
        torch.zeros(rows, 500, dtype=torch.int64), mask, vocab=vocab, seed=torch.arange(rows)[:, None], backend=backend
    )
    assert tokens.min() >= 0
    assert tokens.max() < vocab
    bins = min(vocab, 64)
    counts = torch.bincount(tokens.flatten() * bins // vocab, minlength=bins).double().numpy()
    assert abs(z_score(counts, counts * 0 + counts.sum() / bins)) < 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_acceptance_is_that_of_transformers(backend):
    generation = pytest.importorskip("transformers.models.diffusion_gemma.generation_diffusion_gemma")
    logits = torch.randn(4, 64, 50) * torch.linspace(1, 12, 64)[:, None]
    tokens, candidates = torch.zeros(4, 64, dtype=torch.int64), torch.ones(4, 64, dtype=torch.int64)
    theirs = SimpleNamespace(entropy_bound=0.1)
    expected = generation.EntropyBoundSampler.accept_canvas(theirs, tokens, candidates, logits, 0)
    assert 4 < expected.sum() < 4 * 64
    arguments = {"tokens": tokens, "candidates": candidates, "score": ops.sample_tokens(logits).entropy}
    arguments |= {"masked": torch.ones(4, 64, dtype=torch.bool), "rule": "entropy_bound", "bound": 0.1}
    got = ops.commit_step(**on(backend, **arguments))
    assert torch.equal(got.tokens.cpu(), expected)
    assert torch.equal(got.commit_mask.cpu(), theirs.accepted_token_mask)


def test_plain_writes():
    tokens = torch.arange(6).view(2, 3)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    assert ops.commit_tokens(tokens, tokens + 10, mask).tolist() == [[10, 1, 12], [3, 4, 15]]
    assert ops.remask(tokens, mask, mask_token_id=99).tolist() == [[99, 1, 99], [3, 4, 99]]
    ids = torch.tensor([[70], [80]])
    assert ops.remask(tokens, mask, mask_token_id=ids).tolist() == [[70, 1, 70], [3, 4, 80]]
    assert tokens.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_compiles_without_a_graph_break():
    def step(tokens, score, masked, bound):
        after, commit_mask = ops.commit_step(
            tokens, tokens + 1, score, masked, rule="entropy_bound", bound=bound, renoise_vocab=50, seed=4
        )
        return after * 2, ops.renoise(tokens, ~commit_mask, vocab=9, seed=2)

    arguments = torch.arange(20).view(2, 10), torch.rand(2, 10), torch.rand(2, 10) < 0.7, torch.tensor([0.5, 1.0])
    compiled = torch.compile(step, fullgraph=True, backend="eager")(*arguments)
    for got, expected in zip(compiled, step(*arguments), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_is_an_operator_that_torch_accepts(backend):
    canvas = Problem(
        masked=torch.rand(2, 10) < 0.7,
        score=torch.rand(2, 10),
        rule=3,
        bound=torch.tensor([0.5, 1.0]),
        tokens=torch.arange(20).view(2, 10),
        candidates=torch.arange(20).view(2, 10),
        vocab=50,
        seed=4,
    )
    torch.library.opcheck(torch.ops.diffusion_runtime.commit_step.default, (*canvas.to_operator(), backend))


CANVAS = {
    "tokens": torch.zeros(2, 3, dtype=torch.int64),
    "candidates": torch.zeros(2, 3, dtype=torch.int64),
    "score": torch.zeros(2, 3),
    "masked": torch.ones(2, 3, dtype=torch.bool),
    "rule": "quota",
    "bound": 1,
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rule": "best"}, ValueError, "unknown rule 'best'; expected one of quota, threshold"),
        ({"bound": 0.5}, TypeError, "bound must be an int or an int64 tensor, got float"),
        ({"bound": -1}, ValueError, r"bound must be in \[0, 2\^31\), got -1"),
        ({"rule": "threshold", "bound": math.nan}, ValueError, "bound must be finite, got nan"),
        ({"rule": "factor", "bound": torch.ones(3)}, ValueError, r"bound must broadcast to \(2,\), got \(3,\)"),
        ({"score": torch.zeros(2, 3, dtype=torch.float16)}, TypeError, "score must be a float32 tensor"),
        ({"score": torch.zeros(3, 2)}, ValueError, r"score must have the shape of masked, \(2, 3\), got \(3, 2\)"),
        ({"masked": torch.ones(2, 3)}, TypeError, "masked must be a bool tensor, got torch.float32"),
        ({"tokens": torch.zeros(2, 3)}, TypeError, "tokens must be an int64 tensor, got torch.float32"),
        ({"renoise_vocab": 5}, ValueError, "seed is needed to draw new tokens"),
        ({"seed": 3}, ValueError, "renoise_vocab is None: none are drawn"),
        ({"step": torch.ones(1, dtype=torch.int64)}, ValueError, "renoise_vocab is None: none are drawn"),
        ({"position": torch.arange(3)}, ValueError, "renoise_vocab is None: none are drawn"),
        ({"renoise_vocab": 0, "seed": 1}, ValueError, r"renoise_vocab must be in \[1, 2\^31\), got 0"),
        ({"renoise_vocab": 5, "seed": 1.0}, TypeError, "seed must be an int or an int64 tensor, got float"),
        ({"backend": "cuda"}, ops.BackendUnavailableError, "cuda takes cuda tensors, got cpu"),
    ],
)
def test_rejects(change, error, message):
    with pytest.raises(error, match=message):
        ops.commit_step(**(CANVAS | change))
