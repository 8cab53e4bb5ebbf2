"""sample_tokens: every backend against the float64 reference, then the contracts that no backend may bend."""

from __future__ import annotations

import math

import pytest
import torch
from backends import ALL, KERNELS, assert_same_tokens, device_of, sample_tokens

from diffusion_runtime import ops
from diffusion_runtime.ops._rows import as_rows
from diffusion_runtime.ops._settings import Settings, to_operator
from diffusion_runtime.testing import assert_as_accurate, awkward_logits

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STATISTICS = ["logprob", "confidence", "margin", "entropy", "logsumexp"]
# around the vector (8, 16), the tile (128), the CPU's chunk (2048) and the GPUs' (8192)
VOCABULARIES = [1, 2, 5, 17, 127, 128, 129, 2049, 8191, 8193, 20011]


@pytest.mark.parametrize(
    ("temperature", "statistics_temperature", "softcap"),
    [(0.0, 1.0, None), (1.0, 1.0, None), (0.7, 1.0, None), (0.0, 0.6, 30.0), (1.3, 0.8, 30.0)],
)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_agrees_with_float64(backend, dtype, vocab, temperature, statistics_temperature, softcap):
    if backend == "triton" and vocab > 8191 and (dtype != torch.bfloat16 or statistics_temperature != 1):
        pytest.skip("interpreted: one dtype of the large vocabularies is enough")
    logits = awkward_logits(12, vocab).to(dtype)
    settings = {
        "temperature": temperature,
        "statistics_temperature": statistics_temperature,
        "softcap": softcap,
        "seed": 7,
    }
    got = sample_tokens(logits, backend=backend, **settings)
    same_dtype = ops.sample_tokens(logits, backend="reference", **settings)
    truth = ops.sample_tokens(logits.double(), backend="reference", **settings)

    assert torch.equal(got.argmax, truth.argmax)
    if temperature == 0:
        assert torch.equal(got.token, truth.argmax)
    else:
        capped = logits.double() if softcap is None else softcap * (logits.double() / softcap).tanh()
        capped = torch.where(logits == -math.inf, -math.inf, capped)
        assert_same_tokens(got.token, truth.token, capped, temperature, 7)
    agree = got.token == truth.token
    for name in STATISTICS:
        actual, same, true = (getattr(x, name)[agree] for x in (got, same_dtype, truth))
        assert_as_accurate(actual, same, true)
        assert getattr(got, name).dtype == torch.float32


def test_reference_is_softmax():
    logits = awkward_logits(12, 300).double()
    p = (logits / 0.7).softmax(-1)
    got = ops.sample_tokens(logits, statistics_temperature=0.7, backend="reference")
    best, ids = p.topk(2, -1)
    torch.testing.assert_close(got.confidence, best[:, 0])
    torch.testing.assert_close(got.margin, best[:, 0] - best[:, 1], atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(got.entropy, -torch.special.xlogy(p, p).sum(-1), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(got.logsumexp, (logits / 0.7).logsumexp(-1))
    torch.testing.assert_close(got.logprob, best[:, 0].log(), atol=1e-9, rtol=1e-9)
    assert torch.equal(got.argmax, logits.argmax(-1))


@pytest.mark.parametrize("backend", ALL)
class TestEdges:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_ties_go_to_the_lowest_id(self, backend, dtype):
        logits = torch.zeros(4, 9000, dtype=dtype)
        logits[1, [8999, 8212, 700, 4116, 20]] = 1.0  # equal maxima in one lane of several chunks
        logits[2, [8995, 8996]] = 1.0
        logits[3, [2047, 2048]] = 1.0
        samples = sample_tokens(logits, backend=backend)
        assert samples.argmax.tolist() == samples.token.tolist() == [0, 20, 8995, 2047]
        assert samples.margin.tolist() == [0.0] * 4

    def test_tokens_at_minus_infinity_are_never_drawn(self, backend):
        logits = torch.full((64, 9000), -math.inf)
        logits[:, 8300:8303] = torch.tensor([1.0, 1.0, 3.0])
        for softcap in (None, 5.0):
            samples = sample_tokens(logits, temperature=2.0, seed=3, softcap=softcap, backend=backend)
            assert set(samples.token.tolist()) == {8300, 8301, 8302}
        alone = torch.where(torch.arange(300) == 131, -5.0, -math.inf)
        samples = sample_tokens(alone, temperature=1.0, seed=1, backend=backend)
        assert samples.token.item() == samples.argmax.item() == 131
        assert [samples.confidence.item(), samples.margin.item(), samples.entropy.item()] == [1.0, 1.0, 0.0]
        assert samples.logsumexp.item() == -5.0

    def test_extreme_logits_do_not_overflow(self, backend):
        largest = torch.finfo(torch.float32).max
        logits = torch.tensor([[1e4, 1e4, 0.0], [largest, -largest, 0.0], [-largest, -largest, -math.inf]])
        samples = sample_tokens(logits, backend=backend)
        torch.testing.assert_close(samples.confidence, torch.tensor([0.5, 1.0, 0.5]))
        assert samples.argmax.tolist() == [0, 0, 0]
        half = sample_tokens(torch.tensor([[65504.0, -65504.0]], dtype=torch.float16), backend=backend)
        assert half.confidence.item() == 1.0

    def test_tiny_temperatures_are_greedy(self, backend):
        for temperature in (1e-6, 1e-30, 1e-42):
            samples = sample_tokens(
                awkward_logits(6, 300)[[0, 3, 4, 5]], temperature=temperature, seed=1, backend=backend
            )
            assert torch.equal(samples.token, samples.argmax)

    def test_no_copy_and_any_slice(self, backend):
        wide = awkward_logits(6 * 7, 300).view(6, 7, 300)
        expected = sample_tokens(wide[:, 2:5].clone(), temperature=1.0, seed=1, backend=backend)
        for position in (None, torch.arange(3)):  # which is the default
            got = sample_tokens(wide[:, 2:5], temperature=1.0, seed=1, position=position, backend=backend)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert as_rows(wide[:, 2:5]).data_ptr() == wide[:, 2:5].data_ptr()
        for view in (wide[..., 1:200], wide[..., ::2], wide.transpose(0, 1), wide[1], wide[1, 2], wide[None, ::2]):
            got = sample_tokens(view, backend=backend)
            assert torch.equal(got.argmax, view.argmax(-1))
            assert got.entropy.shape == view.shape[:-1]

    @pytest.mark.parametrize("shape", [(0, 7), (3, 0, 7), (0, 0, 1)])
    def test_no_rows(self, backend, shape):
        samples = sample_tokens(torch.zeros(shape), backend=backend)
        assert all(x.shape == shape[:-1] for x in samples)

    def test_rows_that_are_not_masked_are_not_read(self, backend):
        logits = awkward_logits(12, 2500).view(3, 4, 2500)
        masked = torch.arange(12).view(3, 4) % 3 == 1
        expected = sample_tokens(logits, temperature=1.0, seed=4, backend=backend)
        logits[~masked] = math.nan
        samples = sample_tokens(logits, masked=masked, temperature=1.0, seed=4, backend=backend)
        for got, want in zip(samples, expected, strict=True):
            assert torch.equal(got[masked], want[masked])
        assert (samples.token[~masked] == -1).all()
        assert (samples.argmax[~masked] == -1).all()
        assert all((getattr(samples, name)[~masked] == 0).all() for name in STATISTICS)

    @pytest.mark.parametrize(
        ("value", "others", "what"),
        [
            (math.nan, (0.0, 0.0), "holds NaN"),
            (math.nan, (-math.inf, -math.inf), "holds NaN"),
            (math.nan, (-math.inf, 0.0), "holds NaN"),  # alone in its chunk
            (math.inf, (0.0, 0.0), "holds inf"),
            (-math.inf, (-math.inf, -math.inf), "is all -inf"),
        ],
    )
    @pytest.mark.parametrize("vocab", [5, 300, 9000])
    def test_a_row_without_a_distribution(self, backend, value, others, what, vocab):
        logits = torch.zeros(2, 3, vocab)
        logits[1, 2, :8192], logits[1, 2, 8192:] = others
        logits[1, 2, vocab // 2] = value
        if backend == "cuda":
            samples = sample_tokens(logits, temperature=1.0, seed=1, backend=backend)
            assert samples.token[1, 2] == samples.argmax[1, 2] == -1
            assert samples.confidence[1, 2].isnan()
            return
        with pytest.raises(ValueError, match=rf"row \[1, 2\] of the logits {what}"):
            sample_tokens(logits, temperature=1.0, seed=1, backend=backend)

    def test_settings_per_row(self, backend):
        logits = awkward_logits(8, 300).view(2, 4, 300)
        temperature = torch.tensor([[0.0, 0.5, 1.0, 2.0], [0.0, 0.0, 0.3, 1.0]])
        seed = torch.tensor([[3], [-(2**62)]])
        position = torch.tensor([[5, 6, 7, 2**31 + 9], [5, 6, 7, 8]])
        step = torch.tensor([[1, 2, 3, 4]])
        settings = {"temperature": temperature, "seed": seed, "position": position, "step": step}
        together = sample_tokens(logits, statistics_temperature=temperature + 0.5, backend=backend, **settings)
        for b in range(2):
            for i in range(4):
                alone = sample_tokens(
                    logits[b, i],
                    temperature=temperature[b, i].item(),
                    seed=seed[b, 0].item(),
                    position=position[b, i],
                    step=step[0, i].item(),
                    statistics_temperature=temperature[b, i].item() + 0.5,
                    backend=backend,
                )
                for x, y in zip(together, alone, strict=True):
                    torch.testing.assert_close(x[b, i], y, rtol=2e-6, atol=2e-6)

    def test_a_row_depends_on_nothing_but_itself(self, backend):
        logits = torch.randn(11, 9001)
        settings = {"temperature": 0.8, "seed": 5, "backend": backend}
        position = torch.arange(11)
        together = sample_tokens(logits, position=position, **settings)
        order = torch.randperm(11)
        shuffled = sample_tokens(logits[order], position=position[order], **settings)
        wide = torch.full((11, 9004), math.nan)[:, 3:]  # rows at other alignments
        wide[:] = logits
        moved = sample_tokens(wide, position=position, **settings)
        exact = backend != "triton" or device_of(backend).type == "cpu"  # compiled, see docs/design.md
        for x, y, z in zip(together, shuffled, moved, strict=True):
            assert torch.equal(x[order], y)
            torch.testing.assert_close(x, z, rtol=0 if exact else 2e-6, atol=0 if exact else 2e-6)
        for r in (0, 10):
            alone = sample_tokens(logits[r], position=position[r], **settings)
            assert all(torch.equal(x[r], y) for x, y in zip(together, alone, strict=True))

    def test_every_key_matters(self, backend):
        logits = torch.zeros(1, 400)
        base = {"temperature": 1.0, "seed": 1, "position": torch.tensor([2]), "step": 3, "backend": backend}
        changes = [{}, {"seed": 2}, {"seed": 1 + 2**40}, {"position": torch.tensor([3])}, {"step": 4}, {"seed": -1}]
        tokens = [sample_tokens(logits, **(base | change)).token.item() for change in changes]
        assert len(set(tokens)) >= 5
        assert tokens == [sample_tokens(logits, **(base | change)).token.item() for change in changes]
        assert sample_tokens(logits, **(base | {"seed": 2**64 - 1})).token.item() == tokens[-1]  # unsigned


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "floating-point tensor, got torch.int64"),
        ({"logits": torch.zeros(())}, ValueError, r"\[..., vocab\]"),
        ({"logits": torch.zeros(3, 0)}, ValueError, r"got \(3, 0\)"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and at least 0, got -1.0"),
        ({"temperature": math.nan, "seed": 1}, ValueError, "temperature must be finite"),
        ({"temperature": torch.tensor([1.0, math.inf, 0.0]), "seed": 1}, ValueError, "got inf"),
        ({"temperature": torch.zeros(2)}, ValueError, r"temperature must broadcast to \(3,\), got \(2,\)"),
        ({"temperature": "hot"}, TypeError, "temperature must be a float or a tensor, got str"),
        ({"temperature": 1.0}, ValueError, "seed is needed to draw at temperature 1.0"),
        ({"temperature": torch.ones(3)}, ValueError, "seed is needed"),
        ({"seed": 1.5, "temperature": 1.0}, TypeError, "seed must be an int"),
        ({"seed": 2**64, "temperature": 1.0}, ValueError, r"seed must be in \[-9223372036854775808, 2\^64\)"),
        ({"seed": torch.zeros(3)}, TypeError, "seed must be int64, got torch.float32"),
        ({"step": -1}, ValueError, r"step must be in \[0, 2\^32\), got -1"),
        ({"masked": torch.ones(3)}, TypeError, "masked must be a bool tensor, got torch.float32"),
        ({"statistics_temperature": 0.0}, ValueError, "statistics_temperature must be finite and above 0"),
        ({"softcap": 0.0}, ValueError, "softcap must be None or finite and above 0, got 0.0"),
        ({"backend": "cude"}, ValueError, "unknown backend 'cude'"),
        ({"backend": "cuda"}, ops.BackendUnavailableError, "cuda takes cuda tensors, got cpu"),
    ],
)
def test_rejects(arguments, error, message):
    logits = arguments.pop("logits", torch.zeros(3, 4))
    with pytest.raises(error, match=message):
        ops.sample_tokens(logits, **arguments)


def test_nothing_of_the_caller_is_written():  # and a greedy tensor needs no seed
    logits, masked = torch.randn(4, 50), torch.tensor([True, False, True, True])
    before = logits.clone(), masked.clone()
    ops.sample_tokens(logits, masked=masked, temperature=torch.zeros(4))
    assert all(map(torch.equal, (logits, masked), before))


def test_results_do_not_depend_on_threads():
    logits = torch.randn(16, 30001)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(ops.sample_tokens(logits, temperature=1.0, seed=1, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiles_without_a_graph_break():
    def step(logits, masked, temperature):
        samples = ops.sample_tokens(logits, temperature=temperature, seed=3, masked=masked, statistics_temperature=0.9)
        return samples.token + 1, samples.entropy

    arguments = torch.randn(2, 5, 300), torch.rand(2, 5) > 0.3, torch.rand(2, 5)
    compiled = torch.compile(step, fullgraph=True, backend="eager")(*arguments)
    for got, expected in zip(compiled, step(*arguments), strict=True):
        assert torch.equal(got, expected)


def test_operator_registration():
    logits = torch.randn(2, 3, 50)
    arguments = (logits, *to_operator(Settings(temperature=1.0, seed=torch.arange(6), step=2)), "cpp")
    torch.library.opcheck(torch.ops.diffusion_runtime.sample_tokens.default, arguments)
