"""The order in which the Triton head takes its rows: the masked ones first, counted on the device."""

from __future__ import annotations

import pytest
import torch
from backends import device_of

pytest.importorskip("triton")

from diffusion_runtime.kernels.order_rows import order_rows


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows", [1, 5, 1023, 1024, 2500])
def test_masked_rows_come_first_and_are_counted(rows, share):
    masked = torch.rand(rows) < share
    expected = [*masked.nonzero()[:, 0].tolist(), *(~masked).nonzero()[:, 0].tolist(), int(masked.sum())]
    assert order_rows(masked.to(device_of("triton"))).tolist() == expected
