"""A checked call of ``qk_norm_rope``, and its reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_runtime.ops import _norm_backends
from diffusion_runtime.ops._registry import Implementation, OpSpec, triton_devices
from diffusion_runtime.ops._rms_norm import Norm, rms_norm_backward, weighted
from diffusion_runtime.ops._sample_tokens import FLOATS

STYLES = ("half", "interleaved", "proportional")  # numbered as in csrc/include/norm_binding.h


class QKNormRope(NamedTuple):
    """The arguments of a call, as backends and the operators of ``_norm_library.py`` take them."""

    query: Tensor  # [batch, heads, length, head_dim]
    key: Tensor  # [batch, kv_heads, length, head_dim]
    value: Tensor | None  # the shape of key; with the caches only
    cos: Tensor  # [batch or 1, rows, pairs]
    sin: Tensor
    query_weight: Tensor | None  # [head_dim]
    key_weight: Tensor | None
    positions: Tensor | None  # [batch, length] int64: rows of cos and sin
    cache_key: Tensor | None  # [batch, kv_heads, capacity, head_dim]
    cache_value: Tensor | None
    cache_positions: Tensor | None  # [batch, length] int64: rows of the caches
    normalized: bool
    eps: float
    weight_offset: float
    round_before_weight: bool
    style: int  # of STYLES

    @property
    def norm(self) -> Norm:
        return Norm(self.eps, self.weight_offset, self.round_before_weight)

    def outputs(self) -> tuple[Tensor, Tensor | None]:
        """Memory for the query and, without a cache, the key: each dense as ``[batch, length, heads, head_dim]``."""

        def like(x: Tensor) -> Tensor:
            batch, heads, length, head_dim = x.shape
            return torch.empty(batch, length, heads, head_dim, dtype=x.dtype, device=x.device).transpose(1, 2)

        return like(self.query), like(self.key) if self.cache_key is None else None

    def for_kernels(self) -> QKNormRope:
        """Tables in float32 that are laid out alike, weights that kernels read, elements of a head next to another."""
        query, key = _dense_rows(self.query), _dense_rows(self.key)
        value = None if self.value is None else _dense_rows(self.value)
        cos, sin = (_dense_rows(x.float()) for x in (self.cos, self.sin))
        if cos.stride() != sin.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
        weights = [_norm_backends.weight_of(x, query) for x in (self.query_weight, self.key_weight)]
        if len({x.dtype for x in weights if x is not None}) > 1:
            weights = [None if x is None else x.float() for x in weights]
        return self._replace(
            query=query, key=key, value=value, cos=cos, sin=sin, query_weight=weights[0], key_weight=weights[1]
        )

    def check_places(self) -> None:
        """On a CPU, where looking costs nothing, rows that do not exist are errors. The C++ kernel looks itself."""
        if self.cache_key is not None:
            _check_places("cache_positions", self.cache_positions, self.cache_key.shape[2])
        _check_places("positions", self.positions, self.cos.shape[1])


Run = Callable[[QKNormRope], tuple[Tensor, Tensor | None]]


def run_qk_norm_rope(problem: QKNormRope, backend: str | None) -> tuple[Tensor, Tensor | None]:
    run: Run = SPEC.resolve(problem.query.device.type, problem.query.dtype, backend)
    return run(problem)


def reference(problem: QKNormRope) -> tuple[Tensor, Tensor | None]:
    problem.check_places()
    query, key = (
        _rotated(x, weight, problem)
        for x, weight in ((problem.query, problem.query_weight), (problem.key, problem.key_weight))
    )
    out = problem.outputs()[0].copy_(query)
    if problem.cache_key is None:
        return out, _like_outputs(key)
    assert problem.cache_value is not None
    assert problem.value is not None
    assert problem.cache_positions is not None
    batch = torch.arange(len(key), device=key.device)[:, None]
    for cache, new in ((problem.cache_key, key), (problem.cache_value, problem.value)):
        # [batch, capacity, kv_heads, head_dim], so that the indices are of neighbouring dimensions
        cache.transpose(1, 2)[batch, problem.cache_positions] = new.transpose(1, 2).to(cache.dtype)
    return out, None


def backward(
    problem: QKNormRope, grad_query: Tensor, grad_key: Tensor, for_weights: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key and their weights, for every backend: the rotation backwards, then that of the norm."""
    found = []
    for grad, x, weight, for_weight in (
        (grad_query, problem.query, problem.query_weight, for_weights[0]),
        (grad_key, problem.key, problem.key_weight, for_weights[1]),
    ):
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        cos, sin = rotation(problem, wide.dtype)
        turned = rotate(wide, cos, -sin, STYLES[problem.style])
        if problem.normalized:
            found.append(rms_norm_backward(turned, x, weight, problem.norm, for_weight=for_weight))
        else:
            found.append((turned.to(x.dtype), None))
    (query, query_weight), (key, key_weight) = found
    return query, key, query_weight, key_weight


def rotation(problem: QKNormRope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[batch or 1, 1, length, pairs]`` of the positions."""
    tables = [problem.cos, problem.sin]
    if problem.positions is not None:
        batch = torch.arange(len(problem.query), device=problem.query.device)[:, None]
        tables = [x.expand(len(problem.query), -1, -1)[batch, problem.positions] for x in tables]
    cos, sin = (x[:, None].to(dtype) for x in tables)
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor, style: str) -> Tensor:
    """Turn pairs of elements of the last dimension; those that are in no pair stay.

    Args:
        x: ``[..., head_dim]``.
        cos, sin: ``[..., pairs]``, broadcastable to the leading shape.
        style: one of :data:`STYLES`: which elements make a pair.
    """
    pairs = cos.shape[-1]
    if style == "interleaved":
        first, second = x[..., : 2 * pairs].unflatten(-1, (pairs, 2)).unbind(-1)
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
        return torch.cat((turned, x[..., 2 * pairs :]), -1)
    distance = x.shape[-1] // 2 if style == "proportional" else pairs
    first, second = x[..., :pairs], x[..., distance : distance + pairs]
    between, behind = x[..., pairs:distance], x[..., distance + pairs :]
    return torch.cat((first * cos - second * sin, between, second * cos + first * sin, behind), -1)


def _rotated(x: Tensor, weight: Tensor | None, problem: QKNormRope) -> Tensor:
    """Normalised and rotated, in the dtype of ``x``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if problem.normalized:
        normed = weighted(x, weight, problem.norm)[0]
        wide = normed.to(x.dtype).to(normed.dtype) if problem.round_before_weight else normed
    return rotate(wide, *rotation(problem, wide.dtype), STYLES[problem.style]).to(x.dtype)


def _like_outputs(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def _check_places(name: str, places: Tensor | None, end: int) -> None:
    if places is None or places.device.type != "cpu" or not places.numel():
        return
    lowest, highest = (int(x) for x in places.aminmax())
    if lowest < 0 or highest >= end:
        raise ValueError(f"{name} must be from 0 to {end - 1}, got {lowest if lowest < 0 else highest}")


def _validate(*_: Any) -> None:
    """What a call may be is checked where it is read, in ``_qk_norm_rope.py``."""


SPEC = OpSpec(
    name="qk_norm_rope",
    reference=reference,
    validate=_validate,
    implementations=(
        Implementation("cuda", frozenset({"cuda"}), FLOATS, _norm_backends.load_qk_norm_rope_cuda),
        Implementation("cpp", frozenset({"cpu"}), FLOATS, _norm_backends.load_qk_norm_rope_cpp),
        Implementation("triton", triton_devices(), FLOATS, _norm_backends.load_qk_norm_rope_triton),
    ),
)
