"""What the denoising loop asks of a model, and what every native family is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from diffusion_runtime import ops
from diffusion_runtime.nn import AttentionContext


class Head(NamedTuple):
    """The product that turns hidden states into logits."""

    weight: Tensor  # [vocab, dim]
    bias: Tensor | None = None  # [vocab]


class KeyShape(NamedTuple):
    """The sizes of what a cache keeps of each token."""

    num_layers: int
    kv_heads: int
    head_dim: int


class LanguageModel(nn.Module, ABC):
    """Tokens in, logits out.

    A family implements :meth:`hidden` and :attr:`head`, sets :attr:`config`, and says what is not the default:

    * ``shifted``: the states at a position give the logits of the *next* one, as models made from autoregressive ones
      have it; the first position uses its own.
    * ``block_length``: attention is causal from block to block of so many positions, counted from the first token;
      None: every position sees all others.
    """

    config: Any
    shifted: bool = False

    @property
    def mask_token_id(self) -> int:
        """The token that stands for an undecided position."""
        token: int = self.config.mask_token_id
        return token

    @property
    def block_length(self) -> int | None:
        """Positions of a block, or None."""
        return None

    @property
    def key_shape(self) -> KeyShape | None:
        """What a cache has to hold; None where the model's attention takes no context, and so no cache."""
        return None

    @property
    def noise_conditioned(self) -> bool:
        """Whether :meth:`hidden` is to be given the noise level of each row."""
        return False

    @property
    @abstractmethod
    def head(self) -> Head | None:
        """The LM head; None where :meth:`hidden` gives logits."""

    @abstractmethod
    def hidden(self, tokens: Tensor, context: AttentionContext | None = None) -> Tensor:
        """``[batch, length]`` int64 -> ``[batch, length, dim]``, after the final norm.

        Args:
            tokens: those of this forward.
            context: where they stand and what else they see. None: they are whole sequences.
        """

    def forward(self, tokens: Tensor, context: AttentionContext | None = None) -> Tensor:
        """``[batch, length]`` int64 -> ``[batch, length, vocab]`` in the dtype of the weights; nothing is shifted."""
        states, head = self.hidden(tokens, context), self.head
        return states if head is None else functional.linear(states, *head)

    def whole_sequences(self) -> AttentionContext:
        """The context of sequences that are seen at once."""
        if self.block_length is None:
            return AttentionContext()
        return AttentionContext(ops.BlockCausal(self.block_length))
