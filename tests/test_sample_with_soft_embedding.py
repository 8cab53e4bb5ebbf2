"""sample_with_soft_embedding: what its two ops give, by every backend, whatever the tiles and the neighbours."""

from __future__ import annotations

import functools
import math
from unittest.mock import patch

import pytest
import torch
from backends import ALL, run_op
from test_sample_from_hidden import DTYPES, head
from test_soft_embedding import _small_tiles, wide  # noqa: F401  the fixture counts for this file too

from diffusion_runtime import ops
from diffusion_runtime.ops import _head_cpp
from diffusion_runtime.testing import assert_as_accurate

MOST = [name for name in ALL if name != "triton"]  # which runs two ops that are tested for themselves, and slowly here


run = functools.partial(run_op, "sample_with_soft_embedding")


def assert_agrees(*tensors, backend, **settings):
    """Samples as the sampler alone has them, to the bit; the embedding as close to float64 as the reference."""
    samples, expected = run(*tensors, backend=backend, **settings)
    hidden, weight, embedding = (*tensors, tensors[1])[:3]
    of_the_same = {"statistics_temperature": settings["temperature"], **settings}
    alone = run_op("sample_from_hidden", hidden, weight, backend=backend, **of_the_same)
    for name, got, want in zip(ops.TokenSamples._fields, samples, alone, strict=True):
        assert torch.equal(got, want), name
    _, same = ops.sample_with_soft_embedding(*tensors, backend="reference", **settings)
    in_double = {k: wide(v) for k, v in settings.items()}
    _, truth = ops.sample_with_soft_embedding(*map(wide, tensors), backend="reference", **in_double)
    assert expected.dtype == embedding.dtype
    assert expected.shape == (*hidden.shape[:-1], embedding.shape[1])
    floor = 2 * torch.finfo(embedding.dtype).eps if embedding.dtype.itemsize == 2 else 2e-6
    assert_as_accurate(expected, same, truth, floor=floor)
    return samples, expected


@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.6, 5.0), (1.7, 30.0)])
@pytest.mark.parametrize(("vocab", "dim"), [(1, 1), (130, 7), (600, 33), (2048, 8), (4100, 16), (6300, 12)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", MOST)
def test_agrees_with_float64(backend, dtype, vocab, dim, temperature, softcap):
    hidden, weight, bias = head(6, vocab, dim, dtype)
    embedding = torch.randn(vocab, 9).to(dtype)
    settings = {"bias": bias, "temperature": temperature, "softcap": softcap, "seed": 3}
    assert_agrees(hidden, weight, embedding, backend=backend, **settings)


@pytest.mark.parametrize("backend", ["triton", "cpp-portable"])
def test_agrees_where_it_is_interpreted(backend):
    hidden, weight, bias = head(6, 600, 8)
    masked = torch.tensor([True, False, True, True, True, False])
    settings = {"bias": bias, "temperature": torch.linspace(0.4, 2, 6), "seed": 3, "softcap": 5.0, "masked": masked}
    _, expected = assert_agrees(hidden, weight, torch.randn(600, 9), backend=backend, **settings)
    assert (expected[~masked] == 0).all()


@pytest.mark.parametrize("backend", MOST)
class TestEdges:
    def test_tied_and_of_another_dtype(self, backend):
        hidden, weight, _ = head(6, 5000, 16)
        _, tied = assert_agrees(hidden, weight, backend=backend, temperature=0.7, seed=1)
        _, named = run(hidden, weight, weight, backend=backend, temperature=0.7, seed=1)
        assert torch.equal(tied, named)
        for dtype in (torch.bfloat16, torch.float64):
            _, other = run(hidden, weight, weight.to(dtype), backend=backend, temperature=0.7, seed=1)
            torch.testing.assert_close(other.float(), tied, rtol=0.02, atol=0.02)

    def test_a_larger_logit_in_every_tile(self, backend):
        """The sum is rescaled each time, by up to all there is; rows of the reverse never are."""
        weight = torch.linspace(-60, 60, 9000)[:, None]
        hidden = torch.tensor([[1.0], [-1.0], [0.0], [30.0], [-30.0]])
        assert_agrees(hidden, weight, torch.randn(9000, 5), backend=backend, temperature=0.5, seed=1)

    def test_what_cannot_be_drawn(self, backend):
        """Whole tiles of -inf, before and behind what there is."""
        hidden, weight, _ = head(4, 7000, 8)
        for kept in (slice(0, 3), slice(6990, 7000), slice(3000, 3001)):
            bias = torch.full((7000,), -math.inf)
            bias[kept] = 0.0
            embedding = torch.randn(7000, 5)
            for softcap in (None, 4.0):
                settings = {"bias": bias, "temperature": 0.9, "seed": 1, "softcap": softcap}
                samples, expected = assert_agrees(hidden, weight, embedding, backend=backend, **settings)
                assert (samples.token >= kept.start).all()
                assert (samples.token < kept.stop).all()
                if kept.stop - kept.start == 1:
                    torch.testing.assert_close(expected, embedding[kept].expand(4, -1))

    def test_rows_that_are_not_masked(self, backend):
        hidden, weight, _ = head(12, 3000, 8)
        hidden = hidden.view(3, 4, 8)
        masked = torch.tensor([[True], [False], [True]]) & torch.tensor([True, True, False, True])
        temperature = torch.linspace(0.4, 1.2, 12).view(3, 4)
        settings = {"temperature": temperature, "seed": torch.arange(3)[:, None], "masked": masked}
        samples, expected = assert_agrees(hidden, weight, backend=backend, **settings)
        assert (samples.token[~masked] == -1).all()
        assert (expected[~masked] == 0).all()
        assert (expected[masked] != 0).any(-1).all()
        nobody = {"temperature": 0.5, "seed": 1, "masked": torch.zeros(3, 4, dtype=torch.bool)}
        assert (run(hidden, weight, backend=backend, **nobody)[1] == 0).all()

    def test_keys_count_positions_along_the_length(self, backend):
        hidden, weight, _ = head(1, 500, 8)
        hidden = hidden.expand(2, 3, 8)
        samples, _ = run(hidden, weight, backend=backend, temperature=2.0, seed=torch.tensor([[1], [2]]), step=4)
        for row in range(2):
            for place in range(3):
                settings = {"seed": row + 1, "position": torch.tensor([place]), "step": 4}
                alone, _ = run(hidden[0, :1], weight, backend=backend, temperature=2.0, **settings)
                assert alone.token == samples.token[row, place]

    def test_no_rows(self, backend):
        samples, expected = run(torch.randn(0, 4, 8), torch.randn(20, 8), backend=backend, temperature=1.0, seed=1)
        assert samples.token.shape == (0, 4)
        assert expected.shape == (0, 4, 8)


def test_groups_of_rows():
    """More rows than are kept at once."""
    hidden, weight, _ = head(11, 2500, 8)
    settings = {"temperature": torch.linspace(0.3, 2, 11), "seed": 1, "backend": "cpp-portable"}
    samples, expected = run(hidden, weight, **settings)
    with patch.object(_head_cpp, "MOST_ROWS", 4):
        fewer, sums = run(hidden, weight, **settings)
    assert torch.equal(fewer.token, samples.token)
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-6)


def test_compiles_and_explains():
    hidden, weight, _ = head(4, 300, 8)

    def call(hidden, weight):
        return ops.sample_with_soft_embedding(hidden, weight, temperature=0.8, seed=1)

    samples, expected = torch.compile(call, fullgraph=True, backend="eager")(hidden, weight)
    want, sums = call(hidden, weight)
    assert torch.equal(samples.token, want.token)
    torch.testing.assert_close(expected, sums, rtol=1e-5, atol=1e-6)
    assert "cpp        ok" in ops.explain("sample_with_soft_embedding", "cpu", torch.float32)


def test_rejects():
    hidden, weight = torch.randn(4, 8), torch.randn(20, 8)
    call = ops.sample_with_soft_embedding
    for temperature in (0.0, -1.0, math.inf, torch.zeros(4)):
        with pytest.raises(ValueError, match="temperature must be"):
            call(hidden, weight, temperature=temperature, seed=1)
    with pytest.raises(ValueError, match=r"embedding must be \[20, dim\] on cpu, got \(19, 8\)"):
        call(hidden, weight, weight[:19], temperature=1.0, seed=1)
    with pytest.raises(ValueError, match=r"row \[2\] of the logits holds NaN"):
        call(hidden.index_fill(0, torch.tensor(2), math.nan), weight, temperature=1.0, seed=1)
    with pytest.raises(ValueError, match=r"weight \[vocab, dim\], got"):
        call(hidden, weight[:, :7], temperature=1.0, seed=1)
    with pytest.raises(ops.BackendUnavailableError, match="cuda takes cuda tensors, got cpu"):
        call(hidden, weight, temperature=1.0, seed=1, backend="cuda")
