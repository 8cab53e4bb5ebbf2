"""``sample_from_hidden``: the LM head and the sampler in one op, without ``[rows, vocab]`` logits.

The first launch leaves one part of each row for each tile of 128 tokens (``_tile_parts.py``), either from the head
itself, as the end of a matrix product, or, for many rows, from logits that a library's product made of some tiles. The
second (``finish_head.py``) puts the parts together and computes again the tile that a draw falls into.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from diffusion_runtime.kernels import finish_head
from diffusion_runtime.kernels._common import TILE
from diffusion_runtime.kernels._tile_parts import NUM_KINDS, complete_logits, rows_of_slots, store_tile
from diffusion_runtime.kernels.order_rows import order_rows
from diffusion_runtime.kernels.row_parts import pointer_or_value
from torch import Tensor


@triton.jit(do_not_specialize=["num_rows", "stride_allowed"])
def _head_parts_kernel(
    hidden_ptr,  # [rows, dim]
    weight_ptr,  # [vocab, dim]
    bias_ptr,  # [vocab], or None
    order_ptr,  # [rows + 1] int32, or None
    allowed_ptr,  # [rows, words] int32, or None
    temperature_ptr,  # [rows] float32, or None
    temperature,
    statistics_temperature_ptr,  # [rows] float32, or None
    statistics_temperature,
    softcap,  # or None
    parts_ptr,  # [6, slots, num_tiles] float32
    num_rows,
    dim,
    vocab,
    stride_hidden,
    stride_weight,
    stride_allowed,
    BLOCK_ROWS: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The logits of one tile and a block of rows, as a matrix product that ends in ``store_tile``."""
    # the blocks of rows that need the same weights are neighbours, and find them in the cache
    num_blocks = (num_rows - 1) // BLOCK_ROWS + 1
    tile = tl.program_id(0) // num_blocks
    slots, rows, _, live = rows_of_slots(tl.program_id(0) % num_blocks, order_ptr, num_rows, BLOCK_ROWS)
    if tl.max(live.to(tl.int32), 0) == 0:
        return
    tokens = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    weight_ptr += tokens[:, None] * stride_weight
    hidden_ptr += rows[None, :] * stride_hidden
    product = tl.full([TILE, BLOCK_ROWS], 0, tl.float32)
    for first in range(0, dim, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        w = tl.load(weight_ptr + k[None, :], mask=(tokens < vocab)[:, None] & (k < dim)[None, :], other=0.0)
        h = tl.load(hidden_ptr + k[:, None], mask=live[None, :] & (k < dim)[:, None], other=0.0)
        product = tl.dot(w, h, product, input_precision="ieee")

    tokens = tokens[None, :]
    num_tiles = (vocab - 1) // TILE + 1
    parts_ptr += tile
    first_slice = tl.program_id(0) % num_blocks * (BLOCK_ROWS // SLICE)
    # A part takes a dozen registers for each logit: all of them at once would not fit.
    for i in tl.static_range(BLOCK_ROWS // SLICE):
        slots, rows, _, live = rows_of_slots(first_slice + i, order_ptr, num_rows, SLICE)
        inside = live[:, None] & (tokens < vocab)
        x = tl.trans(_columns(product, i, SLICE))
        x = complete_logits(x, tokens, inside, rows, bias_ptr, allowed_ptr, stride_allowed)
        store_tile(
            x, parts_ptr + slots * num_tiles, num_rows.to(tl.int64) * num_tiles, rows, live,
            temperature_ptr, temperature, statistics_temperature_ptr, statistics_temperature, softcap,
        )  # fmt: skip


@triton.jit
def _half(x, i: tl.constexpr):
    """Columns of x [m, 2 n] from n * i on [m, n]."""
    low, high = tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))
    return high if i else low


@triton.jit
def _columns(x, i: tl.constexpr, WIDTH: tl.constexpr):
    """Columns of x [m, n] from WIDTH * i on [m, WIDTH]."""
    if x.shape[1] // WIDTH == 8:
        x = _half(x, i // 4 % 2)
    if x.shape[1] // WIDTH == 4:
        x = _half(x, i // 2 % 2)
    if x.shape[1] // WIDTH == 2:
        x = _half(x, i % 2)
    return x


@triton.jit(do_not_specialize=["num_rows", "first_tile", "num_tokens", "stride_allowed"])
def _logits_parts_kernel(
    logits_ptr,  # [rows, num_tokens] float32: products of the tokens from first_tile on
    bias_ptr,  # [vocab], or None
    order_ptr,  # [rows + 1] int32, or None
    allowed_ptr,  # [rows, words] int32, or None
    temperature_ptr,  # [rows] float32, or None
    temperature,
    statistics_temperature_ptr,  # [rows] float32, or None
    statistics_temperature,
    softcap,  # or None
    parts_ptr,  # [6, slots, num_tiles] float32
    num_rows,
    first_tile,
    num_tokens,
    vocab,
    stride_logits,
    stride_allowed,
    BLOCK_ROWS: tl.constexpr,
):
    """The same parts from products that exist."""
    num_blocks = (num_rows - 1) // BLOCK_ROWS + 1
    place = tl.program_id(0) // num_blocks  # of the tile, among those of these logits
    slots, rows, _, live = rows_of_slots(tl.program_id(0) % num_blocks, order_ptr, num_rows, BLOCK_ROWS)
    if tl.max(live.to(tl.int32), 0) == 0:
        return
    column = place * TILE + tl.arange(0, TILE)[None, :]
    inside = live[:, None] & (column < num_tokens)
    x = tl.load(logits_ptr + rows[:, None] * stride_logits + column, mask=inside, other=0.0)
    tile = first_tile.to(tl.int64) + place
    tokens = tile * TILE + tl.arange(0, TILE)[None, :]
    x = complete_logits(x, tokens, inside, rows, bias_ptr, allowed_ptr, stride_allowed)
    num_tiles = (vocab - 1) // TILE + 1
    store_tile(
        x, parts_ptr + slots * num_tiles + tile, num_rows.to(tl.int64) * num_tiles, rows, live,
        temperature_ptr, temperature, statistics_temperature_ptr, statistics_temperature, softcap,
    )  # fmt: skip


class _Launch(NamedTuple):
    constants: dict[str, int]
    options: dict[str, Any]


# Rows up to which the head's own product beats a library's: more need more reuse than a tile of 128 tokens has.
MOST_ROWS = {2: 128, 4: 32}  # by the size of an element
_MOST_LOGITS = 1 << 22  # that a library's product makes at once: 16 MB, which the second-level cache of a GPU holds


def _launch_config(num_rows: int, element_size: int, aligned: bool) -> _Launch:
    """Of the head's product. BLOCK_K does not depend on the rows: nor may what a row's sum is made of.

    The weights stream past a few rows, so bytes on their way are what counts: 16 KB of weights in each stage, and two
    programs on a core of sm_80 and sm_90. float32 has no exact product on tensor cores, and takes small blocks, whose
    operands all lie in registers. Rows of weights that are not ``aligned`` pass through registers as well.
    """
    block_rows = min(MOST_ROWS[element_size], max(16, triton.next_power_of_2(num_rows)))
    constants = {"BLOCK_ROWS": block_rows, "SLICE": 16, "BLOCK_K": 64 if aligned else 32}
    # Products and sums stay apart, as sample_tokens.py says; a dot is one operation all the same.
    options: dict[str, Any] = {"num_warps": 4, "num_stages": 4, "enable_fp_fusion": False}
    if element_size == 4:
        return _Launch(constants | {"BLOCK_K": 16}, options)
    if block_rows == 64 and aligned:
        options |= {"maxnreg": 128}  # a few more would leave room for one program only
    if block_rows > 32:
        options |= {"num_warps": 8, "num_stages": 4 if block_rows == 64 else 3}
    return _Launch(constants, options)


_LOGITS_CONFIG = _Launch({"BLOCK_ROWS": 16}, {"num_warps": 4, "enable_fp_fusion": False})


def sample_from_hidden(
    hidden: Tensor,  # [rows, dim], stride 1 along dim
    weight: Tensor,  # [vocab, dim], stride 1 along dim
    bias: Tensor | None,  # [vocab]
    allowed: Tensor | None,  # [rows, words] int32, stride 1 along words: logits of the other tokens count as -inf
    masked: Tensor | None,  # [rows]
    temperature: Tensor | float,  # [rows] or one
    seed: Tensor | int,  # [rows] or one
    position: Tensor,  # [rows]
    step: Tensor | int,  # [rows] or one
    statistics_temperature: Tensor | float,  # [rows] or one
    softcap: float,  # 0: none
    ids: Tensor,  # [2, rows]
    statistics: Tensor,  # [5, rows]
    *,
    fused: bool,
) -> None:
    """Fill ``ids`` and ``statistics`` as ``sample_tokens`` does; ``fused``: with the head's own product."""
    num_rows, vocab = len(hidden), len(weight)
    parts = torch.empty(NUM_KINDS, num_rows, triton.cdiv(vocab, TILE.value), dtype=torch.float32, device=hidden.device)
    stride_allowed = 0 if allowed is None else allowed.stride(0)
    draw = pointer_or_value(temperature, 0.0)
    measure = (*pointer_or_value(statistics_temperature, 0.0), softcap or None)
    with torch.cuda.device_of(hidden):
        order = None if masked is None else order_rows(masked)
        rows = (order, allowed, *draw, *measure, parts)
        if fused:
            _head_parts(hidden, weight, bias, rows, stride_allowed)
        else:
            _product_parts(hidden, weight, bias, rows, stride_allowed)
        finish_head.finish_head(hidden, weight, bias, *rows, stride_allowed, seed, position, step, ids, statistics)


def _head_parts(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: tuple[Any, ...], stride_allowed: int
) -> None:
    num_rows, (vocab, dim) = len(hidden), weight.shape
    aligned = all(stride % 16 == 0 for stride in (dim, hidden.stride(0), weight.stride(0)))
    config = _launch_config(num_rows, hidden.element_size(), aligned)
    grid = (triton.cdiv(vocab, TILE.value) * triton.cdiv(num_rows, config.constants["BLOCK_ROWS"]),)
    _head_parts_kernel[grid](
        hidden, weight, bias, *rows, num_rows, dim, vocab, hidden.stride(0), weight.stride(0), stride_allowed,
        **config.constants, **config.options,
    )  # fmt: skip


def _product_parts(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: tuple[Any, ...], stride_allowed: int
) -> None:
    num_rows, vocab = len(hidden), len(weight)
    num_tiles = max(1, _MOST_LOGITS // num_rows // TILE.value)
    size = min(vocab, num_tiles * TILE.value)
    logits = torch.empty(num_rows, size, dtype=torch.float32, device=hidden.device)
    for first in range(0, vocab, size):
        some = weight[first : first + size]
        _multiply(hidden, some, logits[:, : len(some)])
        grid = (triton.cdiv(len(some), TILE.value) * triton.cdiv(num_rows, _LOGITS_CONFIG.constants["BLOCK_ROWS"]),)
        _logits_parts_kernel[grid](
            logits, bias, *rows, num_rows, first // TILE.value, len(some), vocab, logits.stride(0), stride_allowed,
            **_LOGITS_CONFIG.constants, **_LOGITS_CONFIG.options,
        )  # fmt: skip


# torch 2.6 and 2.7 have no product of 16-bit matrices that keeps the 32 bits of its sums
CAN_MULTIPLY = hasattr(torch.ops.aten.mm, "dtype_out")


def _multiply(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """``hidden @ weight.T`` in float32, as the fused product has it."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)
    else:
        torch.mm(hidden.float(), weight.float().T, out=out)


def prefers_fused(hidden: Tensor, masked: Tensor | None) -> bool:
    """Whether these rows take the head's own product; a mask does not say how many rows there are, and takes it."""
    if masked is not None or (hidden.element_size() == 2 and hidden.is_cuda and not CAN_MULTIPLY):
        return True
    return len(hidden) <= MOST_ROWS[hidden.element_size()]


def ahead_of_time() -> list[tuple[Any, ...]]:
    """Each dtype and block of rows of the heads of LLaDA and DiffusionGemma, a ragged one, and what goes with them."""
    types = {"num_rows": "i32", "dim": "i32:16", "stride_hidden": "i32:16", "stride_weight": "i32:16"}
    types |= {"temperature_ptr": "*fp32:16", "temperature": "fp32", "statistics_temperature_ptr": "*fp32:16"}
    types |= {"statistics_temperature": "fp32", "softcap": "fp32", "parts_ptr": "*fp32:16", "order_ptr": "*i32:16"}
    types |= {"allowed_ptr": "*i32:16", "stride_allowed": "i32"}
    bare = ("bias_ptr", "allowed_ptr", "order_ptr", "temperature_ptr", "statistics_temperature_ptr", "softcap")
    gemma = tuple(name for name in bare if name != "softcap")
    compilations: list[tuple[Any, ...]] = []
    for dtype, size, num_rows, vocab, dim, none in (
        ("bf16", 2, 1, 126_464, 4096, bare),
        ("bf16", 2, 32, 126_464, 4096, bare),
        ("bf16", 2, 64, 126_464, 4096, bare),
        ("bf16", 2, 128, 126_464, 4096, bare),
        ("bf16", 2, 64, 262_144, 2816, gemma),
        ("bf16", 2, 128, 262_144, 2816, ()),
        ("fp16", 2, 16, 126_464, 4096, ()),
        ("fp16", 2, 128, 50_257, 100, ()),
        ("bf16", 2, 64, 50_257, 100, ()),
        ("bf16", 2, 32, 50_257, 100, ()),
        ("fp32", 4, 16, 126_464, 4096, bare),
        ("fp32", 4, 32, 262_144, 2816, ()),
    ):
        ragged = {"dim": "i32", "stride_hidden": "i32", "stride_weight": "i32"} if dim % 16 else {}
        every = types | ragged | {f"{name}_ptr": f"*{dtype}:16" for name in ("hidden", "weight", "bias")}
        signature = {k: kind for k, kind in every.items() if k not in none} | {
            "vocab": "i32" if vocab % 16 else "i32:16"
        }
        config = _launch_config(num_rows, size, not ragged)
        rows = config.constants["BLOCK_ROWS"]
        name = f"head {dtype} {vocab} x {dim}, {rows} rows{'' if none else ' settings'}"
        case = (name, _head_parts_kernel, signature, config.constants | dict.fromkeys(none), config.options)
        # the product of 16-bit numbers has to be one of tensor cores, which have another instruction on each card
        opcodes = {80: ("HMMA",), 90: ("HGMMA",)} if size == 2 else {80: ("FFMA",), 90: ("FFMA",)}
        compilations += [(*case, (capability,), needed) for capability, needed in opcodes.items()]
    tiles = {name: kind for name, kind in types.items() if name not in ("dim", "stride_hidden", "stride_weight")}
    tiles |= {"logits_ptr": "*fp32:16", "first_tile": "i32", "num_tokens": "i32", "vocab": "i32:16"}
    tiles |= {"stride_logits": "i32:16", "bias_ptr": "*bf16:16"}
    for none in (bare, ()):
        signature = {k: kind for k, kind in tiles.items() if k not in none}
        constants = _LOGITS_CONFIG.constants | dict.fromkeys(none)
        name = f"logits{'' if none else ' settings'}"
        compilations.append((name, _logits_parts_kernel, signature, constants, _LOGITS_CONFIG.options))
    return compilations
