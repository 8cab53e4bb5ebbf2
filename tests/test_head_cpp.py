"""sample_from_hidden in C++: its tiles, its groups of rows, the tile that is computed twice, its memory."""

from __future__ import annotations

from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from backends import sample_from_hidden
from test_sample_from_hidden import DTYPES, head

from diffusion_runtime import ops
from diffusion_runtime.ops import _head_cpp
from diffusion_runtime.ops._products import head_product
from diffusion_runtime.testing import assert_as_accurate


@pytest.mark.parametrize("backend", ["cpp-avx512", "cpp-avx2", "cpp-portable"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_draws_are_those_of_sample_tokens_on_the_rounded_logits(backend, dtype, transposed):
    hidden, weight, bias = head(400, 5000, 60, dtype)
    if transposed:
        weight = weight.T.clone().T
    logits = torch.nn.functional.linear(hidden, weight, bias)
    settings = {"temperature": 1.1, "seed": 12, "softcap": 6.0}
    got = sample_from_hidden(hidden, weight, bias=bias, backend=backend, **settings)
    expected = ops.sample_tokens(logits, backend="cpp", **settings)
    # a logit that the two products round in two ways moves its neighbours' share of the uniform
    assert (got.token != expected.token).sum() <= (2 if dtype == torch.float32 else 8)
    assert torch.equal(got.argmax, expected.argmax)
    agree = got.token == expected.token
    torch.testing.assert_close(got.logprob[agree], expected.logprob[agree], rtol=1e-4, atol=5e-3)


def test_the_logprob_of_the_argmax_is_that_of_its_confidence():
    # where logits are large, their two roundings differ more than this allows
    hidden, weight, _ = head(300, 3000, 200)
    samples = ops.sample_from_hidden(hidden, weight * 20, temperature=1.0, seed=1, backend="cpp")
    same = samples.token == samples.argmax
    assert same.sum() > 100
    torch.testing.assert_close(samples.logprob[same], samples.confidence[same].log(), rtol=2e-6, atol=2e-7)


def test_tiles_are_whole_chunks_and_none_is_short():
    for rows in (1, 7, 256, 5000):
        for vocab in (1, 2047, 2048, 2049, 4095, 4097, 100_001, 262_144):
            for most in (1, 1 << 18, 1 << 21):
                with patch.object(_head_cpp, "TILE_BYTES", {4: most}):
                    tiles = list(_head_cpp.tiles(rows, vocab, 4))
                assert tiles[0].start == 0
                assert tiles[-1].stop == vocab
                assert all(a.stop == b.start and a.stop % 2048 == 0 for a, b in pairwise(tiles))
                assert all(tile.stop - tile.start >= min(2048, vocab) for tile in tiles)


def test_many_rows_go_in_groups():
    hidden, weight, bias = head(50, 2100, 12)
    settings = {
        "bias": bias,
        "temperature": torch.rand(50),
        "seed": torch.arange(50),
        "position": torch.arange(50) * 3,
        "allowed": ops.pack_allowed(torch.rand(50, 2100) < 0.5),
        "statistics": "restricted",
    }
    expected = ops.sample_from_hidden(hidden, weight, backend="cpp", **settings)
    with patch.object(_head_cpp, "MOST_ROWS", 16):
        got = ops.sample_from_hidden(hidden, weight, backend="cpp", **settings)
    assert torch.equal(got.token, expected.token)
    torch.testing.assert_close(got.entropy, expected.entropy)


def test_one_row_is_multiplied_as_many_are():
    hidden, weight, bias = head(9, 2100, 600)
    product = head_product(weight)
    if product is torch.nn.functional.linear:
        pytest.skip("this build of torch has no oneDNN beside MKL")
    together = product(hidden, weight, bias)
    assert_as_accurate(
        together,
        torch.nn.functional.linear(hidden, weight, bias),
        torch.nn.functional.linear(hidden.double(), weight.double(), bias.double()),
    )
    assert torch.equal(product(hidden[3:4], weight, bias), together[3:4])
    assert product(hidden[:0], weight, bias).shape == (0, 2100)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_logits_never_exist(dtype, temperature):
    from bench.memory import peak_extra_mb, unmeasurable

    if reason := unmeasurable(torch.device("cpu")):
        pytest.skip(reason)
    vocab = 120_000  # of whose logits a tile, and what a product without AVX-512 keeps beside it, is a small part
    hidden, weight, _ = head(256, vocab, 16, dtype)

    def call():
        return ops.sample_from_hidden(hidden, weight, temperature=temperature, seed=1, backend="cpp")

    call()  # what torch and oneDNN keep for themselves
    _, mb = peak_extra_mb(call, torch.device("cpu"))
    assert mb < 256 * vocab * dtype.itemsize / 1e6 / 2
