"""What an attention backend is given: every argument of ``attention`` checked and laid out."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from diffusion_runtime.ops._attention_masks import VisibleKeys


@dataclass(frozen=True, eq=False)
class AttentionProblem:
    """The arguments of one call. Integer tensors are contiguous int32 on the device of ``query``.

    Sequence ``b`` is row ``b`` of the batch, or ``cu_seqlens[b] : cu_seqlens[b + 1]`` of the one packed row.
    """

    query: Tensor  # [batch, heads, length, head_dim], or packed [1, heads, total, head_dim]
    key: Tensor  # [batch, kv_heads, num_keys, head_dim], or packed
    value: Tensor  # [batch, kv_heads, num_keys, value_dim], or packed
    # dense [sequences, kv_heads, capacity, head_dim]; paged [num_pages, kv_heads, page_size, head_dim]
    prefix_key: Tensor | None
    prefix_value: Tensor | None
    prefix_lengths: Tensor | None  # [sequences]; None with a prefix: all of its capacity
    page_table: Tensor | None  # [sequences, max_pages]; None: the prefix is dense
    dense_mask: Tensor | None  # [batch, heads, length, num_keys] bool or float, expanded dimensions have stride 0
    key_starts: Tensor | None  # [batch] first real key; None: 0
    key_ends: Tensor | None  # [batch] one past the last real key; None: num_keys
    cu_seqlens: Tensor | None  # [sequences + 1]; None: not packed
    cu_seqlens_k: Tensor | None  # the same for keys; the same tensor where it was not given
    max_length: int  # no sequence has more queries
    visible: VisibleKeys
    scale: float
    softcap: float  # 0: none

    @property
    def sequences(self) -> int:
        """How many sequences there are."""
        return self.query.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def prefix_capacity(self) -> int:
        """No sequence's prefix has more keys."""
        if self.prefix_key is None:
            return 0
        pages = 1 if self.page_table is None else self.page_table.shape[1]
        return pages * self.prefix_key.shape[2]

    def to_operator(self) -> tuple[Any, ...]:
        """The fields as the arguments of the torch operator, in the order of its schema."""
        visible = self.visible
        before = tuple(getattr(self, name) for name in _BEFORE_VISIBLE)
        return (*before, visible.chosen, *visible[:5], self.max_length, self.scale, self.softcap)

    @classmethod
    def from_operator(cls, values: tuple[Any, ...]) -> AttentionProblem:
        """The inverse of :meth:`to_operator`."""
        count = len(_BEFORE_VISIBLE)
        chosen, left, right, block, prefix_window, offset, max_length, scale, softcap = values[count:]
        visible = VisibleKeys(left, right, block, prefix_window, offset, chosen)
        tensors = dict(zip(_BEFORE_VISIBLE, values[:count], strict=True))
        return cls(**tensors, max_length=max_length, visible=visible, scale=scale, softcap=softcap)

    def for_kernel(self) -> AttentionProblem:
        """The same with stride 1 along the last dimension of what a kernel reads; copies only what has another."""
        names = [name for name in _VECTORS if (x := getattr(self, name)) is not None and x.stride(-1) != 1]
        return replace(self, **{name: getattr(self, name).contiguous() for name in names}) if names else self

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Unwritten results: ``out``, laid out as torch's is, and ``logsumexp``."""
        batch, heads, length, _ = self.query.shape
        wide = torch.promote_types(self.query.dtype, torch.float32)
        # [batch, length, heads, value_dim] seen as [batch, heads, length, value_dim]: what an output projection reads
        out = self.query.new_empty((batch, length, heads, self.value.shape[3])).transpose(1, 2)
        return out, self.query.new_empty((batch, heads, length), dtype=wide)


_BEFORE_VISIBLE = [field.name for field in fields(AttentionProblem)][:12]
_VECTORS = ("query", "key", "value", "prefix_key", "prefix_value")
