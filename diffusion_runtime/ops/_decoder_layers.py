"""All layers of a decoder in one call, on a CPU in float32: what a few rows cost is little more than their products.

Torch's routines lay a matrix out anew for each product, which takes as long as to multiply it with 32 rows, and each of
a layer's two dozen small operations costs what the work in it does. Here matrices are read as they are. What else there
is, other dtypes and gradients among it, runs module by module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_runtime.ops._attention_arguments import read_counts, read_visible
from diffusion_runtime.ops._attention_masks import AttentionMask, VisibleKeys
from diffusion_runtime.ops._instruction_set import cpp_instruction_set
from diffusion_runtime.ops._registry import BackendUnavailableError
from diffusion_runtime.ops._torch_is_watching import torch_is_watching


class LayerWeights(NamedTuple):
    """What a layer multiplies with; matrices are ``[to, from]``, as ``nn.Linear`` keeps them."""

    norm: Tensor  # [hidden], before the attention
    query: Tensor  # [heads * head_dim, hidden]
    key: Tensor  # [kv_heads * head_dim, hidden]
    value: Tensor
    query_bias: Tensor | None
    key_bias: Tensor | None
    value_bias: Tensor | None
    query_norm: Tensor | None  # [head_dim], or neither
    key_norm: Tensor | None
    output: Tensor  # [hidden, heads * head_dim]
    ffn_norm: Tensor  # [hidden]
    gate: Tensor  # [ffn, hidden]
    up: Tensor
    down: Tensor  # [hidden, ffn]


class LayerKeys(NamedTuple):
    """Which keys the attention of every layer sees: those of a pool, then those of the rows themselves."""

    mask: AttentionMask | None = None  # no tensor
    lengths: Tensor | None = None  # [batch], how many of the rows' own keys are real; None: all
    pool: Tensor | None = None  # [layers, 2, num_pages, page_size, kv_heads, head_dim]
    places: Tensor | None = None  # [batch * length] int64: where keys and values are written in the pages of a layer
    kept: Tensor | None = None  # [batch], how many keys of the pool are seen; None: it is not read
    table: Tensor | None = None  # [batch, max_pages] int32
    own: bool = True  # whether the rows' own keys are seen


def can_run(x: Tensor, layers: Sequence[LayerWeights], norm: Tensor) -> bool:
    """Whether :func:`decoder_layers` takes these."""
    if not x.is_cpu or cpp_instruction_set() is None or torch.is_autocast_enabled("cpu"):
        return False
    tensors = [x, norm, *(w for layer in layers for w in layer if w is not None)]
    if torch_is_watching(*tensors):
        return False
    return all(w.dtype is torch.float32 and w.is_contiguous() and w.is_cpu for w in tensors)


def decoder_layers(
    x: Tensor,
    layers: Sequence[LayerWeights],
    norm: Tensor,
    keys: LayerKeys,
    head_dim: int,
    eps: float,
    rotary: tuple[Tensor, Tensor],
) -> Tensor:
    """Of each layer: norm, projections, norms of heads where there are weights, rotation, attention and its output
    projection, then the gated feed-forward network (SwiGLU) of the norm, both added to ``x``. Behind the last, a norm.

    A row's result depends on that row and the keys it sees, not on the rows beside it, to the bit.

    Args:
        x: ``[batch, length, hidden]``.
        layers: one for each, of the same sizes.
        norm: ``[hidden]``, the weight of the last norm.
        keys: what attention sees.
        head_dim: of each head.
        eps: of all norms.
        rotary: cosines and sines ``[length, pairs]`` or ``[batch, length, pairs]``, rotated in halves.

    Returns:
        the shape of ``x``.

    Raises:
        ValueError: shapes that do not fit, lengths, pages or places outside of what there is; nothing is written then.
        BackendUnavailableError: the C++ kernels cannot run.
    """
    batch, length, _ = x.shape
    wanted = cpp_instruction_set()
    if wanted is None:
        raise BackendUnavailableError("decoder_layers: the C++ kernels are not built, or are not to run")
    visible = VisibleKeys() if keys.mask is None else read_visible(keys.mask, x, batch)
    ends = None if keys.lengths is None else read_counts("lengths", keys.lengths, (batch,), x, length)
    cos, sin = (t.flatten(0, -2) for t in rotary)
    kept, table = (None, None) if keys.kept is None else (keys.kept.to(torch.int32), keys.table)
    out = x.clone(memory_format=torch.contiguous_format)
    run_cpp(
        out, layers, norm, eps, head_dim, cos, sin, keys.pool, keys.places, kept, table, keys.own, ends, visible.chosen,
        *visible[:5], wanted,
    )  # fmt: skip
    return out


def run_cpp(*arguments: Any) -> None:
    from diffusion_runtime import _C

    _C.decoder_layers(*arguments)
