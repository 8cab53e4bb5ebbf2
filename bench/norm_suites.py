"""The neighbours of attention: ``rms_norm`` and ``qk_norm_rope``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from bench import optional_peers
from bench.check import WrongAnswerError
from bench.comparison import Comparison
from bench.inputs import backends, dtype_name, noise
from bench.scope import Scope
from diffusion_runtime import ops

NORMS = ((32, 4096), (256, 4096), (256, 2816), (256 * 16, 128))  # rows, size
HEADS = ((64, 32, 8, 128), (256, 32, 8, 128), (256, 16, 8, 256))  # length, heads, kv_heads, head_dim
EPS = 1e-6


def rms_norm(scope: Scope) -> Iterator[Comparison]:
    """``rms_norm`` beside torch's own, and beside the steps that Llama's module takes."""
    for dtype, (rows, size) in product(scope.torch_dtypes(), scope.some(NORMS)):
        x, weight = noise(rows, size, scope.device, dtype), noise(1, size, scope.device, dtype)[0]
        for case, rounded in (("rounded once", False), ("rounded before the weight", True)):
            call = partial(ops.rms_norm, x, weight, eps=EPS, round_before_weight=rounded)
            calls = {name: partial(call, backend=name) for name in backends("rms_norm", scope.device, dtype)}
            peers: dict[str, Callable[[], Tensor]] = {"Llama's steps": partial(_llama, x, weight)}
            if rounded:
                peers |= optional_peers.rms_norm(x, weight, EPS)
            else:
                peers["torch"] = partial(functional.rms_norm, x, (size,), weight, EPS)
            exact = partial(ops.rms_norm, x.double(), weight.double(), eps=EPS, backend="reference")
            yield Comparison(
                f"rms_norm {case}, {dtype_name(dtype)}",
                f"[{rows}, {size}]",
                calls,
                peers,
                partial(_check, calls, exact, dtype),
                {"a copy": x.clone},
                num_bytes=2.0 * x.numel() * x.element_size(),
            )


def qk_norm_rope(scope: Scope) -> Iterator[Comparison]:
    """``qk_norm_rope`` with its cache, beside the norms, the rotation and the two copies that it replaces."""
    for dtype, (length, heads, kv_heads, head_dim) in product(scope.torch_dtypes(), scope.some(HEADS)):
        query, key, value = (
            noise(length, n * head_dim, scope.device, dtype).view(1, length, n, head_dim).transpose(1, 2)
            for n in (heads, kv_heads, kv_heads)
        )
        weight = noise(1, head_dim, scope.device, dtype)[0]
        angle = noise(length, head_dim // 2, scope.device, torch.float32)
        cos, sin = angle.cos(), angle.sin()
        cache = torch.zeros(2, 1, kv_heads, 2 * length, head_dim, dtype=dtype, device=scope.device)
        slots = torch.arange(length, device=scope.device) + length // 2
        tensors = (query, key, value, cos, sin)
        call = partial(ops.qk_norm_rope, *tensors, eps=EPS, query_weight=weight, key_weight=weight)
        cached = partial(call, cache_key=cache[0], cache_value=cache[1], cache_positions=slots)
        calls = {name: partial(cached, backend=name) for name in backends("qk_norm_rope", scope.device, dtype)}
        wide = [x.double() for x in (query, key, cos, sin, weight)]
        exact = partial(
            ops.qk_norm_rope, *wide[:2], None, *wide[2:4],
            eps=EPS, query_weight=wide[4], key_weight=wide[4], backend="reference",
        )  # fmt: skip
        queries = {name: partial(_first, call) for name, call in calls.items()}
        yield Comparison(
            f"qk_norm_rope: norm, rotation, cache, {dtype_name(dtype)}",
            f"{length} tokens, {heads} and {kv_heads} heads of {head_dim}",
            calls,
            {"torch": partial(_torch_rope, *tensors, weight, cache, slots)},
            partial(_check, queries, partial(_first, exact), dtype),
            {"a copy": lambda q=query, k=key, v=value: (q.clone(), k.clone(), v.clone())},  # type: ignore[misc]
        )


def _first(call: Callable[[], tuple[Tensor, Tensor | None]]) -> Tensor:
    return call()[0]


def _llama(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _torch_rope(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, weight: Tensor, cache: Tensor, slots: Tensor
) -> Tensor:
    """torch's fused norm, the rotation as published models write it, and writes by index."""
    query, key = (functional.rms_norm(x, weight.shape, weight, EPS) for x in (query, key))
    cos, sin = (torch.cat((x, x), -1).to(query.dtype) for x in (cos, sin))
    query, key = (x * cos + torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1) * sin for x in (query, key))
    cache[0][:, :, slots], cache[1][:, :, slots] = key, value
    return query


def _check(calls: Mapping[str, Callable[[], Tensor]], exact: Callable[[], Tensor], dtype: torch.dtype) -> None:
    truth = exact()
    for name, call in calls.items():
        error = (call().double() - truth).abs().max() / truth.abs().max()
        if not error <= 2 * torch.finfo(dtype).eps:
            raise WrongAnswerError(f"{name} is not timed, it is off by {error:.1e} of the largest")
