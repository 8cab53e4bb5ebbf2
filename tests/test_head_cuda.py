"""What of the CUDA backend of ``sample_from_hidden`` is Python, and so needs no GPU; the kernels: ``cuda_on_cpu``."""

import pytest
import torch

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
