"""Draws among some of the tokens: allowed, suppress, top-k, top-p, min-p, and the statistics of what is left."""

from __future__ import annotations

import math

import pytest
import torch
from backends import ALL, assert_same_tokens, sample_tokens
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from diffusion_runtime import ops
from diffusion_runtime.ops._restriction import kept
from diffusion_runtime.testing import awkward_logits


def transformers_keeps(logits, temperature, top_k, top_p, min_p):
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    if min_p:
        processors.append(MinPLogitsWarper(min_p))
    return processors(torch.zeros(len(logits), 1, dtype=torch.int64), logits.clone()) > -math.inf


def keeps(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, allowed=None):
    def per_row(value, dtype=logits.dtype):
        return torch.as_tensor(value, dtype=dtype).expand(len(logits))

    cuts = per_row(top_k, torch.int64), per_row(top_p), per_row(min_p)
    return kept(logits, logits, per_row(temperature), allowed, *cuts)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("top_k", [0, 1, 50, 5000])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_the_definition_is_that_of_transformers(temperature, top_k, top_p, min_p):
    logits = torch.randn(20, 700, dtype=torch.float64) * torch.linspace(0.1, 6, 20)[:, None]
    expected = transformers_keeps(logits, temperature, top_k, top_p, min_p)
    assert torch.equal(keeps(logits, temperature, top_k, top_p, min_p), expected)


def test_equal_logits_stay_or_go_together():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    assert keeps(logits, top_k=2)[0].tolist() == [True, False, True, True, True, False]
    mass = logits.softmax(-1)[0]
    assert keeps(logits, top_p=float(mass[0]) + 1e-3)[0].tolist() == [True, False, True, True, True, False]
    assert keeps(logits, top_p=float(mass[0]) - 1e-3)[0].tolist() == [True] + [False] * 5
    assert keeps(logits, min_p=math.exp(-1) * 0.999)[0].tolist() == [True, False, True, True, True, False]


def test_packed_masks():
    mask = torch.rand(3, 5, 77) < 0.5
    mask[0, 0, 31], mask[0, 1] = True, True
    words = ops.pack_allowed(mask)
    assert words.shape == (3, 5, 3)
    assert words.dtype == torch.int32
    assert torch.equal(ops.unpack_allowed(words, 77), mask)
    for t in (0, 31, 32, 76):
        assert torch.equal((words[..., t // 32] >> t % 32 & 1).bool(), mask[..., t])


@pytest.mark.parametrize("backend", ALL)
class TestEdges:
    def test_a_row_that_allows_nothing(self, backend):
        allowed = ops.pack_allowed(torch.ones(2, 3, 300, dtype=torch.bool))
        allowed[1, 2] = 0
        for statistics in ("unrestricted", "restricted"):
            arguments = {"allowed": allowed, "statistics": statistics, "temperature": 1.0, "seed": 1}
            if backend == "cuda":
                samples = sample_tokens(torch.zeros(2, 3, 300), backend=backend, **arguments)
                assert samples.token[1, 2] == samples.argmax[1, 2] == -1
                continue
            with pytest.raises(ValueError, match=r"row \[1, 2\] has no token that may be drawn"):
                sample_tokens(torch.zeros(2, 3, 300), backend=backend, **arguments)

    def test_logits_that_are_not_allowed_count_for_nothing(self, backend):
        logits = awkward_logits(6, 300)[[0, 1, 5]]
        mask = torch.arange(300) % 3 != 1
        expected = sample_tokens(logits.masked_fill(~mask, -math.inf), temperature=1.0, seed=2, backend=backend)
        logits[:, ~mask] = math.nan
        got = sample_tokens(
            logits, allowed=ops.pack_allowed(mask), statistics="restricted", temperature=1.0, seed=2, backend=backend
        )
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)

    def test_a_cut_does_not_hide_a_nan(self, backend):
        logits = torch.randn(2, 3000)
        logits[1, 2900] = math.nan
        allowed = ops.pack_allowed(torch.arange(3000) != 5)
        arguments = {"top_k": 3, "top_p": 0.5, "min_p": 0.1, "allowed": allowed, "temperature": 1.0, "seed": 1}
        for statistics in ("unrestricted", "restricted"):
            if backend == "cuda":
                samples = sample_tokens(logits, statistics=statistics, backend=backend, **arguments)
                assert samples.token[1] == samples.argmax[1] == -1
                assert samples.token[0] >= 0
                continue
            with pytest.raises(ValueError, match=r"row \[1\] of the logits holds NaN"):
                sample_tokens(logits, statistics=statistics, backend=backend, **arguments)

    def test_greedy_takes_the_best_that_is_allowed(self, backend):
        logits = awkward_logits(6, 3000)
        best = logits.argmax(-1)
        samples = sample_tokens(logits[:1], suppress=[int(best[0])], top_k=1, top_p=0.1, backend=backend)
        assert samples.argmax[0] == best[0]
        second = logits[0].clone()
        second[best[0]] = -math.inf
        assert samples.token[0] == second.argmax()
        expected = (logits[0].double().log_softmax(-1))[samples.token[0]]
        torch.testing.assert_close(samples.logprob[0].double(), expected, rtol=1e-5, atol=1e-5)

    def test_top_k_of_one_is_greedy(self, backend):
        logits = torch.randn(40, 3000)
        for arguments in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}):
            samples = sample_tokens(logits, temperature=1.0, seed=1, backend=backend, **arguments)
            assert torch.equal(samples.token, logits.argmax(-1))

    def test_flat_and_tied_rows(self, backend):
        logits = torch.zeros(3, 2600)
        logits[1, 1300:] = 1.0
        logits[2, [7, 2599]] = 5.0
        position = torch.arange(20)[:, None]
        samples = sample_tokens(
            logits.expand(20, 3, 2600), temperature=1.0, seed=9, position=position, top_k=2, backend=backend
        )
        assert (samples.token[:, 1] >= 1300).all()
        assert set(samples.token[:, 2].tolist()) <= {7, 2599}
        assert len(set(samples.token[:, 0].tolist())) > 1  # ties with the second stay

    def test_settings_of_one_row_do_not_touch_another(self, backend):
        logits = torch.randn(6, 2200) * 2
        arguments = {
            "temperature": torch.tensor([1.0, 0.0, 1.0, 0.7, 1.0, 1.3]),
            "top_k": torch.tensor([0, 5, 20, 0, 3, 100]),
            "top_p": torch.tensor([1.0, 0.5, 0.9, 0.8, 1.0, 0.95]),
            "min_p": torch.tensor([0.0, 0.0, 0.1, 0.0, 0.0, 0.02]),
        }
        together = sample_tokens(logits, seed=5, position=torch.arange(6), backend=backend, **arguments)
        for r in range(6):
            one = {name: value[r] for name, value in arguments.items()}
            alone = sample_tokens(logits[r], seed=5, position=torch.tensor(r), backend=backend, **one)
            assert alone.token == together.token[r]

    @pytest.mark.parametrize("statistics", ["unrestricted", "restricted"])
    def test_a_cut_at_the_vocabulary_changes_nothing(self, backend, statistics):
        logits = torch.randn(8, 1500)
        plain = sample_tokens(logits, temperature=0.9, seed=3, backend=backend)
        none = {"top_k": 1500, "top_p": 1.0, "min_p": 0.0}
        cut = sample_tokens(logits, temperature=0.9, seed=3, statistics=statistics, backend=backend, **none)
        assert_same_tokens(cut.token, plain.token, logits, 0.9, 3)
        torch.testing.assert_close(cut.entropy, plain.entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "draws"),
    [
        ("cpp", 50_000),
        ("reference", 5_000),
        ("triton", 400),
        pytest.param("cuda", 200_000, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("cut", [{"top_k": 40}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 60, "top_p": 0.9}])
def test_draws_follow_what_is_left(backend, draws, cut):
    from test_draws import z_score

    vocab = 900
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(5)) * 2
    mask = torch.arange(vocab) % 7 != 3
    samples = sample_tokens(
        logits.expand(draws, vocab),
        temperature=0.8,
        seed=17,
        allowed=ops.pack_allowed(mask),
        backend=backend,
        **cut,
    )
    counts = torch.bincount(samples.token, minlength=vocab).numpy()
    keep = keeps(logits[None].double(), 0.8, allowed=ops.pack_allowed(mask)[None], **cut)[0]
    probability = (logits.double() / 0.8).masked_fill(~keep, -math.inf).softmax(-1).numpy()
    assert counts[probability == 0].sum() == 0
    assert abs(z_score(counts[probability > 0], probability[probability > 0] * draws)) < 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"top_k": -1}, ValueError, r"top_k must be in \[0, 2\^31\), got -1"),
        ({"top_k": 1.5}, TypeError, "top_k must be an int or an int64 tensor, got float"),
        ({"top_k": torch.ones(3)}, TypeError, "top_k must be int64, got torch.float32"),
        ({"top_p": 1.5}, ValueError, r"top_p must be in \[0, 1\], got 1.5"),
        ({"top_p": torch.tensor([0.5, math.nan, 0.5])}, ValueError, r"top_p must be in \[0, 1\], got nan"),
        ({"min_p": -0.1}, ValueError, r"min_p must be in \[0, 1\], got -0.1"),
        ({"min_p": torch.zeros(2)}, ValueError, r"min_p must broadcast to \(3,\), got \(2,\)"),
        ({"allowed": torch.ones(3, 2)}, TypeError, "allowed must be an int32 tensor, got torch.float32"),
        ({"allowed": torch.ones(3, 1, dtype=torch.int32)}, ValueError, r"\[..., 2\] for 40 tokens, got \(3, 1\)"),
        ({"allowed": torch.ones(4, 2, dtype=torch.int32)}, ValueError, r"broadcast to \(3, 2\), got \(4, 2\)"),
        ({"suppress": [40]}, ValueError, r"token ids in \[0, 40\), got 40"),
        ({"suppress": [1.0]}, TypeError, "suppress must hold ints, got float"),
        ({"suppress": range(40)}, ValueError, "row .0. has no token that may be drawn"),
        ({"statistics": "kept"}, ValueError, "statistics must be 'unrestricted' or 'restricted', got 'kept'"),
    ],
)
def test_rejects(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.sample_tokens(torch.zeros(3, 40), temperature=1.0, seed=1, **arguments)
