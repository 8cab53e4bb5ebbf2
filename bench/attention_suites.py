"""``attention`` of three kinds of shapes: squares, a canvas behind its prefix, and the prefill of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench import optional_peers
from bench.check import WrongAnswerError
from bench.comparison import Comparison
from bench.inputs import backends, dtype_name
from bench.scope import Scope
from diffusion_runtime import ops


class Layer(NamedTuple):
    """An attention layer of a released model."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None  # keys of the prefix that a canvas sees


LAYERS = (
    Layer("LLaDA-8B", 32, 32, 128),
    Layer("Dream-7B", 28, 4, 128),
    Layer("LLaDA2-mini", 16, 4, 128),
    Layer("DiffusionGemma sliding", 16, 8, 256, window=1023),
    Layer("DiffusionGemma global", 16, 2, 512),
)
# by device: tokens and heads of a square; queries and prefixes of a canvas; tokens of a prefill
SQUARES = {
    "cpu": ((1024, 8), (4096, 4)),
    "cuda": ((1024, 64), (4096, 32), (8192, 16), (16384, 8)),
}
CANVASES = {
    "cpu": ((32, 1024), (32, 4096), (256, 1024), (256, 4096)),
    "cuda": tuple((length, prefix) for length in (32, 64, 256) for prefix in (1024, 8192, 32768)),
}
PREFILL = 4096
HEAD_DIMS = (128, 64, 256, 512)
CUDA_SDPA = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
Attend = Callable[[], Tensor]


def square(scope: Scope) -> Iterator[Comparison]:
    """Every query sees every key, as many of them: heads of 64, 128, 256 and 512."""
    device = scope.device
    for dtype, dim, (length, heads) in _grid(scope, HEAD_DIMS, SQUARES[device.type]):
        query, key, value = (_noise(i, 1, heads, length, dim, device=device, dtype=dtype) for i in range(3))
        yield Comparison(
            f"Square attention, {dtype_name(dtype)}",
            f"{heads} heads of {dim}, {length} tokens",
            (ours := _ours(device, dtype, query, key, value)),
            _dense_peers(device, query, key, value) | (others := optional_peers.attention(query, key, value)),
            partial(_check, ours | others, query, key, value, None),
            {"the products": _products(heads, length, length, dim, device, dtype)},
            flop=4.0 * heads * length * length * dim,
        )


def canvas(scope: Scope) -> Iterator[Comparison]:
    """A canvas that sees a decided prefix and itself, beside joining them first, as libraries do."""
    device = scope.device
    for dtype, layer, (length, before) in _grid(scope, LAYERS, CANVASES[device.type]):
        yield behind_prefix(device, dtype, layer, length, before)


def behind_prefix(device: torch.device, dtype: torch.dtype, layer: Layer, length: int, before: int) -> Comparison:
    """So many queries and their keys, behind so many keys."""
    heads, kv_heads, dim = layer.heads, layer.kv_heads, layer.head_dim
    query = _noise(0, 1, heads, length, dim, device=device, dtype=dtype)
    key, value = (_noise(i, 1, kv_heads, length, dim, device=device, dtype=dtype) for i in (1, 2))
    decided = [_noise(i, 1, kv_heads, before, dim, device=device, dtype=dtype) for i in (3, 4)]
    mask = None if layer.window is None else ops.PrefixWindow(layer.window)
    ours = _ours(device, dtype, query, key, value, prefix=ops.Prefix(*decided), mask=mask)
    seen = [x[:, :, -layer.window :] for x in decided] if layer.window else decided
    keys, values = torch.cat((seen[0], key), 2), torch.cat((seen[1], value), 2)
    num_keys = keys.shape[2]
    return Comparison(
        f"A canvas and its prefix, {layer.name}, {dtype_name(dtype)}",
        f"{length} queries, prefix {before}",
        ours,
        {
            "cat + SDPA": partial(_joined, query, key, value, seen, repeat=False),
            "cat + repeat + SDPA": partial(_joined, query, key, value, seen, repeat=True),
        },
        partial(_check, ours, query, keys, values, None),
        {
            "a read of the keys": partial(_read, keys, values),
            "the products": _products(heads, length, num_keys, dim, device, dtype),
        },
        flop=4.0 * heads * length * num_keys * dim,
    )


def prefill(scope: Scope) -> Iterator[Comparison]:
    """A prompt of several blocks, each of which sees itself and those before."""
    from torch.nn.attention.flex_attention import create_block_mask

    device = scope.device
    for dtype, layer, length in _grid(scope, LAYERS[:3], (PREFILL,)):
        query = _noise(0, 1, layer.heads, length, layer.head_dim, device=device, dtype=dtype)
        key, value = (_noise(i, 1, layer.kv_heads, length, layer.head_dim, device=device, dtype=dtype) for i in (1, 2))
        block = torch.arange(length, device=device) // 32
        mask = block[:, None] >= block
        blocks = create_block_mask(lambda b, h, q, k: q // 32 >= k // 32, None, None, length, length, device=device)
        flex = partial(_flex(), query, key, value, block_mask=blocks, enable_gqa=True)
        ours = _ours(device, dtype, query, key, value, mask=ops.BlockCausal(32))
        yield Comparison(
            f"Block-causal prefill, blocks of 32, {dtype_name(dtype)}",
            f"{layer.name}, {length} tokens",
            ours,
            {
                "SDPA with a mask": partial(sdpa, query, key, value, attn_mask=mask, enable_gqa=True),
            }
            | ({} if scope.level == "quick" else {"FlexAttention": flex}),
            partial(_check, ours, query, key, value, mask),
            flop=4.0 * layer.heads * layer.head_dim * float(mask.sum()),
        )


def _grid(scope: Scope, first: Any, second: Any) -> Iterator[tuple[torch.dtype, Any, Any]]:
    """On a GPU nobody attends in float32."""
    dtypes = scope.torch_dtypes() if scope.device.type == "cpu" else [torch.bfloat16]
    return product(dtypes, scope.some(first), scope.some(second))


def _ours(device: torch.device, dtype: torch.dtype, *tensors: Tensor, **kwargs: Any) -> dict[str, Attend]:
    names = backends("attention", device, dtype)
    return {name: partial(ops.attention, *tensors, backend=name, **kwargs) for name in names}


def _dense_peers(device: torch.device, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Attend]:
    """Compiling FlexAttention for each shape takes longer on a CPU than everything else, and its code is slower."""
    if device.type == "cpu":
        return {"SDPA": partial(sdpa, query, key, value)}
    peers: dict[str, Attend] = {"FlexAttention": partial(_flex(), query, key, value)}
    if query.shape[-1] > 256:  # beyond what cuDNN and flash take
        return peers | {"SDPA": partial(sdpa, query, key, value)}
    return peers | {f"SDPA {name}": partial(_with, which, query, key, value) for name, which in CUDA_SDPA.items()}


def _with(which: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(which):
        return sdpa(query, key, value)


@cache
def _flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _joined(query: Tensor, key: Tensor, value: Tensor, prefix: list[Tensor], repeat: bool) -> Tensor:
    """What a library does in every step; ``repeat`` as transformers' eager and sdpa paths for old checkpoints."""
    keys, values = torch.cat((prefix[0], key), 2), torch.cat((prefix[1], value), 2)
    if repeat:
        group = query.shape[1] // key.shape[1]
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    return sdpa(query, keys, values, enable_gqa=not repeat)


def _products(heads: int, length: int, num_keys: int, dim: int, device: torch.device, dtype: torch.dtype) -> Attend:
    """As many operations in products of matrices that are as good as they get, by torch."""
    side = 4096 if device.type == "cuda" else 1024
    rows = max(1, round(2 * heads * length * num_keys * dim / side**2))
    a, b = torch.randn(rows, side, device=device).to(dtype), torch.randn(side, side, device=device).to(dtype)
    return partial(torch.mm, a, b)


def _read(*tensors: Tensor) -> Tensor:
    return torch.stack([x.view(-1).view(torch.int32).amax() for x in tensors])


def _check(ours: Mapping[str, Attend], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    rows = slice(-8, None)  # those that see most
    group = query.shape[1] // key.shape[1]
    keys, values = (x.double().cpu().repeat_interleave(group, 1) for x in (key, value))
    seen = None if mask is None else mask[rows].cpu()
    truth = sdpa(query[:, :, rows].double().cpu(), keys, values, attn_mask=seen)
    tolerance = 1e-5 if query.dtype == torch.float32 else 2e-2
    for name, call in ours.items():
        error = (call()[:, :, rows].double().cpu() - truth).abs().max() / truth.abs().max()
        if error > tolerance:
            raise WrongAnswerError(f"{name} is not timed, its attention is off by {error:.1e}")


def _noise(seed: int, *shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device).to(dtype)
