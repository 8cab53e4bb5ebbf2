"""``torch.nn.TransformerEncoderLayer`` with our attention in every mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from diffusion_runtime.nn.multihead_attention import MultiheadAttention


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """torch's layer: its arguments, parameters, state dict and outputs; ``self_attn`` is our MultiheadAttention.

    torch's layer calls one fused function of its own in eval mode, which hides ``self_attn`` and its subclasses; this
    one always calls its modules. It takes the nested tensors that ``torch.nn.TransformerEncoder`` makes of padded
    batches, so an encoder of such layers gives zeros at padding in eval mode, as torch's does.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = functional.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        # keeps the parameters that torch drew: the same seed gives the same layer
        self.self_attn.__class__ = MultiheadAttention

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """torch's, shape for shape.

        Args:
            src: ``[batch, length, d_model]`` with ``batch_first``, else ``[length, batch, d_model]``; unbatched
                ``[length, d_model]``; or nested.
            src_mask: as ``attn_mask`` of MultiheadAttention.
            src_key_padding_mask: as its ``key_padding_mask``.
            is_causal: a promise that ``src_mask`` is causal.

        Returns:
            the shape of ``src``.
        """
        if self.norm_first:
            src = src + self._sa_block(self.norm1(src), src_mask, src_key_padding_mask, is_causal)
            return src + self._ff_block(self.norm2(src))
        src = self.norm1(src + self._sa_block(src, src_mask, src_key_padding_mask, is_causal))
        out: Tensor = self.norm2(src + self._ff_block(src))
        return out
