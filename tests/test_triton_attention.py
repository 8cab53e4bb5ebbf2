"""attention in Triton: the cases and arrangements of attention_cases.py, and what only its launch can get wrong."""

from __future__ import annotations

import attention_cases
import pytest
import torch

pytest.importorskip("triton")

from diffusion_runtime import ops

OF_HALVES = [
    "square",
    "long",
    "prefix:per-sequence",
    "paged:causal",
    "left:blocks",
    "packed:prefix",
    "float-mask",
    "softcap",
    "large",
    "uneven",
]


@pytest.mark.parametrize("name", attention_cases.NAMES)
def test_equals_the_reference(name, device):
    attention_cases.check(attention_cases.case(name), "triton", device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OF_HALVES)
def test_multiplies_halves(name, dtype, device):
    attention_cases.check(attention_cases.case(name, dtype, 40), "triton", device)


@pytest.mark.parametrize("mask", ["blocks-odd", "prefix-window"])
def test_company_changes_no_bit(mask, device):
    attention_cases.check_invariant("triton", attention_cases.MASKS[mask], torch.float32, device)


def test_company_changes_no_bit_of_halves(device):
    attention_cases.check_invariant("triton", ops.BlockCausal(8), torch.bfloat16, device)
    attention_cases.check_windows("triton", torch.float16, device, 300)


@pytest.mark.parametrize("dim", [16, 24, 64, 128, 256, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_of_any_size(dim, dtype, device):
    for name in ("prefix:window", "value-dim"):
        attention_cases.check(attention_cases.case(name, dtype, dim), "triton", device)


@pytest.mark.parametrize(
    ("name", "dim"),
    [*((name, 32) for name in ("prefix:", "packed:prefix", "softcap", "lengths", "no-keys")), ("prefix:window", 512)],
)
def test_programs_that_share_a_tile_change_no_bit(name, dim, device, monkeypatch):
    """Several chunks, walked by one program or taken in turns by several."""
    from diffusion_runtime.kernels import attention as kernel

    config = kernel.launch_config
    monkeypatch.setattr(kernel, "launch_config", lambda *args: {**config(*args), "BLOCK_KEYS": 16, "CHUNK": 1})
    monkeypatch.setattr(kernel, "MOST_TILES", 3)
    one = attention_cases.case(name, torch.float32, dim)
    results = []
    for splits in (1, 2, 3):
        monkeypatch.setattr(kernel, "splits_of", lambda *_, splits=splits: splits)
        attention_cases.check(one, "triton", device)
        results.append(attention_cases.run(attention_cases.to(one, device), "triton"))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert torch.equal(a, b)
