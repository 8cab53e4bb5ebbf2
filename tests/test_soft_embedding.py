"""soft_embedding and soft_embedding_from_hidden: every backend against float64, and what the tiles must not change."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from backends import ALL, KERNELS, instruction_set, run_op
from test_sample_from_hidden import DTYPES, head

from diffusion_runtime import ops
from diffusion_runtime.ops import _head_cpp, _soft_embedding
from diffusion_runtime.ops._soft_embedding import Softmax, to_operator
from diffusion_runtime.testing import assert_as_accurate

BOTH = ["soft_embedding", "soft_embedding_from_hidden"]


@pytest.fixture(autouse=True)
def _small_tiles():
    with (
        patch.object(_head_cpp, "TILE_BYTES", {2: 1, 4: 1}),
        patch.object(_soft_embedding, "MOST_PROBABILITIES", {"cpu": 1, "cuda": 1}),
        patch.object(_soft_embedding, "MIN_TILE", 256),
    ):
        yield


def wide(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def assert_agrees(op, *tensors, backend, **settings):
    got = run_op(op, *tensors, backend=backend, **settings)
    run = getattr(ops, op)
    same = run(*tensors, backend="reference", **settings)
    in_double = {k: wide(v) for k, v in settings.items()}
    truth = run(*map(wide, tensors), backend="reference", **in_double)
    embedding = tensors[-1]
    assert got.dtype == embedding.dtype
    # partial sums are rounded to the dtype of the embedding, as torch's product rounds its result
    floor = 2 * torch.finfo(embedding.dtype).eps if embedding.dtype.itemsize == 2 else 2e-6
    assert_as_accurate(got, same, truth, floor=floor)
    return got


@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.6, 5.0), (1.7, None)])
@pytest.mark.parametrize("vocab", [1, 2, 127, 255, 256, 257, 700])
@pytest.mark.parametrize(
    ("dtype", "embedding_dtype"),
    [*((a, b) for a in DTYPES for b in DTYPES), (torch.float32, torch.float64)],
    ids=str,
)
@pytest.mark.parametrize("backend", KERNELS)
def test_agrees_with_float64(backend, dtype, embedding_dtype, vocab, temperature, softcap):
    logits = (torch.randn(5, vocab) * 3).to(dtype)
    embedding = torch.randn(vocab, 19).to(embedding_dtype)
    assert_agrees("soft_embedding", logits, embedding, backend=backend, temperature=temperature, softcap=softcap)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("vocab", "dim"), [(1, 1), (130, 7), (600, 33), (2300, 16)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_from_hidden_agrees_with_float64(backend, dtype, vocab, dim, temperature):
    hidden, weight, bias = head(6, vocab, dim, dtype)
    embedding = torch.randn(vocab, 12).to(dtype)
    settings = {"bias": bias, "temperature": temperature, "softcap": 9.0, "backend": backend}
    got = assert_agrees("soft_embedding_from_hidden", hidden, weight, embedding, **settings)
    del settings["bias"], settings["backend"]
    logits = torch.nn.functional.linear(hidden, weight, bias)
    by_logits = ops.soft_embedding(logits, embedding, backend="reference", **settings)
    torch.testing.assert_close(got, by_logits, rtol=0.03, atol={torch.float32: 2e-5}.get(dtype, 0.03))


@pytest.mark.parametrize("backend", ALL)
class TestEdges:
    def test_is_softmax_times_embedding(self, backend):
        logits, embedding = torch.randn(2, 3, 500), torch.randn(500, 8)
        got = run_op("soft_embedding", logits, embedding, temperature=0.5, backend=backend)
        torch.testing.assert_close(got, (logits / 0.5).softmax(-1) @ embedding, rtol=1e-5, atol=1e-5)

    def test_extreme_logits(self, backend):
        logits = torch.tensor([[1e4, 1e4, 0.0], [-math.inf, -math.inf, -50.0], [3e38, -3e38, 0.0]])
        got = run_op("soft_embedding", logits, torch.eye(3), backend=backend)
        expected = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        assert (got[expected == 0] == 0).all()

    def test_logsumexp_of_the_sampler(self, backend):
        hidden, weight, _ = head(6, 600, 16)
        embedding, temperature = torch.randn(600, 5), torch.linspace(0.5, 2, 6)
        logits = hidden @ weight.T
        lse = ops.sample_tokens(logits, statistics_temperature=temperature).logsumexp
        settings = {"temperature": temperature, "backend": backend}
        for op, tensors in (
            ("soft_embedding", (logits, embedding)),
            ("soft_embedding_from_hidden", (hidden, weight, embedding)),
        ):
            got = run_op(op, *tensors, logsumexp=lse, **settings)
            torch.testing.assert_close(got, run_op(op, *tensors, **settings), rtol=1e-5, atol=1e-5)
            # it is taken as it is
            doubled = run_op(op, *tensors, logsumexp=lse - math.log(2), **settings)
            torch.testing.assert_close(doubled, 2 * got, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("known", [True, False])
    def test_rows_that_are_not_masked_are_not_read(self, backend, known):
        logits, embedding = torch.randn(3, 4, 700), torch.randn(700, 6)
        masked = torch.arange(12).view(3, 4) % 3 == 1
        expected = run_op("soft_embedding", logits, embedding, backend=backend)
        lse = logits.logsumexp(-1) if known else None
        logits[~masked] = math.nan
        got = run_op("soft_embedding", logits, embedding, masked=masked, logsumexp=lse, backend=backend)
        torch.testing.assert_close(got[masked], expected[masked], rtol=1e-5, atol=1e-5)
        assert (got[~masked] == 0).all()

    @pytest.mark.parametrize("known", [True, False])
    def test_rows_of_hidden_that_are_not_masked_do_not_matter(self, backend, known):
        hidden, weight, bias = head(12, 600, 10)
        masked = torch.arange(12) % 3 == 1
        settings = {"bias": bias, "backend": backend}
        expected = run_op("soft_embedding_from_hidden", hidden, weight, weight, **settings)
        lse = torch.nn.functional.linear(hidden, weight, bias).logsumexp(-1) if known else None
        hidden[~masked] = math.nan
        got = run_op("soft_embedding_from_hidden", hidden, weight, masked=masked, logsumexp=lse, **settings)  # tied
        torch.testing.assert_close(got[masked], expected[masked], rtol=1e-5, atol=1e-5)
        assert (got[~masked] == 0).all()

    def test_any_strides(self, backend):
        logits, embedding = torch.randn(4, 6, 600), torch.randn(600, 8)
        expected = run_op("soft_embedding", logits[:, 1:4].clone(), embedding, backend=backend)
        for x, e in (
            (logits[:, 1:4], embedding),
            (logits[:, 1:4], embedding.T.clone().T),
            (logits[:, 1:4].transpose(0, 1).clone().transpose(0, 1), embedding),
            (logits[:, 1:4], torch.cat([embedding, embedding], 1)[:, 8:]),
        ):
            got = run_op("soft_embedding", x, e, backend=backend)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("leading", [(), (3,), (2, 1, 3), (0,), (2, 0)])
    @pytest.mark.parametrize("op", BOTH)
    def test_leading_shapes(self, backend, op, leading):
        embedding = torch.randn(140, 12)
        tensors = (torch.randn(*leading, 140),) if op == BOTH[0] else (torch.randn(*leading, 12), embedding)
        assert run_op(op, *tensors, embedding, backend=backend).shape == (*leading, 12)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("op", BOTH)
    def test_a_row_without_a_distribution(self, backend, op, value):
        embedding = torch.ones(300, 4)
        rows = torch.zeros(3, 300 if op == BOTH[0] else 4)
        rows[1] = value
        tensors = (rows, embedding) if op == BOTH[0] else (rows, embedding, embedding)
        if backend == "cuda":
            got = run_op(op, *tensors, backend=backend)
            assert got[1].isnan().all()
            assert not got[[0, 2]].isnan().any()
            return
        with pytest.raises(ValueError, match=r"row 1 .*has no distribution"):
            run_op(op, *tensors, backend=backend)

    def test_large_values_of_a_dtype(self, backend):
        # sums in the dtype of the embedding would lose the small terms of later tiles
        logits = torch.zeros(2, 4096)
        embedding = torch.full((4096, 3), 1.0, dtype=torch.bfloat16)
        got = run_op("soft_embedding", logits, embedding, backend=backend)
        assert (got == 1).all()


@pytest.mark.parametrize("backend", ["cpp-avx512", "cpp-avx2", "cpp-portable"])
class TestWeigh:
    """The C++ kernel itself."""

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_rounds_to_the_nearest_even(self, backend, dtype):
        # every rounding case of a 16-bit float comes up, subnormal ones and ties included
        count = 1_000_001
        logits = -torch.rand(1, 1, count) * 17.5
        exact, rounded = torch.empty(1, count), torch.empty(1, count, dtype=dtype)
        with instruction_set(backend.removeprefix("cpp-")):
            for out in (exact, rounded):
                softmax = Softmax(1.0, 0.0, None, torch.zeros(1))
                _head_cpp.weigh_cpp(logits, softmax, out, backend.removeprefix("cpp-"))
        assert (exact.view(torch.int32) & 0x1FFFF == 0x8000).sum() > 2  # ties of bfloat16 that go down
        assert torch.equal(rounded, exact.to(dtype))
        torch.testing.assert_close(exact, logits[0].exp(), rtol=2e-6, atol=0)

    def test_large_and_invalid(self, backend):
        logits = torch.tensor([[[200.0, -200.0, math.nan, -math.inf, math.inf, 0.0, 10.0]]])
        for dtype in DTYPES:
            out = torch.empty(1, 7, dtype=dtype)
            softmax = Softmax(1.0, 0.0, None, torch.zeros(1))
            with instruction_set(backend.removeprefix("cpp-")):
                _head_cpp.weigh_cpp(logits, softmax, out, backend.removeprefix("cpp-"))
            assert out[0, 2].isnan()
            keep = [0, 1, 3, 4, 5, 6]
            torch.testing.assert_close(out[0, keep], logits[0, 0, keep].exp().to(dtype))

    def test_strided_rows_of_out(self, backend):
        logits = torch.randn(2, 5, 50).transpose(0, 1)[1:, :, 3:43]
        whole = torch.full((8, 60), 7.0, dtype=torch.bfloat16)
        masked = torch.arange(8) != 3
        lse = logits.logsumexp(-1).flatten()
        with instruction_set(backend.removeprefix("cpp-")):
            softmax = Softmax(torch.ones(8), 0.0, masked, lse)
            _head_cpp.weigh_cpp(logits, softmax, whole[:, 5:45], backend.removeprefix("cpp-"))
        expected = logits.reshape(8, 40).softmax(-1).masked_fill(~masked[:, None], 0).bfloat16()
        torch.testing.assert_close(whole[:, 5:45], expected)
        assert (whole[:, :5] == 7).all()
        assert (whole[:, 45:] == 7).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": torch.zeros(3, 5, dtype=torch.int64)}, TypeError, "logits must be a floating-point tensor"),
        ({"embedding": torch.zeros(5, 2, dtype=torch.int32)}, TypeError, "embedding must be a floating-point tensor"),
        ({"embedding": torch.zeros(4, 2)}, ValueError, r"embedding \[vocab, dim\], got \(3, 5\) and \(4, 2\)"),
        ({"logits": torch.zeros(3, 0), "embedding": torch.zeros(0, 2)}, ValueError, r"got \(3, 0\)"),
        ({"temperature": 0.0}, ValueError, "temperature must be finite and above 0, got 0.0"),
        ({"temperature": torch.ones(2)}, ValueError, r"temperature must broadcast to \(3,\), got \(2,\)"),
        ({"softcap": -1.0}, ValueError, "softcap must be None or finite and above 0"),
        ({"masked": torch.ones(3)}, TypeError, "masked must be a bool tensor"),
        ({"logsumexp": 1.0}, TypeError, "logsumexp must be float32, got float"),
        ({"logsumexp": torch.zeros(2)}, ValueError, r"logsumexp must be \(3,\) on cpu, got \(2,\) on cpu"),
        ({"backend": "cuda"}, ops.BackendUnavailableError, "cuda"),
    ],
)
def test_rejects(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.soft_embedding(**({"logits": torch.zeros(3, 5), "embedding": torch.zeros(5, 2)} | arguments))


def test_from_hidden_rejects_another_vocabulary():
    with pytest.raises(ValueError, match=r"embedding must be \[5, dim\] on cpu, got \(4, 2\) on cpu"):
        ops.soft_embedding_from_hidden(torch.zeros(3, 2), torch.zeros(5, 2), torch.zeros(4, 2))


def test_compiles_without_a_graph_break():
    def step(logits, hidden, embedding, masked):
        a = ops.soft_embedding(logits, embedding, temperature=0.8, masked=masked)
        return a + 1, ops.soft_embedding_from_hidden(hidden, embedding, softcap=3.0)

    arguments = torch.randn(2, 5, 300), torch.randn(2, 5, 8), torch.randn(300, 8), torch.rand(2, 5) > 0.3
    compiled = torch.compile(step, fullgraph=True, backend="eager")(*arguments)
    for got, expected in zip(compiled, step(*arguments), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("temperature", [0.7, torch.rand(6) + 0.5], ids=["number", "tensor"])
def test_operator_registration(temperature):
    softmax = Softmax(temperature, 5.0, torch.arange(6) != 2, None)
    arguments = (torch.randn(2, 3, 50), torch.randn(50, 4), *to_operator(softmax), "cpp")
    torch.library.opcheck(torch.ops.diffusion_runtime.soft_embedding.default, arguments)
    hidden = (torch.randn(6, 8), torch.randn(50, 8), None, torch.randn(50, 4), *to_operator(softmax), "cpp")
    torch.library.opcheck(torch.ops.diffusion_runtime.soft_embedding_from_hidden.default, hidden)
