"""What tests and users' own checks share: the closeness rule, poisoned memory, awkward logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


def assert_as_accurate(actual: Tensor, same_dtype: Tensor, truth: Tensor, *, floor: float = 2e-6) -> None:
    """Fail unless ``actual`` is about as close to ``truth`` as the reference in the same dtype is.

    A fixed tolerance is either too loose for float32 or too tight for bfloat16; the error that the reference itself
    makes at that dtype is the right yardstick.

    Args:
        actual: what the kernel returned.
        same_dtype: the reference, run on the same low-precision input.
        truth: the reference, run on the input in float64.
        floor: slack for results the reference happens to get exactly right, relative to the largest ``truth`` above 1.
    """
    assert actual.shape == truth.shape, f"expected shape {tuple(truth.shape)}, got {tuple(actual.shape)}"
    if not truth.numel():
        return
    allowed = 2 * (same_dtype.double() - truth).abs().max().item() + floor * max(1.0, truth.abs().max().item())
    error = (actual.double() - truth).abs()
    worst = int(error.argmax())
    assert not actual.isnan().any(), "the kernel returned NaN"
    assert error.max() <= allowed, (
        f"error {error.max():.3e} at {worst} exceeds {allowed:.3e}: "
        f"got {actual.flatten()[worst]:.8g}, expected {truth.flatten()[worst]:.8g}"
    )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Make ``torch.empty`` and ``empty_like`` return NaN (the largest integer, or True): what stays unwritten shows."""
    with torch.device("meta"):  # a device context collects the functions it redirects once: the real one, not ours
        torch.empty(0)

    def poisoning(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            if out.device.type == "meta":
                return out
            if out.dtype == torch.bool:
                return out.fill_(True)
            return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max)

        return poisoned

    with patch("torch.empty", poisoning(torch.empty)), patch("torch.empty_like", poisoning(torch.empty_like)):
        yield


def awkward_logits(rows: int, vocab: int, *, seed: int = 0) -> Tensor:
    """``[rows, vocab]`` float32 logits whose rows take turns at what goes wrong.

    Plain noise, a flat row, ties for the maximum far apart, half of the vocabulary at ``-inf``, large values, and a
    row with one dominant token.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * 3
    logits[1::6] = 0.25
    logits[2::6, [0, vocab // 2, vocab - 1]] = 20.0
    logits[3::6, vocab // 3 : vocab // 3 + (vocab + 1) // 2] = -torch.inf
    if vocab < 3:
        logits[3::6, 0] = 1.0
    logits[4::6] *= 1000
    logits[5::6, vocab // 3] = 60.0
    return logits
