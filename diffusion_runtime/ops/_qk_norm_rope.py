"""The neighbours of attention in one pass: norm and rotary embedding of queries and keys, and the write to a cache."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from diffusion_runtime.ops._qk_norm_rope_problem import STYLES, QKNormRope, run_qk_norm_rope
from diffusion_runtime.ops._rms_norm import check_weight, read_norm
from diffusion_runtime.ops._torch_is_watching import torch_is_watching, wants_gradients

Style = Literal["half", "interleaved", "proportional"]


@overload
def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    value: None,
    cos: Tensor,
    sin: Tensor,
    *,
    query_weight: Tensor | None = ...,
    key_weight: Tensor | None = ...,
    eps: float | None = ...,
    weight_offset: float = ...,
    round_before_weight: bool = ...,
    style: Style = ...,
    rotary_dim: int | None = ...,
    positions: Tensor | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    query_weight: Tensor | None = ...,
    key_weight: Tensor | None = ...,
    eps: float | None = ...,
    weight_offset: float = ...,
    round_before_weight: bool = ...,
    style: Style = ...,
    rotary_dim: int | None = ...,
    positions: Tensor | None = ...,
    cache_key: Tensor,
    cache_value: Tensor,
    cache_positions: Tensor,
    backend: str | None = ...,
) -> tuple[Tensor, None]: ...
def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    eps: float | None = None,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    style: Style = "half",
    rotary_dim: int | None = None,
    positions: Tensor | None = None,
    cache_key: Tensor | None = None,
    cache_value: Tensor | None = None,
    cache_positions: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Normalise each head of ``query`` and ``key``, rotate it by its position, and put keys and values into a cache.

    In float32 throughout, rounded once at the end, which is closer to the exact result than the published models: in 16
    bits they round the norm, both products of the rotation and their sum. With ``round_before_weight`` the norm is
    rounded as theirs is, before and after its weight, and what follows is in float32 again.

    A pair ``(a, b)`` of elements becomes ``(a cos - b sin, b cos + a sin)``. Which elements are pairs (``style``), of
    the first ``rotary_dim`` where it is less than ``head_dim``:

    * ``"half"``: ``i`` and ``i + rotary_dim / 2``, as GPT-NeoX, Llama, Qwen, LLaDA, Dream and SDAR have it;
    * ``"interleaved"``: ``2 i`` and ``2 i + 1``, as GPT-J and RoFormer (Su et al., 2021) have it;
    * ``"proportional"``: ``i`` and ``i + head_dim / 2`` for ``i < rotary_dim / 2``, as in the global layers of Gemma 4
      and DiffusionGemma, where 128 of 512 elements rotate: 0 to 63 with 256 to 319.

    Without a cache it is differentiable in query, key and their weights. Each row's result depends on that row alone,
    to the bit.

    Args:
        query: ``[batch, heads, length, head_dim]``; a view of ``[batch, length, heads, head_dim]``, or any other
            strides, is not copied if ``head_dim`` is contiguous.
        key: ``[batch, kv_heads, length, head_dim]`` in the dtype of ``query``.
        value: the shape and dtype of ``key``, to be written to ``cache_value`` as it is; None without a cache.
        cos, sin: ``[rows, rotary_dim / 2]`` or ``[batch, rows, rotary_dim / 2]``, one row for each position, as
            ``nn.rotary_table`` makes them. Kernels read float32; others are widened, which is a copy. transformers
            repeats its tables: give the first half of the columns, which for ``"proportional"`` are followed by angles
            of 0.
        query_weight, key_weight: ``[head_dim]`` of any floating dtype, or None for 1; they need ``eps``.
        eps: as in :func:`diffusion_runtime.ops.rms_norm`; None: nothing is normalised.
        weight_offset, round_before_weight: as there.
        style: which elements are pairs.
        rotary_dim: even; None for ``head_dim``. The other elements are normalised only.
        positions: ``[length]`` or ``[batch, length]`` int64, the row of ``cos`` and ``sin`` for each row of the query;
            None: row ``i`` for row ``i``, and there must be ``length`` of them.
        cache_key, cache_value: ``[batch, kv_heads, capacity, head_dim]`` in the dtype of ``key``, any strides with
            ``head_dim`` contiguous. **Written in place.** They may not overlap the other arguments.
        cache_positions: ``[length]`` or ``[batch, length]`` int64, the row of the caches that each new row goes to.
            Where two rows go to the same place, which of them stays is not said.
        backend: ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``; None picks the fastest that can run.

    Returns:
        the query and the key, new tensors of the shapes and dtype of the inputs, in memory as ``[batch, length, heads,
        head_dim]``. With a cache the key is written there only, and None is returned in its place.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; a part of the cache's arguments;
            gradients wanted with a cache, or of ``cos`` and ``sin``; on a CPU, positions behind the tables or slots
            outside of the cache, before anything is written. On a GPU, where looking would synchronise, kernels make
            rows at such positions NaN and do not write rows for such slots.
        BackendUnavailableError: a named backend that cannot run this call.
    """
    _check_heads(query, key)
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, got {style!r}")
    has_weight = query_weight is not None or key_weight is not None
    if eps is None and has_weight:
        raise ValueError("query_weight and key_weight need eps: without it nothing is normalised")
    norm = read_norm(0.0 if eps is None else eps, weight_offset, round_before_weight, has_weight=has_weight)
    for name, weight in (("query_weight", query_weight), ("key_weight", key_weight)):
        if weight is not None:
            check_weight(name, weight, query)
    cos, sin = (_table(name, x, query, rotary_dim, positions) for name, x in (("cos", cos), ("sin", sin)))
    _check_cache(key, value, cache_key, cache_value, cache_positions)
    problem = QKNormRope(
        query, key, value, cos, sin, query_weight, key_weight, _places("positions", positions, query),
        cache_key, cache_value, _places("cache_positions", cache_positions, query), eps is not None, *norm,
        STYLES.index(style),
    )  # fmt: skip
    if wants_gradients(cos, sin):
        raise ValueError("cos and sin take no gradients: detach them")
    floats = (query, key, value, query_weight, key_weight, cache_key, cache_value)
    if cache_key is not None and wants_gradients(*floats):
        raise ValueError("there are no gradients through a cache: use torch.no_grad(), or leave the cache out")
    if not torch_is_watching(*floats):
        return run_qk_norm_rope(problem, backend)
    if cache_key is not None:
        return torch.ops.diffusion_runtime.qk_norm_rope_into_cache(*problem, backend or "auto"), None
    rotated: tuple[Tensor, Tensor] = torch.ops.diffusion_runtime.qk_norm_rope(*problem, backend or "auto")
    return rotated


def _check_heads(query: Tensor, key: Tensor) -> None:
    for name, x in (("query", query), ("key", key)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if query.ndim != 4 or key.ndim != 4 or (query.shape[0], *query.shape[2:]) != (key.shape[0], *key.shape[2:]):
        raise ValueError(
            "query must be [batch, heads, length, head_dim] and key [batch, kv_heads, length, head_dim], "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    _check_like("key", key, query, key.shape)


def _check_like(name: str, x: Tensor, beside: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(x, Tensor) or x.dtype != beside.dtype:
        raise TypeError(f"{name} must be {beside.dtype}, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.shape != torch.Size(shape) or x.device != beside.device:
        raise ValueError(f"{name} must be {tuple(shape)} on {beside.device}, got {tuple(x.shape)} on {x.device}")


def _table(name: str, table: Tensor, query: Tensor, rotary_dim: int | None, positions: Tensor | None) -> Tensor:
    """``[batch or 1, rows, pairs]``."""
    batch, _, length, head_dim = query.shape
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    if rotary_dim % 2 or not 0 <= rotary_dim <= head_dim or (head_dim % 2 and rotary_dim == head_dim):
        raise ValueError(f"rotary_dim must be even and from 0 to {head_dim}, the size of a head, got {rotary_dim}")
    if not isinstance(table, Tensor) or not table.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {getattr(table, 'dtype', type(table).__name__)}")
    rows = length if positions is None else "rows"
    leading = table.shape[:-2]
    fits = table.ndim in (2, 3) and table.shape[-1] * 2 == rotary_dim and leading in ((), (1,), (batch,))
    if not fits or (positions is None and table.shape[-2] != length) or table.device != query.device:
        raise ValueError(
            f"{name} must be [{rows}, {rotary_dim // 2}] or [{batch}, {rows}, {rotary_dim // 2}] on {query.device}, "
            f"got {tuple(table.shape)} on {table.device}"
        )
    return table if table.ndim == 3 else table[None]


def _places(name: str, places: Tensor | None, query: Tensor) -> Tensor | None:
    if places is None:
        return None
    if not isinstance(places, Tensor) or places.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, got {getattr(places, 'dtype', type(places).__name__)}")
    batch, _, length, _ = query.shape
    if places.shape not in ((length,), (batch, length)) or places.device != query.device:
        raise ValueError(
            f"{name} must be ({length},) or ({batch}, {length}) on {query.device}, "
            f"got {tuple(places.shape)} on {places.device}"
        )
    return places.expand(batch, length)


def _check_cache(
    key: Tensor,
    value: Tensor | None,
    cache_key: Tensor | None,
    cache_value: Tensor | None,
    cache_positions: Tensor | None,
) -> None:
    given = {"value": value, "cache_key": cache_key, "cache_value": cache_value, "cache_positions": cache_positions}
    missing = [name for name, x in given.items() if x is None]
    if len(missing) == len(given):
        return
    if value is None or cache_key is None or cache_value is None or cache_positions is None:
        raise ValueError(f"{', '.join(given)} come together, for a cache: {', '.join(missing)} is missing")
    _check_like("value", value, key, key.shape)
    capacity = cache_key.shape[2] if isinstance(cache_key, Tensor) and cache_key.ndim == 4 else 0
    for name, cache in (("cache_key", cache_key), ("cache_value", cache_value)):
        _check_like(name, cache, key, (*key.shape[:2], capacity, key.shape[3]))
        if cache.shape[3] > 1 and cache.stride(3) != 1:
            raise ValueError(f"{name} must have stride 1 along head_dim, got strides {cache.stride()}")
