"""The arguments of ``attention``: the objects among them, and the checks that make a problem of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_runtime.ops._attention_masks import AttentionMask, VisibleKeys
from diffusion_runtime.ops._attention_problem import AttentionProblem


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of everything before the canvas, which are read where they are.

    Args:
        key: ``[batch, kv_heads, capacity, head_dim]``, any strides.
        value: ``[batch, kv_heads, capacity, value_dim]``.
        lengths: ``[batch]`` integers, how many of the keys are decided; None for all. What lies behind is not read.
    """

    key: Tensor
    value: Tensor
    lengths: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PagedPrefix:
    """A prefix in pages of a pool that many sequences share.

    Args:
        pool: ``[2, num_pages, kv_heads, page_size, head_dim]``, keys and then values, any strides.
        table: ``[batch, max_pages]`` integers: the page of keys ``page_size * i`` and on of each sequence.
        lengths: ``[batch]`` integers. Pages behind a sequence's last key are not read, their table entries may be
            anything.
    """

    pool: Tensor
    table: Tensor
    lengths: Tensor


@dataclass(frozen=True, eq=False)
class Packed:
    """Sequences of any lengths one after the other, without padding: ``query`` is ``[1, heads, total, head_dim]``.

    Args:
        cu_seqlens: ``[sequences + 1]`` integers; sequence ``b`` has queries ``cu_seqlens[b] : cu_seqlens[b + 1]``.
        cu_seqlens_k: the same for ``key`` and ``value``; None for ``cu_seqlens``.
        max_length: the most queries that a sequence has; None for all of them, which is right but starts more work
            than there is on a GPU.
    """

    cu_seqlens: Tensor
    cu_seqlens_k: Tensor | None = None
    max_length: int | None = None


def read_problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Prefix | PagedPrefix | None,
    mask: AttentionMask | Tensor | None,
    lengths: Tensor | tuple[Tensor, Tensor] | Packed | None,
    scale: float | None,
    softcap: float | None,
) -> AttentionProblem:
    """Check every argument of that name of :func:`diffusion_runtime.ops.attention`."""
    check_segments(query, key, value)
    packed = lengths if isinstance(lengths, Packed) else None
    sequences = query.shape[0] if packed is None else packed.cu_seqlens.shape[0] - 1
    prefix_key, prefix_value, prefix_lengths, page_table = _prefix(prefix, query, key, value, sequences)
    if isinstance(mask, Tensor) and (prefix is not None or packed is not None):
        raise ValueError("a mask that is a tensor cannot be combined with a prefix or with Packed: pass an object")
    starts = ends = cu_seqlens = cu_seqlens_k = None
    max_length = query.shape[2]
    if isinstance(lengths, Packed):
        cu_seqlens, cu_seqlens_k, max_length = _cu_seqlens(lengths, query, key)
    elif isinstance(lengths, tuple):
        starts, ends = (
            read_counts(f"lengths[{i}]", x, (sequences,), query, key.shape[2]) for i, x in enumerate(lengths)
        )
    elif lengths is not None:
        ends = read_counts("lengths", lengths, (sequences,), query, key.shape[2])
    dense_mask, visible = None, VisibleKeys()
    if isinstance(mask, Tensor):
        dense_mask = _dense_mask(mask, query, key)
    elif mask is not None:
        visible = read_visible(mask, query, sequences)
    return AttentionProblem(
        query=query,
        key=key,
        value=value,
        prefix_key=prefix_key,
        prefix_value=prefix_value,
        prefix_lengths=prefix_lengths,
        page_table=page_table,
        dense_mask=dense_mask,
        key_starts=starts,
        key_ends=ends,
        cu_seqlens=cu_seqlens,
        cu_seqlens_k=cu_seqlens_k,
        max_length=max_length,
        visible=visible,
        scale=query.shape[-1] ** -0.5 if scale is None else _number("scale", scale),
        softcap=_number("softcap", 0.0 if softcap is None else softcap, positive=softcap is not None),
    )


def check_segments(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Whether ``query``, ``key`` and ``value`` go together."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be [batch, heads, length, head_dim], got {tuple(tensor.shape)}")
    batch, heads, _, head_dim = query.shape
    if (key.shape[0], key.shape[3]) != (batch, head_dim) or key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(
            f"key must be [{batch}, a divisor of {heads}, num_keys, {head_dim}] to fit query, got {tuple(key.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value must be {[*key.shape[:3], 'value_dim']} to fit key, got {tuple(value.shape)}")
    if head_dim == 0 or value.shape[3] == 0:
        raise ValueError(f"head_dim and value_dim must not be 0, got {head_dim} and {value.shape[3]}")
    _check_kind(query, key=key, value=value)


def _check_kind(query: Tensor, **others: Tensor) -> None:
    for name, tensor in {"query": query, **others}.items():
        if tensor.dtype != query.dtype or not tensor.is_floating_point():
            raise TypeError(f"query, key and value must share one floating-point dtype, got {name} {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"query is on {query.device}, but {name} is on {tensor.device}")


def _prefix(
    prefix: Prefix | PagedPrefix | None, query: Tensor, key: Tensor, value: Tensor, sequences: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    if prefix is None:
        return None, None, None, None
    if isinstance(prefix, PagedPrefix):
        if prefix.pool.ndim != 5 or prefix.pool.shape[0] != 2:
            raise ValueError(
                f"pool must be [2, num_pages, kv_heads, page_size, head_dim], got {tuple(prefix.pool.shape)}"
            )
        keys, values = prefix.pool.unbind(0)
        rows: int = keys.shape[0]
        what: int | str = "num_pages"
        if prefix.table.ndim != 2:
            raise ValueError(f"table must be [{sequences}, max_pages], got {tuple(prefix.table.shape)}")
        table = read_counts("table", prefix.table, (sequences, prefix.table.shape[1]), query, None)
        capacity = table.shape[1] * keys.shape[2]
    elif isinstance(prefix, Prefix):
        keys, values, table = prefix.key, prefix.value, None
        if keys.ndim != 4 or values.ndim != 4:
            raise ValueError(
                f"the prefix must be [batch, kv_heads, capacity, head_dim], got {tuple(keys.shape)} and "
                f"{tuple(values.shape)}"
            )
        rows, what, capacity = sequences, sequences, keys.shape[2]
    else:
        raise TypeError(f"prefix must be Prefix or PagedPrefix, got {type(prefix).__name__}")
    _check_kind(query, **{"the prefix's key": keys, "the prefix's value": values})
    for name, got, like in (("key", keys, key), ("value", values, value)):
        expected = (rows, like.shape[1], keys.shape[2], like.shape[3])
        if tuple(got.shape) != expected:
            raise ValueError(
                f"the prefix's {name} must be [{what}, {expected[1]}, {expected[2]}, {expected[3]}], "
                f"got {tuple(got.shape)}"
            )
    counts = (
        prefix.lengths
        if prefix.lengths is None
        else read_counts("the prefix's lengths", prefix.lengths, (sequences,), query, capacity)
    )
    if table is not None and counts is not None:
        _check_pages(table, counts, keys)
    return keys, values, counts, table


def _check_pages(table: Tensor, counts: Tensor, keys: Tensor) -> None:
    if not _readable(table) or _within(table, keys.shape[0] - 1):  # most often also behind a sequence's last key
        return
    used = torch.arange(table.shape[1]) * keys.shape[2] < counts[:, None]
    if (used & ((table < 0) | (table >= keys.shape[0]))).any():
        raise ValueError(f"table must hold pages from 0 to {keys.shape[0] - 1} for every key of a prefix, got {table}")


def _readable(tensor: Tensor) -> bool:
    """Whether looking at values costs nothing: on a GPU it would synchronise; under vmap there is no one value."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return tensor.device.type == "cpu"


def _within(values: Tensor, most: int) -> bool:
    """Whether all are from 0 to ``most``; one call, because torch's overhead is what this costs."""
    if values.numel() == 0:
        return True
    low, high = values.aminmax()
    return int(low) >= 0 and int(high) <= most


def read_counts(name: str, value: Tensor, shape: tuple[int, ...], query: Tensor, most: int | None) -> Tensor:
    """An int32 tensor of this shape, with values from 0 to ``most``."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    if value.device != query.device:
        raise ValueError(f"{name} must be on {query.device}, as query is, got {value.device}")
    if most is not None and _readable(value) and not _within(value, most):
        raise ValueError(f"{name} must be from 0 to {most}, got {value.tolist()}")
    return value.to(torch.int32).contiguous()


def _cu_seqlens(packed: Packed, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, int]:
    if query.shape[0] != 1:
        raise ValueError(f"packed sequences are [1, heads, total, head_dim], got query {tuple(query.shape)}")
    if packed.cu_seqlens.ndim != 1 or not packed.cu_seqlens.numel():
        raise ValueError(f"cu_seqlens must be [sequences + 1], got shape {tuple(packed.cu_seqlens.shape)}")
    shape = tuple(packed.cu_seqlens.shape)
    read = read_counts("cu_seqlens", packed.cu_seqlens, shape, query, query.shape[2])
    given = packed.cu_seqlens if packed.cu_seqlens_k is None else packed.cu_seqlens_k
    read_k = read if given is packed.cu_seqlens else read_counts("cu_seqlens_k", given, shape, query, key.shape[2])
    for name, values, total in (("cu_seqlens", read, query.shape[2]), ("cu_seqlens_k", read_k, key.shape[2])):
        if _readable(values) and (values[0] != 0 or values[-1] != total or (values.diff() < 0).any()):
            raise ValueError(f"{name} must rise from 0 to {total}, got {values.tolist()}")
    longest = query.shape[2] if packed.max_length is None else packed.max_length
    if _readable(read) and len(read) > 1 and int(read.diff().max()) > longest:
        raise ValueError(f"max_length must be at least {int(read.diff().max())}, got {longest}")
    return read, read_k, longest


def _dense_mask(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if mask.dtype not in (torch.bool, query.dtype, torch.float32):
        raise TypeError(f"a mask must be bool, float32 or {query.dtype}, got {mask.dtype}")
    if mask.device != query.device:
        raise ValueError(f"the mask must be on {query.device}, as query is, got {mask.device}")
    try:
        return mask.expand(shape)
    except RuntimeError:
        raise ValueError(f"the mask must broadcast to {shape}, got {tuple(mask.shape)}") from None


def read_visible(mask: AttentionMask, query: Tensor, sequences: int) -> VisibleKeys:
    """The rule of a mask object."""
    try:
        visible = mask.visible_keys()
    except AttributeError:
        raise TypeError(f"mask must be a tensor or a mask object, got {type(mask).__name__}") from None
    if (chosen := visible.chosen) is not None and (
        chosen.dtype != torch.bool or tuple(chosen.shape) != (sequences,) or chosen.device != query.device
    ):
        raise ValueError(
            f"chosen must be [{sequences}] bool on {query.device}, got {tuple(chosen.shape)} {chosen.dtype} on "
            f"{chosen.device}"
        )
    return visible if visible.chosen is None else visible._replace(chosen=visible.chosen.contiguous())


def _number(name: str, value: float, *, positive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not math.isfinite(value) or (positive and value <= 0):
        raise ValueError(f"{name} must be finite{' and above 0' if positive else ''}, got {value}")
    return float(value)
