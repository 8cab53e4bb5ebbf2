"""Joins what attention found over parts of the keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_attention(outs: Tensor | Sequence[Tensor], logsumexps: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What ``attention`` over all keys gives, from its results over disjoint parts of them.

    With ``L = log(sum(exp(logsumexps)))``, ``sum(exp(logsumexps - L) * outs)`` (the merge of split keys in Dao et al.,
    Flash-Decoding, 2023), in float32 (float64 if a part is float64), rounded once. A part whose logsumexp is ``-inf``
    saw no key of that query and counts for nothing, whatever its out is; where every part is so, the result is 0 and
    ``-inf``. Differentiable in all inputs.

    Args:
        outs: the parts, each ``[..., value_dim]`` of one shape and dtype, or stacked ``[parts, ..., value_dim]``.
        logsumexps: natural logarithms, each ``[...]``, or stacked ``[parts, ...]``.

    Returns:
        ``[..., value_dim]`` in the dtype of the parts, and ``[...]`` float32 (float64 if a part is float64).

    Raises:
        ValueError: no part, or shapes that do not fit together.
        TypeError: dtypes that differ among the parts or are not floating point.
    """
    outs, logsumexps = _stacked("outs", outs), _stacked("logsumexps", logsumexps)
    if outs.ndim < 2 or len(outs) == 0 or logsumexps.shape != outs.shape[:-1]:
        raise ValueError(
            "expected outs [parts, ..., value_dim] of at least one part and logsumexps [parts, ...], "
            f"got {tuple(outs.shape)} and {tuple(logsumexps.shape)}"
        )
    wide = torch.promote_types(torch.promote_types(outs.dtype, logsumexps.dtype), torch.float32)
    sums = logsumexps.to(wide)
    unseen = sums == -torch.inf
    nothing = unseen.all(0)
    sums = sums.masked_fill(nothing, 0.0)  # no -inf minus -inf, in gradients neither
    total = sums.logsumexp(0)
    weights = (sums - total).exp().masked_fill(unseen, 0.0)
    out = (weights[..., None] * outs.to(wide).masked_fill(unseen[..., None], 0.0)).sum(0)
    return out.to(outs.dtype), total.masked_fill(nothing, -torch.inf)


def _stacked(name: str, parts: Tensor | Sequence[Tensor]) -> Tensor:
    if not isinstance(parts, Tensor):
        for part in parts:
            if not isinstance(part, Tensor):
                raise TypeError(f"{name} must be tensors, got {type(part).__name__}")
        shapes, dtypes = {tuple(part.shape) for part in parts}, {part.dtype for part in parts}
        if len(shapes) != 1:
            raise ValueError(f"{name} must be parts of one shape, got {sorted(shapes)}")
        if len(dtypes) != 1:
            raise TypeError(f"{name} must share one dtype, got {sorted(map(str, dtypes))}")
        parts = torch.stack(tuple(parts))
    if not parts.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {parts.dtype}")
    return parts
