"""What the launches of attention's kernels share: an ``AttentionProblem`` as the arguments that they have in common."""

from __future__ import annotations

from typing import Any

import torch
import triton
from diffusion_runtime.kernels._attention_rows import smaller
from torch import Tensor

INTERPRETED = not isinstance(smaller, triton.JITFunction)
COUNTS = ["length", "num_keys", "capacity", "left", "right", "block", "prefix_window", "offset", "tiles", "max_pages"]
_NAMES = ("query", "key", "value", "prefix_key", "prefix_value")
INTEGERS = ("prefix_lengths", "page_table", "key_starts", "key_ends", "cu_seqlens", "cu_seqlens_k")


def tensor_strides(name: str, x: Tensor | None) -> dict[str, int]:
    """The strides of [batch, heads, rows, dim], without the last, which is 1."""
    strides = (0, 0, 0) if x is None else x.stride()[:3]
    return {f"{name}_{kind}": stride for kind, stride in zip(("batch", "head", "row"), strides, strict=True)}


def problem_arguments(problem: Any) -> dict[str, Any]:
    """Arguments by name."""
    query, key, visible, mask = problem.query, problem.key, problem.visible, problem.dense_mask
    tensors = {name: getattr(problem, name) for name in (*_NAMES, *INTEGERS)}
    if problem.prefix_key is None:  # none of it is read: its length is 0
        tensors |= {"prefix_key": key, "prefix_value": problem.value}
    arguments: dict[str, Any] = {f"{name}_ptr": x for name, x in tensors.items()}
    for name in _NAMES:
        arguments |= tensor_strides(name, tensors[name])
    arguments |= tensor_strides("mask", mask)
    # otherwise the largest product has the largest score
    finishes = bool(problem.softcap) or mask is not None or problem.scale <= 0
    return arguments | {
        "mask_ptr": mask,
        "mask_column": 0 if mask is None else mask.stride(3),
        "chosen_ptr": visible.chosen,
        "length": query.shape[2],
        "num_keys": key.shape[2],
        "capacity": problem.prefix_capacity,
        "heads": query.shape[1],
        "kv_heads": key.shape[1],
        "head_dim": query.shape[3],
        "value_dim": problem.value.shape[3],
        "left": visible.left,
        "right": visible.right,
        "block": visible.block,
        "prefix_window": visible.prefix_window,
        "offset": visible.offset,
        "page_size": 1 if problem.page_table is None else problem.prefix_key.shape[2],
        "max_pages": 0 if problem.page_table is None else problem.page_table.shape[1],
        "scale": problem.scale,
        "softcap": problem.softcap or None,
        "BOUNDED": visible.left >= 0 or visible.right >= 0 or visible.prefix_window >= 0,
        "FINISHES": finishes,
        "DENSE": 0 if mask is None else 1 if mask.dtype == torch.bool else 2,
    }


def capability_of(device: torch.device) -> int:
    """80, 90 and so on; 0 where there is none."""
    return 10 * torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def launch_config(head_dim: int, value_dim: int, dtype: torch.dtype, finishes: bool, capability: int) -> dict[str, Any]:
    """By what every request of a batch has in common: all else that decided would change bits."""
    dim, value = (max(16, triton.next_power_of_2(size)) for size in (head_dim, value_dim))
    widest, hopper = max(dim, value), capability >= 90
    if INTERPRETED:
        rows, keys, chunk, warps, stages = 64, 32, 3, 4, 1
    elif dtype == torch.float32:
        rows, keys, chunk, warps, stages = (32, 32, 32, 8, 2) if widest <= 128 else (16, 32, 32, 8, 1)
        if widest > 256:
            keys, chunk = 16, 64
    elif widest <= 128 and hopper:
        rows, keys, chunk, warps, stages = 64 if finishes else 128, 64, 16, 8, 3
    elif widest <= 128:
        rows, keys, chunk, warps, stages = 64, 32 if finishes else 64, 16, 8, 3
    elif widest <= 256:
        rows, keys, chunk, warps, stages = 64, 32, 32, 8, 3 if hopper else 2
    else:
        rows, keys, chunk, warps, stages = 64 if hopper else 32, 32, 64, 8, 2
    return {
        "BLOCK_ROWS": rows,
        "BLOCK_KEYS": keys,
        "CHUNK": chunk,
        "BLOCK_DIM": dim,
        "BLOCK_VALUE": value,
        "WIDTH": 32 if value > (128 if finishes or dtype == torch.float32 else 256) else value,
        "WHOLE_DIM": dim == head_dim,
        "WHOLE_VALUE": value == value_dim,
        "num_warps": warps,
        "num_stages": stages,
        "enable_fp_fusion": False,  # a part must have the same bits wherever the compiler puts it
    }


def query_gradient_config(head_dim: int, value_dim: int, dtype: torch.dtype, finishes: bool, *_: int) -> dict[str, Any]:
    """For tiles of queries, on every card."""
    widest = max(head_dim, value_dim)
    if dtype == torch.float32:
        shape = (32, 32, 8, 1) if widest <= 64 else (16, 16, 8, 1)
    elif widest <= 128:
        shape = (64, 32 if finishes else 64, 8, 2)
    else:
        shape = (32, 32, 8, 2) if widest <= 256 else (16, 32, 8, 1)
    return _gradient_config(head_dim, value_dim, *shape)


def key_gradient_config(head_dim: int, value_dim: int, dtype: torch.dtype, *_: int) -> dict[str, Any]:
    """For blocks of keys, with scores of every kind and on every card."""
    widest = max(head_dim, value_dim)
    if dtype == torch.float32:
        shape = (32 if widest <= 64 else 16, 32, 8, 1)
    elif widest <= 128:
        shape = (32, 64, 8, 2)
    else:
        shape = (32, 32, 8, 1) if widest <= 256 else (16, 16, 8, 1)
    return _gradient_config(head_dim, value_dim, *shape)


def _gradient_config(head_dim: int, value_dim: int, rows: int, keys: int, warps: int, stages: int) -> dict[str, Any]:
    dim, value = (max(16, triton.next_power_of_2(size)) for size in (head_dim, value_dim))
    return {
        "BLOCK_ROWS": 64 if INTERPRETED else rows,
        "BLOCK_KEYS": 64 if INTERPRETED else keys,
        "BLOCK_DIM": dim,
        "BLOCK_VALUE": value,
        "WHOLE_DIM": dim == head_dim,
        "WHOLE_VALUE": value == value_dim,
        "num_warps": warps,
        "num_stages": stages,
        "enable_fp_fusion": True,
    }


def splits_of(tiles: int, chunks: int, device: torch.device) -> int:
    """How many programs share a tile: as many as there are processors for."""
    if device.type != "cuda":
        return 1
    return max(1, min(chunks, torch.cuda.get_device_properties(device).multi_processor_count // tiles))
