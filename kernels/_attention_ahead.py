"""The compilations ahead of time of attention's kernels, which have most arguments in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusion_runtime.kernels._attention_launch import INTEGERS

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_FLOATS = ("logsumexp", "grad_logsumexp", "delta", "grad_mask", "part", "part_sums")
# not promised to be multiples of 16, as strides are
_PLAIN = (
    *("length", "num_keys", "capacity", "left", "right", "block", "prefix_window", "offset", "tiles", "splits"),
    *("max_chunks", "max_pages", "first_tile", "prefix_tiles", "heads", "kv_heads"),
)


def ahead(
    kernel: Any, config_of: Callable[..., dict[str, Any]], name: str, none: tuple[str, ...] = ()
) -> list[tuple[Any, ...]]:
    """One kernel for each card.

    Args:
        config_of: called with both sizes of heads, the dtype, whether scores are finished apart, and the card.
        name: the dtype, the size of heads, and what else there is: ``prefix`` (with lengths), ``pages``, ``rule`` (a
            mask that is an object), ``bool`` or ``float`` (a mask tensor), ``softcap``.
        none: pointers that are None.
    """
    dtype, dim, *having = name.split()
    dense = 1 if "bool" in having else 2 if "float" in having else 0
    none += ("cu_seqlens_ptr", "cu_seqlens_k_ptr", "chosen_ptr")
    none += () if "prefix" in having else ("prefix_lengths_ptr",)
    none += () if "pages" in having else ("page_table_ptr",)
    none += () if "softcap" in having else ("softcap",)
    none += () if dense else ("mask_ptr",)
    types = {f"{name}_ptr": "*i32:16" for name in (*INTEGERS, "ticket")} | {f"{x}_ptr": "*fp32:16" for x in _FLOATS}
    types |= {"softcap": "fp32", "scale": "fp32", "mask_ptr": "*i1:16" if dense == 1 else "*fp32:16"}
    types |= dict.fromkeys(_PLAIN, "i32")
    names = [name for name in kernel.arg_names if name.islower() and name not in none]
    signature = {x: types.get(x, f"*{dtype}:16" if x.endswith("_ptr") else "i32:16") for x in names}
    finishes = dense > 0 or "softcap" in having
    constants = dict.fromkeys(none) | {"BOUNDED": "rule" in having, "FINISHES": finishes, "DENSE": dense}
    compilations = []
    for card in (80, 90):
        config = config_of(int(dim), int(dim), _DTYPES[dtype], finishes, card)
        options = {x: config.pop(x) for x in _OPTIONS if x in config}
        opcodes = ("HGMMA",) if dtype != "fp32" and card == 90 and config["BLOCK_ROWS"] >= 64 else ()
        compilations.append((name, kernel, signature, constants | config, options, (card,), opcodes))
    return compilations
