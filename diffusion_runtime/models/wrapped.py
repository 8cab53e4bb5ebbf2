"""Any module that maps tokens to logits, or to the states before its head, as a model that the loop can run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_runtime.models._language_model import Head, LanguageModel
from diffusion_runtime.nn import AttentionContext


class Wrapped(LanguageModel):
    """A module of somebody else's; see :func:`wrap`."""

    def __init__(
        self,
        module: Callable[..., Any],
        head: Head | None,
        mask_token_id: int,
        *,
        shifted: bool,
        padding_mask: str | None,
    ) -> None:
        super().__init__()
        self.module = module
        self._head = head
        self._mask_token_id = mask_token_id
        self.shifted = shifted
        self.padding_mask = padding_mask

    @property
    def mask_token_id(self) -> int:
        return self._mask_token_id

    @property
    def head(self) -> Head | None:
        return self._head

    def hidden(self, tokens: Tensor, context: AttentionContext | None = None) -> Tensor:
        """What the module gives: states, or logits if there is no head."""
        more = {}
        if context is not None and context.lengths is not None:
            if self.padding_mask is None:
                raise ValueError(
                    "sequences of different lengths need a module that takes a padding mask: say its argument's name "
                    "with wrap(..., padding_mask='attention_mask')"
                )
            places = torch.arange(tokens.shape[1], device=tokens.device)
            more = {self.padding_mask: (places < context.lengths[:, None]).long()}
        output = self.module(tokens, **more)
        wanted = "logits" if self._head is None else "last_hidden_state"
        states: Tensor = getattr(output, wanted, output)
        if not isinstance(states, Tensor) or states.ndim != 3 or states.shape[:2] != tokens.shape:
            what = "logits [{}, {}, vocab]" if self._head is None else "states [{}, {}, dim]"
            got = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
            raise ValueError(f"the model must give {what.format(*tokens.shape)}, got {got}")
        return states


def wrap(
    module: Callable[..., Any],
    *,
    mask_token_id: int,
    head: nn.Linear | Tensor | None = None,
    shifted: bool = False,
    padding_mask: str | None = None,
) -> LanguageModel:
    """Any module that maps tokens to logits or hidden states, for :class:`diffusion_runtime.Denoiser`.

    Args:
        module: from ``[batch, length]`` int64 to ``[batch, length, vocab]`` logits (or an object that has them as
            ``.logits``); with ``head`` to ``[batch, length, dim]`` states after the final norm (or an object that has
            them as ``.last_hidden_state``). Then no ``[rows, vocab]`` tensor is made.
        mask_token_id: the token of an undecided position.
        head: the LM head: a linear layer, or its ``[vocab, dim]`` weight.
        shifted: the states at a position belong to the next one, as in models made from autoregressive ones.
        padding_mask: the name of an argument that takes ``[batch, length]`` int64, 1 where a token is real; needed for
            batches of different lengths, which are padded on the right.

    Returns:
        a model without a cache.

    Raises:
        TypeError: a head that is neither.
    """
    if isinstance(head, nn.Linear):
        given = Head(head.weight, head.bias)
    elif isinstance(head, Tensor):
        given = Head(head)
    elif head is None:
        return Wrapped(module, None, mask_token_id, shifted=shifted, padding_mask=padding_mask)
    else:
        raise TypeError(f"head must be a linear layer or its weight, got {type(head).__name__}")
    return Wrapped(module, given, mask_token_id, shifted=shifted, padding_mask=padding_mask)
