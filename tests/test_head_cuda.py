"""What of the CUDA backend of ``sample_from_hidden`` is Python, and so needs no GPU; the kernels: ``cuda_on_cpu``."""

import pytest
import torch

from diffusion_runtime import ops
from diffusion_runtime.ops import _head_cuda
from diffusion_runtime.ops._settings import Settings


@pytest.mark.parametrize("vocab", [1, 127, 128, 129, 640])
@pytest.mark.parametrize("with_bias", [False, True])
def test_tiles_of_logits_are_those_of_the_whole_head(vocab: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_head_cuda, "MOST_LOGITS", 3 * 2 * _head_cuda.TILE + 1)
    random = torch.Generator().manual_seed(vocab)
    hidden, weight = torch.randn(3, 24, generator=random), torch.randn(vocab, 24, generator=random)
    bias = torch.randn(vocab, generator=random) if with_bias else None
    tiles = [(first, logits.clone()) for first, logits in _head_cuda.logits_of_tiles(hidden, weight, bias)]
    assert [first for first, _ in tiles] == list(range(0, vocab, 2 * _head_cuda.TILE))
    expected = torch.nn.functional.linear(hidden, weight, bias)
    torch.testing.assert_close(torch.cat([logits for _, logits in tiles], 1), expected)


def test_one_tile_at_least_is_done_at_a_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_head_cuda, "MOST_LOGITS", 1)
    tiles = list(_head_cuda.logits_of_tiles(torch.randn(3, 8), torch.randn(300, 8), None))
    assert [logits.shape for _, logits in tiles] == [(3, 128), (3, 128), (3, 44)]


def test_more_rows_are_fused_where_only_the_device_knows_how_many_count():
    assert _head_cuda.most_fused_rows(Settings()) < _head_cuda.most_fused_rows(Settings(masked=torch.tensor([True])))


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "masked"), [(1, False), (64, False), (65, False), (200, True), (1500, True)])
def test_the_kernels_agree_with_the_reference_in_float64(rows: int, masked: bool):
    random = torch.Generator("cuda").manual_seed(rows)
    hidden = torch.randn(rows, 200, device="cuda", generator=random).to(torch.bfloat16)
    weight = (torch.randn(5000, 200, device="cuda", generator=random) / 5).to(torch.bfloat16)
    mask = torch.rand(rows, device="cuda", generator=random) < 0.1 if masked else None
    options = {"temperature": 0.7, "seed": 5, "step": 3, "masked": mask, "suppress": [4, 4999]}
    got = ops.sample_from_hidden(hidden, weight, statistics="restricted", backend="cuda", **options)
    want = ops.sample_from_hidden(
        hidden.double(), weight.double(), statistics="restricted", backend="reference", **options
    )
    # many rows go by logits in bfloat16, which are off by 2^-9 and tie
    fused = rows <= _head_cuda.most_fused_rows(Settings(masked=mask))
    assert (got.token == want.token).float().mean() >= (0.98 if fused else 0.8)
    assert (got.argmax == want.argmax).float().mean() >= (1 if fused else 0.8)
    for name in ("confidence", "margin", "entropy", "logsumexp"):
        torch.testing.assert_close(
            getattr(got, name), getattr(want, name).float(), atol=1e-4 if fused else 0.1, rtol=1e-4
        )


@pytest.mark.gpu
def test_a_soft_embedding_agrees_with_the_reference_in_float64():
    random = torch.Generator("cuda").manual_seed(1)
    logits = torch.randn(2, 5, 3001, device="cuda", generator=random) * 3
    embedding = torch.randn(3001, 48, device="cuda", generator=random)
    mask = torch.rand(2, 5, device="cuda", generator=random) < 0.7
    got = ops.soft_embedding(logits, embedding, temperature=0.8, masked=mask, backend="cuda")
    want = ops.soft_embedding(logits.double(), embedding.double(), temperature=0.8, masked=mask, backend="reference")
    torch.testing.assert_close(got, want.float(), atol=1e-4, rtol=1e-4)
