"""sample_from_hidden: every backend against the float64 reference, then what the fusion must not change."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from backends import ALL, KERNELS, assert_same_tokens, sample_from_hidden
from test_draws import z_score

from diffusion_runtime import ops
from diffusion_runtime.ops import _head_cpp, _sample_from_hidden
from diffusion_runtime.ops._settings import Settings, to_operator
from diffusion_runtime.testing import assert_as_accurate

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STATISTICS = ["logprob", "confidence", "margin", "entropy", "logsumexp"]
# around the tile of a draw (128), a chunk of the C++ kernel (2048) and, shrunk, two of its tiles
VOCABULARIES = [1, 2, 127, 129, 2047, 2049, 4096, 4097, 8200]


@pytest.fixture(autouse=True)
def _small_tiles():
    """A tile of one chunk, so that a few thousand tokens have several."""
    with patch.object(_head_cpp, "TILE_BYTES", {2: 1, 4: 1}):
        yield


def head(rows, vocab, dim, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, dim, generator=g)
    weight = torch.randn(vocab, dim, generator=g) * 3 / math.sqrt(dim)
    return hidden.to(dtype), weight.to(dtype), torch.randn(vocab, generator=g).to(dtype)


def assert_agrees(got, hidden, weight, **settings):
    """Statistics as accurate as the reference in that dtype; argmax the best, within the rounding of a logit."""
    same = ops.sample_from_hidden(hidden, weight, backend="reference", **settings)
    wide = {k: v.double() if k == "bias" and v is not None else v for k, v in settings.items()}
    truth = ops.sample_from_hidden(hidden.double(), weight.double(), backend="reference", **wide)
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), wide.get("bias"))
    at = logits.gather(-1, got.argmax[..., None])[..., 0]
    best = logits.gather(-1, truth.argmax[..., None])[..., 0]
    slack = torch.finfo(hidden.dtype).eps * (1 if hidden.dtype != torch.float32 else 20) * (1 + best.abs())
    assert (at >= best - slack).all()
    agree = (got.token == truth.token) & (same.token == truth.token)
    assert agree.double().mean() > (0.8 if hidden.dtype == torch.float32 else 0.5)  # rounding moves some draws
    for name in STATISTICS:
        actual, reference, expected = (getattr(x, name)[agree] for x in (got, same, truth))
        assert_as_accurate(actual, reference, expected)
        assert getattr(got, name).dtype == torch.float32
    return truth


@pytest.mark.parametrize(
    ("temperature", "statistics_temperature", "softcap", "with_bias"),
    [(0.0, 1.0, None, False), (1.0, 1.0, None, True), (0.7, 1.0, 4.0, False), (1.3, 0.8, None, True)],
)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_agrees_with_float64(backend, dtype, vocab, temperature, statistics_temperature, softcap, with_bias):
    if backend == "triton" and vocab > 2049 and not (temperature == 1.3 and dtype == torch.bfloat16):
        pytest.skip("interpreted: some of the large vocabularies are enough")
    hidden, weight, bias = head(9, vocab, 37, dtype)
    settings = {
        "bias": bias if with_bias else None,
        "temperature": temperature,
        "statistics_temperature": statistics_temperature,
        "softcap": softcap,
        "seed": 7,
    }
    got = sample_from_hidden(hidden, weight, backend=backend, **settings)
    truth = assert_agrees(got, hidden, weight, **settings)
    if temperature == 0:
        assert torch.equal(got.token, got.argmax)
    elif dtype == torch.float32:
        y = torch.nn.functional.linear(hidden.double(), weight.double(), bias.double() if with_bias else None)
        y = softcap * (y / softcap).tanh() if softcap else y
        assert_same_tokens(got.token, truth.token, y, temperature, 7)


@pytest.mark.parametrize("dim", [1, 3, 16, 65, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_any_dim(backend, dtype, dim):
    hidden, weight, bias = head(40, 300, dim, dtype)
    settings = {"bias": bias, "temperature": 0.8, "seed": 3}
    got = sample_from_hidden(hidden, weight, backend=backend, **settings)
    truth = assert_agrees(got, hidden, weight, **settings)
    if dtype == torch.float32:
        logits = torch.nn.functional.linear(hidden.double(), weight.double(), bias.double())
        assert_same_tokens(got.token, truth.token, logits, 0.8, 3)


@pytest.mark.parametrize("backend", ALL)
class TestEdges:
    def test_ties_go_to_the_lowest_id(self, backend):
        weight = torch.zeros(5000, 8)
        weight[[4999, 2048, 2047, 700]] = torch.arange(8.0)
        hidden = torch.eye(8)[3:5]
        samples = sample_from_hidden(hidden, weight, backend=backend)
        assert samples.token.tolist() == samples.argmax.tolist() == [700, 700]
        assert samples.margin.tolist() == [0, 0]
        assert sample_from_hidden(-hidden, weight, backend=backend).argmax.tolist() == [0, 0]

    def test_rows_that_are_not_masked_do_not_matter(self, backend):
        hidden, weight, bias = head(12, 2500, 24)
        masked = torch.arange(12) % 3 == 1
        settings = {"bias": bias, "temperature": 1.0, "seed": 4, "backend": backend}
        expected = sample_from_hidden(hidden, weight, **settings)
        hidden[~masked] = math.nan
        samples = sample_from_hidden(hidden.view(12, 24), weight, masked=masked, **settings)
        assert torch.equal(samples.token[masked], expected.token[masked])
        for name in STATISTICS:
            torch.testing.assert_close(getattr(samples, name)[masked], getattr(expected, name)[masked])
            assert (getattr(samples, name)[~masked] == 0).all()
        assert (samples.token[~masked] == -1).all()
        assert (samples.argmax[~masked] == -1).all()
        none = sample_from_hidden(hidden, weight, masked=torch.zeros(12, dtype=torch.bool), **settings)
        assert (none.token == -1).all()

    @pytest.mark.parametrize("statistics", ["unrestricted", "restricted"])
    @pytest.mark.parametrize("shared", [True, False])
    def test_allowed(self, backend, statistics, shared):
        hidden, weight, _ = head(6, 4500, 16)
        g = torch.Generator().manual_seed(1)
        mask = torch.rand(1 if shared else 6, 4500, generator=g) < 0.02
        mask[:, 4400] = True
        suppress = [int(x) for x in mask[0].nonzero()[:3, 0]]
        arguments = {"allowed": ops.pack_allowed(mask), "suppress": suppress, "statistics": statistics}
        mask[:, suppress] = False
        for temperature in (0.0, 1.2):
            settings = {"temperature": temperature, "seed": 5, **arguments}
            got = sample_from_hidden(hidden, weight, backend=backend, **settings)
            truth = assert_agrees(got, hidden, weight, **settings) if statistics == "unrestricted" else None
            assert mask.expand(6, -1).gather(1, got.token[:, None]).all()
            if truth is None:
                logits = (hidden @ weight.T).masked_fill(~mask, -math.inf).double()
                expected = ops.sample_tokens(logits, temperature=temperature, seed=5)
                assert torch.equal(got.argmax, expected.argmax)
                assert torch.equal(got.token, expected.token)
                for name in STATISTICS:
                    torch.testing.assert_close(
                        getattr(got, name).double(), getattr(expected, name), atol=2e-5, rtol=2e-5
                    )

    @pytest.mark.parametrize("cut", [{"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.1}, {"top_k": 50, "top_p": 0.9}])
    def test_cuts_go_through_groups_of_rows(self, backend, cut):
        hidden, weight, bias = head(7, 700, 16)
        arguments = {"bias": bias, "temperature": 1.0, "seed": 9, "position": torch.arange(7) + 3, **cut}
        expected = sample_from_hidden(hidden, weight, backend=backend, **arguments)
        logits = torch.nn.functional.linear(hidden, weight, bias)
        del arguments["bias"]
        by_logits = ops.sample_tokens(logits, backend="reference", **arguments)
        assert torch.equal(expected.token, by_logits.token)
        with patch.object(_sample_from_hidden, "MOST_LOGITS", 1500):  # two rows at a time
            got = sample_from_hidden(hidden, weight, bias=bias, backend=backend, **arguments)
        assert torch.equal(got.token, expected.token)
        for name in STATISTICS:
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-5, atol=1e-5)

    def test_settings_per_row(self, backend):
        hidden, weight, _ = head(8, 300, 20)
        settings = {
            "temperature": torch.tensor([[0.0, 0.5, 1.0, 2.0], [0.0, 0.0, 0.3, 1.0]]),
            "statistics_temperature": torch.tensor([[1.0, 0.5, 1.5, 2.0], [1.0, 2.0, 0.3, 1.0]]),
            "seed": torch.tensor([[3], [-(2**62)]]).expand(2, 4),
            "position": torch.tensor([[5, 6, 7, 2**31 + 9], [5, 6, 7, 8]]),
            "step": torch.tensor([[1, 2, 3, 4]]).expand(2, 4),
        }
        together = sample_from_hidden(hidden.view(2, 4, 20), weight, backend=backend, **settings)
        for b in range(2):
            for i in range(4):
                one = {k: v[b, i] for k, v in settings.items()}
                alone = sample_from_hidden(hidden[4 * b + i], weight, backend=backend, **one)
                for x, y in zip(together, alone, strict=True):
                    torch.testing.assert_close(x[b, i], y, rtol=1e-5, atol=1e-5)

    def test_any_strides(self, backend):
        hidden, weight, _ = head(6 * 7, 300, 20)
        wide = hidden.view(6, 7, 20)
        canvas = wide[:, 2:5]
        expected = sample_from_hidden(canvas.clone(), weight, temperature=1.0, seed=1, backend=backend)
        position = torch.arange(3)
        tied = torch.cat([weight, weight], 1)
        for h, w in (
            (canvas, weight),
            (canvas.transpose(1, 2).clone().transpose(1, 2), weight),
            (canvas, weight.T.clone().T),  # [dim, vocab] transposed
            (canvas, tied[:, :20]),
            (canvas, torch.stack([weight, weight], 2)[..., 0]),
        ):
            for arguments in ({}, {"position": position}):
                got = sample_from_hidden(h, w, temperature=1.0, seed=1, backend=backend, **arguments)
                assert torch.equal(got.token, expected.token)
                torch.testing.assert_close(got.entropy, expected.entropy, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)])
    def test_leading_shapes(self, backend, leading):
        _, weight, _ = head(1, 140, 12)
        hidden = torch.randn(*leading, 12)
        samples = sample_from_hidden(hidden, weight, temperature=1.0, seed=2, backend=backend)
        assert all(x.shape == leading for x in samples)
        assert torch.equal(samples.argmax, (hidden @ weight.T).argmax(-1))

    @pytest.mark.parametrize(
        ("value", "what"), [(math.nan, "holds NaN"), (math.inf, "holds inf"), (-math.inf, "is all -inf")]
    )
    def test_a_row_without_a_distribution(self, backend, value, what):
        hidden, weight, bias = torch.zeros(2, 3, 4), torch.ones(2500, 4), torch.zeros(2500)
        hidden[1, 2] = value
        arguments = {"temperature": 1.0, "seed": 1, "backend": backend}
        if backend == "cuda":
            samples = sample_from_hidden(hidden, weight, bias=bias, **arguments)
            assert samples.token[1, 2] == samples.argmax[1, 2] == -1
            assert samples.entropy[1, 2].isnan()
            return
        with pytest.raises(ValueError, match=rf"row \[1, 2\] of the logits {what}"):
            sample_from_hidden(hidden, weight, bias=bias, **arguments)

    def test_tokens_whose_bias_is_minus_infinity_are_never_drawn(self, backend):
        bias = torch.full((4500,), -math.inf)
        bias[2300:2303] = torch.tensor([1.0, 1.0, 3.0])
        hidden, weight = torch.zeros(64, 4), torch.ones(4500, 4)
        for softcap in (None, 5.0):
            samples = sample_from_hidden(
                hidden, weight, bias=bias, temperature=2.0, seed=3, softcap=softcap, backend=backend
            )
            assert set(samples.token.tolist()) == {2300, 2301, 2302}

    def test_a_row_does_not_depend_on_its_batch(self, backend):
        hidden, weight, _ = head(11, 4300, 250)
        position = torch.arange(11)
        settings = {"temperature": 0.8, "seed": 5, "backend": backend}
        together = sample_from_hidden(hidden, weight, position=position, **settings)
        for rows in (torch.tensor([3]), torch.tensor([10, 0]), torch.randperm(11)):
            some = sample_from_hidden(hidden[rows], weight, position=position[rows], **settings)
            assert torch.equal(some.token, together.token[rows])
            assert torch.equal(some.argmax, together.argmax[rows])
            for name in STATISTICS:
                torch.testing.assert_close(getattr(some, name), getattr(together, name)[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [b for b in ALL if b != "triton"])
def test_draws_follow_the_softmax(backend):
    draws, vocab = 40_000, 700
    hidden, weight, bias = head(1, vocab, 8)
    samples = sample_from_hidden(hidden.expand(draws, 8), weight, bias=bias, temperature=0.9, seed=9, backend=backend)
    counts = torch.bincount(samples.token, minlength=vocab).numpy()
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), bias.double())[0]
    probability = (logits / 0.9).softmax(-1).numpy()
    assert abs(z_score(counts, probability * draws)) < 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "hidden must be a floating-point tensor, got"),
        ({"weight": torch.zeros(5, 4).double()}, ValueError, "weight must be torch.float32 on cpu as hidden is"),
        ({"weight": torch.zeros(5, 3)}, ValueError, r"weight \[vocab, dim\], got \(3, 4\) and \(5, 3\)"),
        ({"weight": torch.zeros(4)}, ValueError, r"got \(3, 4\) and \(4,\)"),
        ({"weight": torch.zeros(0, 4)}, ValueError, "between 1 and 2"),
        ({"hidden": torch.zeros(()), "weight": torch.zeros(5, 1)}, ValueError, r"hidden must be \[..., dim\]"),
        ({"hidden": torch.zeros(3, 0), "weight": torch.zeros(5, 0)}, ValueError, r"got \(3, 0\)"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must be \[5\], got \(4,\)"),
        ({"bias": 1.0}, TypeError, "bias must be a floating-point tensor"),
        ({"temperature": 1.0}, ValueError, "seed is needed to draw at temperature 1.0"),
        ({"masked": torch.ones(3)}, TypeError, "masked must be a bool tensor"),
        ({"allowed": torch.zeros(3, 2, dtype=torch.int32)}, ValueError, r"\[..., 1\] for 5 tokens"),
        ({"suppress": range(5)}, ValueError, "row .0. has no token that may be drawn"),
        ({"backend": "cude"}, ValueError, "unknown backend 'cude'"),
        ({"backend": "cuda"}, ops.BackendUnavailableError, "cuda"),
    ],
)
def test_rejects(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.sample_from_hidden(**({"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4)} | arguments))


def test_compiles_without_a_graph_break():
    def step(hidden, weight, masked, temperature):
        samples = ops.sample_from_hidden(hidden, weight, temperature=temperature, seed=3, masked=masked, top_k=9)
        return samples.token + 1, samples.entropy

    arguments = torch.randn(2, 5, 16), torch.randn(300, 16), torch.rand(2, 5) > 0.3, torch.rand(2, 5)
    compiled = torch.compile(step, fullgraph=True, backend="eager")(*arguments)
    for got, expected in zip(compiled, step(*arguments), strict=True):
        assert torch.equal(got, expected)


def test_operator_registration():
    settings = Settings(temperature=1.0, seed=torch.arange(6), position=torch.arange(6), step=2)
    arguments = (torch.randn(6, 8), torch.randn(50, 8), torch.randn(50), *to_operator(settings), "cpp")
    torch.library.opcheck(torch.ops.diffusion_runtime.sample_from_hidden.default, arguments)
