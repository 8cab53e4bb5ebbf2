"""Within a block the host neither waits for the device nor sends it anything."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import random_llada
from tape import Tape
from torch import Tensor

from diffusion_runtime import Denoiser, Request
from diffusion_runtime.denoising import Batch
from diffusion_runtime.ops import _registry

CACHES = ["none", "prefix", "dual"]


def begun(cache: str, device: torch.device) -> tuple[Denoiser, Batch]:
    """A batch of two requests with settings of all kinds, in the middle of a block."""
    model = random_llada().to(device)
    denoiser = Denoiser(model, num_steps=8, block_length=8, temperature=0.7, cache=cache, check_every=1000)
    requests = [
        Request([1, 2, 3], max_new_tokens=8, seed=1, top_k=20, suppress=[4]),
        Request([1, 2, 3, 4, 5], max_new_tokens=8, seed=2, policy="entropy", min_new_tokens=2, stop_token_ids=[3]),
    ]
    batch = denoiser._batch(requests, device)
    for _ in range(3):
        denoiser._step(batch)
        denoiser._advance(batch)
    return denoiser, batch


@pytest.mark.parametrize("cache", CACHES)
def test_a_step_makes_no_tensor_of_what_the_host_knows(cache, monkeypatch):
    denoiser, batch = begun(cache, torch.device("cpu"))
    before = batch.tokens.clone()

    def refuse(*_, **__):
        raise AssertionError("a step must not do this")

    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, refuse)
    monkeypatch.setattr(Tensor, "tolist", refuse)
    denoiser._step(batch)
    monkeypatch.undo()
    assert (before != batch.tokens).sum() == 2


@pytest.mark.gpu
@pytest.mark.parametrize("cache", CACHES)
def test_a_step_waits_for_nothing(cache):
    denoiser, batch = begun(cache, torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            denoiser._step(batch)
            denoiser._advance(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (batch.tokens == denoiser.mask_token_id).sum() > 0


def step_in_place(denoiser: Denoiser, batch: Batch) -> None:
    """A step whose results lie where its inputs lay: what a graph of it needs."""
    names = ("tokens", "confidence", "step", "index", "num_mask_free", "live")
    before = [getattr(batch, name) for name in names]
    denoiser._step(batch)
    for name, tensor in zip(names, before, strict=True):
        setattr(batch, name, tensor.copy_(getattr(batch, name)))


def check_replays(denoiser: Denoiser, batch: Batch, replay: Callable[[], None]) -> None:
    """Three steps by a graph of the first are those of a loop without one."""
    expected_denoiser, expected = begun(denoiser._forward.cache, batch.tokens.device)
    for _ in range(3):
        replay()
        expected_denoiser._step(expected)
        assert torch.equal(batch.tokens, expected.tokens)
        assert torch.equal(batch.confidence, expected.confidence)


@pytest.mark.parametrize("cache", CACHES)
def test_a_step_run_again_as_it_was_is_the_next_step(cache, monkeypatch):
    monkeypatch.setattr(_registry, "DEFAULT_BACKEND", "reference")  # made of nothing but torch's operators
    denoiser, batch = begun(cache, torch.device("cpu"))
    draws = batch.draws
    # a CPU picks the masked rows, so that shapes there follow the data
    batch.draws = lambda canvas, vocab: {**draws(canvas, vocab), "masked": None}
    tape = Tape(lambda: step_in_place(denoiser, batch))
    # values are checked on the CPU only
    assert tape.waiting <= {"_rows.py", "_attention_arguments.py", "_sample_tokens.py", "_restriction.py"}
    check_replays(denoiser, batch, tape.replay)


@pytest.mark.gpu
@pytest.mark.parametrize("cache", CACHES)
def test_a_step_can_be_captured_as_a_graph(cache):
    denoiser, batch = begun(cache, torch.device("cuda"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step_in_place(denoiser, batch)
    check_replays(denoiser, batch, graph.replay)
