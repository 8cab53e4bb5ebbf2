"""What is special to the Triton backend of the soft embeddings: the kernel that weighs the tokens of a tile."""

from __future__ import annotations

import math

import pytest
import torch
from backends import device_of

pytest.importorskip("triton")

from diffusion_runtime.kernels import soft_embedding as kernel

from diffusion_runtime import ops
from diffusion_runtime.ops import _soft_embedding
from diffusion_runtime.testing import assert_as_accurate

DEVICE = device_of("triton")


def weigh(logits, temperature=1.0, softcap=0.0, masked=None, logsumexp=None, dtype=torch.float32):
    """The kernel on a tile that lies between others, whose neighbours must stay as they are."""
    rows, n = logits.shape[0] * logits.shape[1], logits.shape[2]
    around = torch.full((rows, n + 7), 3.0, dtype=dtype, device=DEVICE)
    out = around[:, 4 : 4 + n].fill_(math.nan)
    kernel.weigh(logits.to(DEVICE), masked, temperature, softcap, logsumexp.to(DEVICE), out)
    assert (around[:, :4] == 3).all()
    assert (around[:, 4 + n :] == 3).all()
    return out.cpu()


def expected_weights(logits, temperature, softcap, logsumexp):
    y = logits.flatten(0, 1)
    y = torch.where(y == -math.inf, y, softcap * (y / softcap).tanh()) if softcap else y
    return (y / torch.as_tensor(temperature, dtype=y.dtype).view(-1, 1) - logsumexp.to(y.dtype)[:, None]).exp()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 127, 129, 4097])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_weights_are_exact_to_the_last_bits(n, dtype, softcap):
    logits = (torch.randn(2, 7, n + 3) * 6).to(dtype)[:, 1:6, 2 : n + 2]
    temperature = torch.rand(10) + 0.3
    y = expected_weights(logits.double(), temperature.double(), softcap, torch.zeros(10))
    logsumexp = y.sum(1).log().float()
    truth = expected_weights(logits.double(), temperature.double(), softcap, logsumexp)
    got = weigh(logits, temperature.to(DEVICE), softcap, logsumexp=logsumexp)
    assert_as_accurate(got, expected_weights(logits.float(), temperature, softcap, logsumexp), truth, floor=1e-6)
    rounded = weigh(logits, temperature.to(DEVICE), softcap, logsumexp=logsumexp, dtype=dtype)
    assert torch.equal(rounded, got.to(dtype))


def test_large_logits_do_not_lose_the_quotient():
    logits = torch.tensor([[[30000.0, 29990.0, 29999.0, -math.inf, torch.finfo(torch.float32).min]]])
    for temperature in (0.7, 3.0):
        inverse = 1 / torch.tensor(temperature).double()
        logsumexp = (logits[0].double() * inverse).logsumexp(-1)
        got = weigh(logits, torch.tensor([temperature], device=DEVICE), logsumexp=logsumexp)
        # what is left is the rounding of logsumexp itself to float32
        error = (logsumexp - logsumexp.float().double()).item()
        expected = (logits[0].double() * inverse - logsumexp + error).exp()
        torch.testing.assert_close(got.double(), expected, rtol=4e-6, atol=1e-12)
    assert not weigh(logits, 1e-38, logsumexp=torch.tensor([3e38])).isnan().any()


def test_rows_that_are_not_masked_are_0_and_not_read():
    logits = torch.randn(3, 6, 300)
    masked = torch.rand(18) < 0.5
    logsumexp = logits.flatten(0, 1).logsumexp(-1)
    expected = weigh(logits, logsumexp=logsumexp)
    logits.view(18, 300)[~masked] = math.nan
    logsumexp[~masked] = math.nan
    got = weigh(logits, masked=masked.to(DEVICE), logsumexp=logsumexp)
    assert torch.equal(got[masked], expected[masked])
    assert (got[~masked] == 0).all()


def test_a_row_without_a_distribution_gives_nan():
    logits = torch.tensor([[[-math.inf, -math.inf], [math.nan, 0.0], [-math.inf, 0.0]]])
    got = weigh(logits, logsumexp=torch.tensor([math.nan, math.nan, 0.0]))
    assert got[:2].isnan().all()
    assert got[2].tolist() == [0, 1]


def test_the_size_of_a_block_changes_nothing(monkeypatch):
    logits = torch.randn(1, 21, 300)
    logsumexp = logits[0].logsumexp(-1)
    results = []
    for interpreted in (True, False):
        monkeypatch.setattr(kernel, "_INTERPRETED", interpreted)
        results.append(weigh(logits, 0.9, logsumexp=logsumexp))
    assert torch.equal(*results)


@pytest.mark.parametrize("from_hidden", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ops_over_several_tiles(from_hidden, dtype, monkeypatch):
    monkeypatch.setattr(_soft_embedding, "MIN_TILE", 128)
    monkeypatch.setattr(_soft_embedding, "MOST_PROBABILITIES", {"cpu": 6 * 256, "cuda": 6 * 256})
    hidden, weight = torch.randn(2, 3, 20).to(dtype), torch.randn(700, 20).to(dtype)
    settings = {"temperature": 0.8, "softcap": 4.0, "masked": torch.tensor([True, False, True])}
    logits = hidden @ weight.T

    def soft(to, backend, **more):
        call = {**settings, **more, "backend": backend}
        call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
        rows, table = (x.to(to).to(DEVICE) for x in (hidden if from_hidden else logits, weight))
        op = ops.soft_embedding_from_hidden if from_hidden else ops.soft_embedding
        return op(rows, table, **call).cpu()

    truth, yardstick = soft(torch.float64, "reference"), soft(dtype, "reference")
    logsumexp = ops.sample_tokens(logits, statistics_temperature=0.8, softcap=4.0).logsumexp
    for more in ({}, {"logsumexp": logsumexp}):
        assert_as_accurate(soft(dtype, "triton", **more), yardstick, truth, floor=1e-6 if dtype.itemsize == 4 else 8e-3)
