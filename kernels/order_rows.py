"""The rows that are to be read put before the others, on the device: a host that counted them would have to wait."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["num_rows"])
def _order_rows_kernel(
    masked_ptr,  # [rows] bool
    order_ptr,  # [rows + 1] int32: the masked rows, then the others; then the number of masked rows
    num_rows,
    BLOCK: tl.constexpr,
):
    """One program for all rows, of which a launch has a few thousand at most."""
    lane = tl.arange(0, BLOCK)
    num_masked = 0
    for first in range(0, num_rows, BLOCK):
        row = first + lane
        num_masked += tl.sum(tl.load(masked_ptr + row, mask=row < num_rows, other=0).to(tl.int32), 0)
    tl.store(order_ptr + num_rows, num_masked)
    before = 0  # masked rows of the blocks before
    for first in range(0, num_rows, BLOCK):
        row = first + lane
        masked = tl.load(masked_ptr + row, mask=row < num_rows, other=0).to(tl.int32)
        rank = before + tl.cumsum(masked, 0)  # masked rows up to this one
        tl.store(order_ptr + tl.where(masked != 0, rank - 1, num_masked + row - rank), row, mask=row < num_rows)
        before += tl.sum(masked, 0)


_CONSTANTS = {"BLOCK": 1024}


def order_rows(masked: Tensor) -> Tensor:
    """[rows + 1] int32: the masked rows, then the others, each in their order; then the number of masked rows."""
    order = torch.empty(len(masked) + 1, dtype=torch.int32, device=masked.device)
    _order_rows_kernel[(1,)](masked, order, len(masked), **_CONSTANTS)
    return order


def ahead_of_time() -> list[tuple[Any, ...]]:
    """One kernel for every number of rows."""
    signature = {"masked_ptr": "*i1:16", "order_ptr": "*i32:16", "num_rows": "i32"}
    return [("rows", _order_rows_kernel, signature, _CONSTANTS, {"num_warps": 4})]
