"""``torch.nn.functional.scaled_dot_product_attention`` over :func:`diffusion_runtime.ops.attention`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

# kept under a name of our own, so that ours may be assigned to torch.nn.functional
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from diffusion_runtime.ops._attention import attention
from diffusion_runtime.ops._attention_autocast import in_autocast_dtype, is_autocast
from diffusion_runtime.ops._attention_masks import Causal
from diffusion_runtime.ops._registry import BackendUnavailableError

if TYPE_CHECKING:
    from torch.nn.attention.bias import CausalBias


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``softmax(query @ key.T * scale + attn_mask) @ value``: torch's signature and semantics, our kernels.

    A query that may attend to nothing gives 0. Differentiable. Precision is that of
    :func:`diffusion_runtime.ops.attention`. Leading dimensions broadcast against each other as in ``torch.matmul``,
    without copies up to four dimensions. torch's own function runs what the kernels do not define: dropout (which
    reads torch's generator, draw for draw as torch does), nested tensors, and tensors without elements.

    Args:
        query: ``[..., heads, length, head_dim]``, two dimensions or more.
        key: ``[..., kv_heads, num_keys, head_dim]``.
        value: ``[..., kv_heads, num_keys, value_dim]``.
        attn_mask: broadcasts to ``[..., heads, length, num_keys]``: bool, True where a query attends, or float (of the
            dtype of ``query``, or float32) and added to the scores; or a ``torch.nn.attention.bias.CausalBias``, which
            becomes a rule without a tensor.
        dropout_p: probability that a weight is dropped, applied whenever it is above 0.
        is_causal: query ``i`` attends to keys ``0`` to ``i`` (aligned to the upper left), without a tensor.
        scale: defaults to ``head_dim ** -0.5``.
        enable_gqa: each head of ``key`` and of ``value`` serves an equal share of consecutive query heads.
        backend: as for :func:`diffusion_runtime.ops.attention`; not torch's.

    Returns:
        ``[..., heads, length, value_dim]`` in the dtype of ``query``.

    Raises:
        RuntimeError: what torch refuses with it: dtypes or devices that differ, shapes that do not broadcast,
            ``attn_mask`` together with ``is_causal``, a probability outside of 0 to 1.
        TypeError: an argument that is not a tensor.
        ValueError: a CausalBias together with ``is_causal``; a scale that is not finite.
        BackendUnavailableError: a named backend that cannot run this call.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if not 0 <= dropout_p <= 1:
        raise RuntimeError(f"dropout_p must be from 0 to 1, got {dropout_p}")
    only_torch = dropout_p > 0 or query.is_nested or key.is_nested or value.is_nested
    if only_torch and backend not in (None, "auto", "reference"):
        raise BackendUnavailableError(
            f"scaled_dot_product_attention: backend {backend!r} cannot run this call:\n"
            "  torch alone runs dropout and nested tensors"
        )
    if only_torch or 0 in (query.numel(), key.numel(), value.numel()):
        return torch_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    bias = _causal_bias(attn_mask)
    if attn_mask is not None and is_causal:
        error = RuntimeError if bias is None else ValueError
        raise error("attn_mask and is_causal exclude each other, got both")
    if is_autocast(query.device):
        query, key, value = in_autocast_dtype(query, key, value)
    _check(query, key, value, enable_gqa)
    if attn_mask is not None and bias is None:
        _check_mask(attn_mask, query, key, enable_gqa)

    num_dims = max(query.ndim, key.ndim, value.ndim)
    query, key, value = _with_same_batch(query, key, value)
    query, key, value = _with_kv_heads(query, key, value, enable_gqa)
    shape = (*query.shape[:-1], key.shape[-2])
    mask: Causal | Tensor | None = Causal() if is_causal else None
    if bias is not None:
        mask = _causal(bias, shape)
    elif attn_mask is not None:
        mask = _four_dimensions(_with_batch_of(attn_mask, shape))
    out = attention(*map(_four_dimensions, (query, key, value)), mask=mask, scale=scale, backend=backend)
    if out.ndim == num_dims:
        return out
    return out.reshape((*shape[:-1], out.shape[-1])[len(shape) - num_dims :])


def _check(query: Tensor, key: Tensor, value: Tensor, grouped: bool) -> None:
    """What torch refuses, in its order."""
    tensors = (query, key, value)
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        got = ", ".join(str(x.dtype) for x in tensors)
        raise RuntimeError(f"query, key and value must share one floating-point dtype, got {got}")
    if not query.device == key.device == value.device:
        raise RuntimeError(
            f"query, key and value must share one device, got {', '.join(str(x.device) for x in tensors)}"
        )
    if min(x.ndim for x in tensors) < (3 if grouped else 2):
        least = "three dimensions (of heads)" if grouped else "two dimensions"
        raise RuntimeError(f"query, key and value must have {least} or more, got {_shapes(tensors)}")
    if query.shape[-1] != key.shape[-1]:
        raise RuntimeError(f"query and key must have the same last dimension, got {_shapes(tensors)}")
    if key.shape[-2] != value.shape[-2]:
        raise RuntimeError(f"key and value must have equally many keys, got {_shapes(tensors)}")


def _shapes(tensors: tuple[Tensor, ...]) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors)


def _with_same_batch(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Four dimensions or more each, those before the heads expanded to the same sizes."""
    first = tensors[0].shape[:-3]
    if tensors[0].ndim > 3 and all(x.ndim > 3 and x.shape[:-3] == first for x in tensors[1:]):
        return tensors
    batch = torch.broadcast_shapes((1,), *(x.shape[:-3] for x in tensors))
    wide = (x if x.ndim > 2 else x.unsqueeze(0) for x in tensors)
    return tuple(x.expand(*batch, *x.shape[-3:]) for x in wide)


def _with_kv_heads(query: Tensor, key: Tensor, value: Tensor, grouped: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Equally many heads of ``key`` and ``value``, which divide those of ``query``."""
    heads, key_heads, value_heads = (x.shape[-3] for x in (query, key, value))
    if heads == key_heads == value_heads:
        return query, key, value
    if grouped:
        if heads % key_heads or heads % value_heads:
            raise RuntimeError(
                f"heads of key and value must divide those of query, got {key_heads} and {value_heads} for {heads}"
            )
        common = math.lcm(key_heads, value_heads)
        key, value = (
            x if x.shape[-3] == common else x.repeat_interleave(common // x.shape[-3], -3) for x in (key, value)
        )
        return query, key, value
    (all_heads,) = torch.broadcast_shapes((heads,), (key_heads,), (value_heads,))
    # one key head for all is a group: only what differs is expanded
    common = 1 if key_heads == value_heads == 1 else all_heads
    query, key, value = (
        x if x.shape[-3] == wanted else x.expand(*x.shape[:-3], wanted, *x.shape[-2:])
        for x, wanted in ((query, all_heads), (key, common), (value, common))
    )
    return query, key, value


def _causal_bias(mask: Tensor | None) -> CausalBias | None:
    if mask is None or type(mask) in (Tensor, torch.nn.Parameter):
        return None
    # only for a subclass, which may be one: this import brings the compiler, and takes most of a second
    from torch.nn.attention.bias import CausalBias

    return mask if isinstance(mask, CausalBias) else None


def _causal(bias: CausalBias, shape: tuple[int, ...]) -> Causal:
    from torch.nn.attention.bias import CausalVariant

    size = (bias.seq_len_q, bias.seq_len_kv)
    if bias.variant == CausalVariant.UPPER_LEFT or size[0] == size[1]:
        return Causal()  # torch reads no sizes here either
    if size != shape[-2:]:
        raise RuntimeError(f"attn_mask is a CausalBias for {size} but the scores are {tuple(shape[-2:])}")
    return Causal(size[1] - size[0])


def _check_mask(mask: Tensor, query: Tensor, key: Tensor, grouped: bool) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask must be a Tensor, got {type(mask).__name__}")
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError(f"attn_mask must be bool, float32 or {query.dtype}, got {mask.dtype}")
    if mask.device != query.device:
        raise RuntimeError(f"attn_mask must be on {query.device}, as query is, got {mask.device}")
    heads = (*key.shape[:-3], query.shape[-3]) if grouped else key.shape[:-2]
    scores = (*torch.broadcast_shapes(query.shape[:-2], heads), query.shape[-2], key.shape[-2])
    fits = all(have in (1, want) for have, want in zip(reversed(mask.shape), reversed(scores), strict=False))
    if not fits or mask.ndim > len(scores):
        raise RuntimeError(f"attn_mask must broadcast to {tuple(scores)}, got {tuple(mask.shape)}")


def _with_batch_of(mask: Tensor, scores: tuple[int, ...]) -> Tensor:
    """The mask with all dimensions of the scores, and the size of those before the heads where there are many."""
    mask = mask.reshape((1,) * (len(scores) - mask.ndim) + tuple(mask.shape))
    batch = scores[:-3]
    if len(batch) == 1 or all(size == 1 for size in mask.shape[:-3]):
        return mask
    return mask.expand(*batch, *mask.shape[-3:])


def _four_dimensions(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 4 else tensor.reshape(math.prod(tensor.shape[:-3]), *tensor.shape[-3:])
