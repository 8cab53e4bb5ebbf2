"""``torch.nn.MultiheadAttention`` over :func:`diffusion_runtime.ops.scaled_dot_product_attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion_runtime import ops


class MultiheadAttention(nn.MultiheadAttention):
    """torch's module: its arguments, parameters, state dict and outputs, with attention through our kernels.

    torch's own ``forward`` runs, as it is, what our attention does not define: ``need_weights=True`` (its default),
    whose second output is the ``[length, num_keys]`` matrix that a kernel exists to avoid, and every call that torch
    refuses, with torch's own error. Two things differ from torch: a query whose keys are all masked gives
    ``out_proj.bias`` in eval mode too, where torch's fast path gives NaN; and a nested input (self-attention, no mask)
    is packed rather than padded, in either layout, with or without gradients.

    ``module.backend`` names the backend of attention (see :func:`diffusion_runtime.ops.attention`); a named kernel
    does not run dropout. TorchScript cannot compile this class.
    """

    backend: str | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """torch's, shape for shape.

        Args:
            query: ``[batch, length, embed_dim]`` with ``batch_first``, else ``[length, batch, embed_dim]``; unbatched
                ``[length, embed_dim]``.
            key: the same with ``num_keys`` and ``kdim``.
            value: the same with ``num_keys`` and ``vdim``.
            key_padding_mask: ``[batch, num_keys]``, unbatched ``[num_keys]``: bool, True for a key to ignore, or float
                and added to the scores.
            need_weights: also return the weights.
            attn_mask: ``[length, num_keys]`` or ``[batch * num_heads, length, num_keys]``, bool or float likewise.
            average_attn_weights: return their mean over the heads.
            is_causal: a promise that ``attn_mask`` is causal, which lets it go unread.

        Returns:
            the output in the layout of ``query``, and the weights or None.
        """
        if not need_weights:
            if query.is_nested and self._takes_nested(query, key, value, key_padding_mask, attn_mask, is_causal):
                return self._forward_nested(query), None
            if self._takes(query, key, value, key_padding_mask, attn_mask, is_causal):
                return self._forward(query, key, value, key_padding_mask, attn_mask, is_causal), None
        return super().forward(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )

    def _takes(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> bool:
        """Whether a call is one that torch accepts; it says best what is wrong with another."""
        if query.is_nested or key.is_nested or value.is_nested:
            return False
        if query.ndim not in (2, 3) or not query.ndim == key.ndim == value.ndim or (is_causal and attn_mask is None):
            return False
        if key.shape[:-1] != value.shape[:-1]:
            return False
        if (query.shape[-1], key.shape[-1], value.shape[-1]) != (self.embed_dim, self.kdim, self.vdim):
            return False
        at = 0 if self.batch_first or query.ndim == 2 else 1
        batch, length, num_keys = (1, query.shape[0], key.shape[0])
        if query.ndim == 3:
            batch, length, num_keys = (query.shape[at], query.shape[1 - at], key.shape[1 - at])
            if key.shape[at] != batch:
                return False
        if key_padding_mask is not None:
            expected = (num_keys,) if query.ndim == 2 else (batch, num_keys)
            if not _is_mask(key_padding_mask) or key_padding_mask.shape != expected:
                return False
        if attn_mask is not None:
            heads = () if attn_mask.ndim == 2 else (batch * self.num_heads,)
            return _is_mask(attn_mask) and attn_mask.shape == (*heads, length, num_keys)
        return True

    def _forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        if is_causal := is_causal and key_padding_mask is None:
            attn_mask = None
        q, k, v = self._project(query, key, value)
        batched = query.ndim == 3
        if not batched:
            q, k, v = (x.unsqueeze(0) for x in (q, k, v))
        elif not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat((x, b.expand(len(x), 1, -1)), 1) for x, b in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unflatten(0, (q.shape[0], self.num_heads))
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.reshape(q.shape[0], 1, 1, key_padding_mask.shape[-1])
        mask = _merged(attn_mask, key_padding_mask)
        if mask is not None and (more := k.shape[1] - mask.shape[-1]):
            mask = functional.pad(mask, (0, more))
        out: Tensor = ops.scaled_dot_product_attention(
            self._heads(q),
            self._heads(k),
            self._heads(v),
            attn_mask=mask.logical_not() if mask is not None and mask.dtype == torch.bool else mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            backend=self.backend,
        )
        # torch's memory is [length, batch, embed_dim]; in training a dropout behind this draws in the order of memory
        length_first = batched and (self.training or not self.batch_first)
        out = out.permute(2, 0, 1, 3) if length_first else out.transpose(1, 2)
        out = functional.linear(out.flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return out.squeeze(0)
        return out.transpose(0, 1) if length_first and self.batch_first else out

    def _heads(self, x: Tensor) -> Tensor:
        """``[batch, length, embed_dim]`` as ``[batch, heads, length, head_dim]``."""
        heads: Tensor = x.unflatten(2, (self.num_heads, self.head_dim))
        return heads.transpose(1, 2)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """The three inputs projected, with one product for those that are the same tensor."""
        weight: Tensor = self.in_proj_weight
        bias, size = self.in_proj_bias, self.embed_dim
        biases = (None, None, None) if bias is None else bias.chunk(3)
        if not self._qkv_same_embed_dim:
            weights: tuple[Tensor, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            all_three: Tensor = functional.linear(query, weight, bias)
            return all_three.chunk(3, -1)
        elif key is value:
            both = functional.linear(key, weight[size:], None if bias is None else bias[size:])
            return functional.linear(query, weight[:size], biases[0]), *both.chunk(2, -1)
        else:
            weights = weight.chunk(3)
        each = zip((query, key, value), weights, biases, strict=True)
        return tuple(functional.linear(x, w, b) for x, w, b in each)

    def _takes_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> bool:
        """The nested inputs that torch's fast path takes, in either layout and with gradients."""
        jagged: Any = query if query.layout == torch.jagged else None
        if jagged is not None and jagged.lengths() is not None:  # holes between the sequences
            return False
        plain = self.batch_first and self._qkv_same_embed_dim and self.bias_k is None and not self.add_zero_attn
        unmasked = key_padding_mask is None and attn_mask is None and not is_causal
        drops = self.training and self.dropout > 0
        return plain and unmasked and not drops and query is key and key is value

    def _forward_nested(self, x: Any) -> Tensor:
        if x.layout == torch.jagged:
            out = self._forward_packed(x.values(), ops.Packed(x.offsets()))
            return torch.nested.nested_tensor_from_jagged(out, offsets=x.offsets())
        parts = x.unbind()
        lengths = [part.shape[0] for part in parts]
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(x.device)
        out = self._forward_packed(torch.cat(parts), ops.Packed(cu_seqlens, max_length=max(lengths)))
        return torch.nested.as_nested_tensor(list(out.split(lengths)))

    def _forward_packed(self, x: Tensor, lengths: ops.Packed) -> Tensor:
        """``[all lengths, embed_dim]`` in and out."""
        x = x.unsqueeze(0)
        q, k, v = (self._heads(y) for y in self._project(x, x, x))
        out = ops.attention(q, k, v, lengths=lengths, backend=self.backend)
        return functional.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)[0]


def _is_mask(mask: Tensor) -> bool:
    return mask.dtype == torch.bool or mask.is_floating_point()


def _merged(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Both masks as one: bool, True where a key is ignored, or float and added."""
    if first is None or second is None:
        return second if first is None else first
    if first.dtype == second.dtype == torch.bool:
        return first | second
    return _added(first, second.dtype) + _added(second, first.dtype)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)
