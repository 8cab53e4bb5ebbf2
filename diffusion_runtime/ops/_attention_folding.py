"""``torch.vmap`` over attention: the mapped dimension becomes more sequences of the same call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# places among the arguments of the operator
_ROWS, _PREFIX, _TABLE, _MASK, _CU_SEQLENS, _TENSORS = (0, 1, 2), (3, 4), 6, 7, (10, 11), 13


def row_axis(arguments: Sequence[Any]) -> int:
    """Where the rows of a call lie: the batch, or the one packed row."""
    return 0 if arguments[_CU_SEQLENS[0]] is None else 2


def folded(size: int, in_dims: Sequence[int | None], arguments: Sequence[Any]) -> list[Any]:
    """The arguments of one call for all of ``size`` calls; what is not mapped is shared where memory allows it.

    Raises:
        ValueError: the pool of a PagedPrefix is mapped.
    """
    axis = row_axis(arguments)
    result = list(arguments)
    for i, (value, dim) in enumerate(zip(arguments[:_TENSORS], in_dims, strict=False)):
        if not isinstance(value, Tensor):
            continue
        if i in _PREFIX and arguments[_TABLE] is not None:
            if dim is not None:
                raise ValueError("vmap cannot map the pool of a PagedPrefix, which all sequences share: map its table")
        elif i == _MASK:
            result[i] = _fold_mask(size, dim, value)
        elif i in _CU_SEQLENS:
            rows = i - _CU_SEQLENS[0]  # of query, or of key
            total = fold(size, in_dims[rows], arguments[rows], axis).shape[axis] // size
            ends = fold_in_front(size, dim, value)
            shift = torch.arange(size, device=value.device, dtype=value.dtype)[:, None] * total
            last = torch.full((1,), size * total, device=value.device, dtype=value.dtype)
            result[i] = torch.cat(((ends[:, :-1] + shift).flatten(), last))
        else:
            result[i] = fold(size, dim, value, axis if i in _ROWS else 0)
            if not value.is_floating_point():
                result[i] = result[i].contiguous()
    return result


def fold(size: int, dim: int | None, value: Tensor, axis: int) -> Tensor:
    """The mapped dimension flattened into ``axis``, in front of it."""
    return fold_in_front(size, dim, value, axis).flatten(axis, axis + 1)


def fold_in_front(size: int, dim: int | None, value: Tensor, axis: int = 0) -> Tensor:
    if dim is not None:
        return value.movedim(dim, axis)
    shape = list(value.shape)
    return value.unsqueeze(axis).expand(*shape[:axis], size, *shape[axis:])


def unfold(size: int, value: Tensor, axis: int) -> Tensor:
    """The inverse of :func:`fold`."""
    unfolded: Tensor = value.unflatten(axis, (size, value.shape[axis] // size))
    return unfolded


def _fold_mask(size: int, dim: int | None, mask: Tensor) -> Tensor:
    mask = fold_in_front(size, dim, mask)
    _, batch, *rest = mask.shape
    # expanded dimensions stay expanded: a copy of [batch, heads, length, num_keys] is what a mask must not cost
    narrow = mask[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in mask.stride())]
    if narrow.shape[:2] != (1, 1):
        narrow = narrow.expand(size, batch, *narrow.shape[2:])
    return narrow.flatten(0, 1).expand(size * batch, *rest)
