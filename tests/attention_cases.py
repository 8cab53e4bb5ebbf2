"""Calls of ``attention`` that every backend goes through, and one request in every arrangement it may come in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_runtime import ops
from diffusion_runtime.testing import assert_as_accurate

NAN = float("nan")


class Case(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    kwargs: dict[str, Any]


def mapped(change: Callable[[Tensor], Tensor], what: Any) -> Any:
    """The same arguments with every tensor changed, inside of Prefix and the like too."""
    if isinstance(what, Tensor):
        return change(what)
    if isinstance(what, dict):
        return {name: mapped(change, value) for name, value in what.items()}
    if isinstance(what, tuple):
        return tuple(mapped(change, value) for value in what)
    if is_dataclass(what) and not isinstance(what, type):
        return replace(what, **{field.name: mapped(change, getattr(what, field.name)) for field in fields(what)})
    return what


def to(case: Case, device: torch.device | str) -> Case:
    """The same on another device."""
    return Case(*mapped(lambda x: x.to(device), tuple(case)))


def run(case: Case, backend: str) -> tuple[Tensor, Tensor]:
    return ops.attention(*case[:3], **case.kwargs, return_logsumexp=True, backend=backend)


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def check(case: Case, backend: str, device: torch.device | str = "cpu") -> None:
    """Hold a backend to the reference in float64, ``-inf`` to ``-inf``."""
    got_out, got_sums = (x.cpu() for x in run(to(case, device), backend))
    out, sums = run(case, "reference")
    true_out, true_sums = run(Case(*mapped(_double, tuple(case))), "reference")
    assert got_out.dtype == case.query.dtype
    assert got_sums.dtype == torch.float32
    assert_as_accurate(got_out, out, true_out)
    nothing = true_sums == -torch.inf
    assert torch.equal(got_sums == -torch.inf, nothing)
    assert not got_out[nothing].any(), "a query that sees nothing must give 0"
    assert_as_accurate(*(x.masked_fill(nothing, 0.0) for x in (got_sums, sums, true_sums)), floor=4e-6)


def _qkv(batch: int, heads: int, kv_heads: int, length: int, num_keys: int, dim: int, value_dim: int = 0):
    query = torch.randn(batch, heads, length, dim)
    return query, torch.randn(batch, kv_heads, num_keys, dim), torch.randn(batch, kv_heads, num_keys, value_dim or dim)


def _prefix(batch: int, kv_heads: int, lengths: list[int], capacity: int, dim: int) -> ops.Prefix:
    key, value = torch.randn(2, batch, kv_heads, capacity, dim)
    for b, n in enumerate(lengths):
        key[b, :, n:], value[b, :, n:] = NAN, NAN
    return ops.Prefix(key, value, torch.tensor(lengths))


def paged(prefix: ops.Prefix, page_size: int, spare: int = 2) -> ops.PagedPrefix:
    """The same prefix in pages that lie anywhere, beside pages and table entries that must not be looked at."""
    assert prefix.lengths is not None
    batch, kv_heads, capacity, dim = prefix.key.shape
    max_pages = -(-capacity // page_size) + 1
    pages = [(b, i) for b in range(batch) for i in range(-(-int(prefix.lengths[b]) // page_size))]
    place = torch.randperm(len(pages) + spare)
    # pages as [page_size, kv_heads, head_dim] in memory, as most caches have them
    pool = prefix.key.new_full((2, len(pages) + spare, page_size, kv_heads, dim), NAN).transpose(2, 3)
    table = torch.full((batch, max_pages), 1 << 30)
    for (b, i), at in zip(pages, place.tolist(), strict=False):
        own = slice(i * page_size, (i + 1) * page_size)
        for side, rows in enumerate((prefix.key[b, :, own], prefix.value[b, :, own])):
            pool[side, at, :, : rows.shape[1]] = rows
        table[b, i] = at
    return ops.PagedPrefix(pool, table, prefix.lengths)


MASKS = {
    "bidirectional": ops.Bidirectional(),
    "causal": ops.Causal(),
    "causal-offset": ops.Causal(offset=-9),
    "blocks": ops.BlockCausal(8),
    "blocks-odd": ops.BlockCausal(7, offset=3),
    "window": ops.SlidingWindow(5, 3),
    "window-causal": ops.SlidingWindow(11, 0),
    "window-right": ops.SlidingWindow(None, 2),
    "prefix-window": ops.PrefixWindow(6),
    "per-sequence": ops.PerSequence(torch.tensor([True, False]), ops.SlidingWindow(20, 0), ops.PrefixWindow(9)),
    "per-sequence-causal": ops.PerSequence(torch.tensor([False, True]), ops.Causal()),
}


def _built(name: str, dim: int) -> Case:
    kind, _, rest = name.partition(":")
    if kind == "mask":  # alone, and on top of a prefix
        return Case(*_qkv(2, 4, 2, 37, 37, dim), {"mask": MASKS[rest]})
    if kind == "prefix":
        mask = MASKS[rest] if rest else None
        return Case(*_qkv(2, 4, 2, 21, 21, dim), {"prefix": _prefix(2, 2, [19, 40], 45, dim), "mask": mask})
    if kind == "paged":
        prefix = paged(_prefix(2, 2, [19, 40], 45, dim), 16)
        return Case(*_qkv(2, 4, 2, 21, 21, dim), {"prefix": prefix, "mask": MASKS[rest] if rest else None})
    if kind == "left":  # key 0 of the second sequence is padding
        query, key, value = _qkv(2, 4, 2, 30, 30, dim)
        key[1, :, :9], value[1, :, :9], key[1, :, 28:], value[1, :, 28:] = NAN, NAN, NAN, NAN
        lengths = (torch.tensor([0, 9]), torch.tensor([30, 28]))
        return Case(query, key, value, {"lengths": lengths, "mask": MASKS[rest] if rest else None})
    if kind == "packed":
        cu = torch.tensor([0, 13, 13, 14, 50])
        query, key, value = _qkv(1, 4, 2, 50, 50, dim)
        kwargs: dict[str, Any] = {"lengths": ops.Packed(cu, max_length=36 if rest == "causal" else None)}
        if rest == "prefix":
            kwargs["prefix"] = _prefix(4, 2, [0, 3, 20, 11], 20, dim)
        elif rest == "keys":
            kwargs["lengths"] = ops.Packed(cu, torch.tensor([0, 5, 9, 9, 41]))
            key, value = key[:, :, :41], value[:, :, :41]
        elif rest:
            kwargs["mask"] = MASKS[rest]
        return Case(query, key, value, kwargs)
    return Case(*_PLAIN[kind](dim))


def _lengths(dim: int):
    query, key, value = _qkv(3, 2, 2, 17, 35, dim)
    key[1, :, 13:], value[1, :, 13:], key[2], value[2] = NAN, NAN, NAN, NAN
    return query, key, value, {"lengths": torch.tensor([35, 13, 0])}


def _bool_mask(dim: int):
    mask = torch.rand(2, 1, 20, 33) < 0.5
    mask[1, :, 3] = False
    return *_qkv(2, 4, 2, 20, 33, dim), {"mask": mask}


def _float_mask(dim: int):
    mask = torch.randn(4, 20, 1) * 2 + torch.randn(33)
    mask[:, :, 5:9], mask[2, 11] = -torch.inf, -torch.inf
    return *_qkv(2, 4, 2, 20, 33, dim), {"mask": mask, "softcap": 1.5}


def _hidden_key(dim: int, dtype: torch.dtype):
    query, key, value = _qkv(1, 4, 2, 20, 33, dim)
    key[:, :, 7], key[:, :, 20] = NAN, torch.inf
    mask = torch.rand(20, 33) < 0.5
    mask[:, [7, 20]] = False
    return query, key, value, {"mask": mask if dtype == torch.bool else torch.where(mask, 1.0, -torch.inf)}


def _strided(dim: int):
    query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in _qkv(2, 6, 3, 19, 41, dim))
    wide = torch.randn(2, 3, 41, 2 * dim)
    wide[..., dim:] = NAN
    return query, key, wide[..., :dim], {}


def _equal_scores(dim: int):
    query, key, value = _qkv(1, 2, 1, 9, 70, dim)
    return query, torch.ones_like(key), value, {}


def _uneven(dim: int):
    query, key, value = _qkv(2, 4, 2, 20, 33, dim)
    key[:, :, 0] *= 40  # one key far above the rest, first, and one far below, last
    key[:, :, 32] *= -40
    return query, key, value, {}


_PLAIN: dict[str, Callable[[int], tuple[Any, ...]]] = {
    "square": lambda dim: (*_qkv(2, 4, 2, 33, 33, dim), {}),
    "long": lambda dim: (*_qkv(1, 3, 1, 70, 300, dim), {}),
    "one-query": lambda dim: (*_qkv(3, 2, 2, 1, 131, dim), {}),
    "one-key": lambda dim: (*_qkv(1, 2, 2, 5, 1, dim), {}),
    "many-heads": lambda dim: (*_qkv(1, 16, 1, 5, 65, dim), {}),
    "value-dim": lambda dim: (*_qkv(2, 2, 1, 10, 40, dim, dim // 2), {}),
    "lengths": _lengths,
    "bool-mask": _bool_mask,
    "float-mask": _float_mask,
    "hidden-key": partial(_hidden_key, dtype=torch.bool),
    "hidden-key-float": partial(_hidden_key, dtype=torch.float32),
    "strided": _strided,
    "softcap": lambda dim: (*_qkv(2, 2, 2, 18, 50, dim), {"softcap": 0.7}),
    "softcap-large": lambda dim: (*_qkv(1, 2, 2, 18, 50, dim), {"softcap": 30.0, "scale": 40.0}),
    "large": lambda dim: (*_qkv(1, 2, 2, 18, 50, dim), {"scale": 60.0}),
    "negative-scale": lambda dim: (*_qkv(1, 2, 2, 9, 50, dim), {"scale": -0.3}),
    "zero-scale": lambda dim: (*_qkv(1, 2, 2, 9, 50, dim), {"scale": 0.0}),
    "equal-scores": _equal_scores,
    "uneven": _uneven,
    "no-keys": lambda dim: (*_qkv(2, 2, 2, 3, 0, dim), {}),
    "no-queries": lambda dim: (*_qkv(2, 2, 2, 0, 7, dim), {}),
    "no-batch": lambda dim: (*_qkv(0, 2, 2, 3, 7, dim), {}),
}

NAMES = [
    *_PLAIN,
    *(f"mask:{name}" for name in MASKS),
    *(f"prefix:{name}" for name in ("", *MASKS)),
    *(f"paged:{name}" for name in ("", "causal", "per-sequence")),
    *(f"left:{name}" for name in ("", "causal", "blocks", "window")),
    *(f"packed:{name}" for name in ("", "causal", "blocks", "prefix", "keys")),
]


def case(name: str, dtype: torch.dtype = torch.float32, dim: int = 32) -> Case:
    """One of :data:`NAMES`; a float mask stays float32."""
    torch.manual_seed(sum(name.encode()))
    query, key, value, kwargs = _built(name, dim)
    mask = kwargs.get("mask")
    rounded = mapped(lambda x: x.to(dtype) if x.is_floating_point() else x, (query, key, value, kwargs))
    if isinstance(mask, Tensor):
        rounded[3]["mask"] = mask
    return Case(*rounded)


def arrangements(
    mask: Any, dtype: torch.dtype, dim: int = 32
) -> Iterator[tuple[str, Case, Callable[[Tensor], Tensor]]]:
    """One request alone and in company; each comes with what picks its rows out of ``[batch, heads, length, ...]``."""
    torch.manual_seed(1)
    own, before = 21, 40
    query, key, value = (x.to(dtype) for x in _qkv(1, 4, 2, own, own, dim))
    prefix = mapped(lambda x: x.to(dtype) if x.is_floating_point() else x, _prefix(1, 2, [before], before, dim))
    yield "alone", Case(query, key, value, {"prefix": prefix, "mask": mask}), lambda x: x[0]

    def beside(x: Tensor, first: int, size: int) -> Tensor:
        """``[1, heads, rows, dim]`` as the second of three, from row ``first`` of ``size``; NaN where nothing is."""
        out = torch.randn(3, x.shape[1], size, x.shape[3]).to(dtype)
        out[1] = NAN
        out[1, :, first : first + x.shape[2]] = x[0]
        return out

    for name, first, size in (("right-padded", 0, 33), ("left-padded", 12, 33)):
        in_batch = [beside(x, first, size) for x in (query, key, value)]
        in_batch[0][1].nan_to_num_(0.0)  # padded queries are computed too
        lengths = (torch.tensor([0, first, 3]), torch.tensor([size, first + own, 30]))
        longer = ops.Prefix(beside(prefix.key, 0, 57), beside(prefix.value, 0, 57), torch.tensor([57, before, 7]))
        rows = slice(first, first + own)
        for kind, other in ((name, longer), (f"{name}, paged", paged(longer, 16))):
            kwargs = {"prefix": other, "mask": mask, "lengths": lengths}
            yield kind, Case(*in_batch, kwargs), lambda x, rows=rows: x[1, :, rows]

    packed = [
        torch.cat((torch.randn(1, x.shape[1], 10, dim).to(dtype), x, x[:, :, :6]), 2) for x in (query, key, value)
    ]
    ends = torch.tensor([0, 10, 10 + own, 16 + own])
    kwargs = {"prefix": longer, "mask": mask, "lengths": ops.Packed(ends)}
    yield "packed", Case(*packed, kwargs), lambda x: x[0, :, 10 : 10 + own]
    yield "four queries", Case(query[:, :, :4], key, value, {"prefix": prefix, "mask": mask}), lambda x: x[0]


def check_invariant(
    backend: str, mask: Any, dtype: torch.dtype, device: torch.device | str = "cpu", dim: int = 32, tolerance: float = 0
) -> None:
    """The same bits of a request in every arrangement; the reference is as invariant as torch's products."""
    expected: list[Tensor] = []
    for name, one, pick in arrangements(mask, dtype, dim):
        got = [pick(x) for x in run(to(one, device), backend)]
        expected = expected or got
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b[:, : a.shape[1]], rtol=0, atol=tolerance, msg=f"{name} differs")


def check_windows(backend: str, dtype: torch.dtype, device: torch.device | str = "cpu", num_keys: int = 600) -> None:
    """The same bits of a query whatever others are in the call, where each sees its own part of several blocks."""
    torch.manual_seed(2)
    query, key, value = (x.to(device, dtype) for x in _qkv(1, 2, 1, num_keys, num_keys, 16))
    every = ops.attention(
        query, key, value, mask=ops.SlidingWindow(num_keys // 2, 20), return_logsumexp=True, backend=backend
    )
    for first in (num_keys // 2 + 3, num_keys - 30):
        rows = slice(first, first + 3)
        mask = ops.SlidingWindow(num_keys // 2, 20, offset=first)
        some = ops.attention(query[:, :, rows], key, value, mask=mask, return_logsumexp=True, backend=backend)
        for a, b in zip(some, every, strict=True):
            assert torch.equal(a, b[:, :, rows])
