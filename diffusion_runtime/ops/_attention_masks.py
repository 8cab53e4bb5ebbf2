"""Which keys a query of ``attention`` may see: small objects that say it without a ``[length, num_keys]`` tensor.

Positions count a sequence's real keys: those of the prefix first, then those of ``key`` (padding before the first one
does not count). Query ``i`` has the position of key ``i``, plus ``offset``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

UNBOUNDED = -1


class VisibleKeys(NamedTuple):
    """Every mask as one rule; ``csrc/include/visible_keys.h`` is the same for kernels.

    A query at ``p`` of a sequence with ``prefix`` and ``total`` real keys sees the keys of ``[low, high)``::

        low = max(0, p - left)                     if left is bounded
        high = min(total, (p // block + 1) * block + right)   if right is bounded, p // block rounding down
        low = prefix - prefix_window               if prefix_window is bounded

    Where ``chosen`` says so, sequence by sequence, the first two lines hold, and elsewhere the third.
    """

    left: int = UNBOUNDED
    right: int = UNBOUNDED
    block: int = 1
    prefix_window: int = UNBOUNDED
    offset: int = 0
    chosen: Tensor | None = None  # [batch] bool


@dataclass(frozen=True)
class Bidirectional:
    """Every query sees every key; the same as no mask."""

    def visible_keys(self) -> VisibleKeys:
        return VisibleKeys()


@dataclass(frozen=True)
class Causal:
    """A query sees the keys up to its own position.

    Args:
        offset: added to the positions of the queries; ``num_keys - length`` aligns the last query with the last key.
    """

    offset: int = 0

    def __post_init__(self) -> None:
        _check_int("offset", self.offset)

    def visible_keys(self) -> VisibleKeys:
        return VisibleKeys(right=0, offset=self.offset)


@dataclass(frozen=True)
class BlockCausal:
    """A query sees all of its own block and every block before it (block diffusion's prefill).

    Args:
        block_length: positions per block; blocks begin at position 0.
        offset: as for :class:`Causal`.
    """

    block_length: int
    offset: int = 0

    def __post_init__(self) -> None:
        _check_int("block_length", self.block_length, at_least=1)
        _check_int("offset", self.offset)

    def visible_keys(self) -> VisibleKeys:
        return VisibleKeys(right=0, block=self.block_length, offset=self.offset)


@dataclass(frozen=True)
class SlidingWindow:
    """A query sees ``left`` keys before its own position and ``right`` behind it, its own included.

    Args:
        left: None for no bound.
        right: None for no bound; 0 is causal.
        offset: as for :class:`Causal`.
    """

    left: int | None
    right: int | None
    offset: int = 0

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), at_least=0)
        _check_int("offset", self.offset)

    def visible_keys(self) -> VisibleKeys:
        left, right = (UNBOUNDED if bound is None else bound for bound in (self.left, self.right))
        return VisibleKeys(left, right, offset=self.offset)


@dataclass(frozen=True)
class PrefixWindow:
    """A query sees the last ``num_keys`` keys of the prefix and all of ``key``: DiffusionGemma's sliding decoder."""

    num_keys: int

    def __post_init__(self) -> None:
        _check_int("num_keys", self.num_keys, at_least=0)

    def visible_keys(self) -> VisibleKeys:
        return VisibleKeys(prefix_window=self.num_keys)


@dataclass(frozen=True, eq=False)
class PerSequence:
    """One mask for some sequences of a batch and another for the rest, chosen on the device.

    Args:
        chosen: ``[batch]`` bool, on the device of the query.
        mask: what the sequences see where ``chosen``.
        otherwise: what the others see.
    """

    chosen: Tensor
    mask: Causal | BlockCausal | SlidingWindow
    otherwise: Bidirectional | PrefixWindow = Bidirectional()

    def __post_init__(self) -> None:
        if not isinstance(self.mask, (Causal, BlockCausal, SlidingWindow)):
            raise TypeError(f"mask must be Causal, BlockCausal or SlidingWindow, got {self.mask!r}")
        if not isinstance(self.otherwise, (Bidirectional, PrefixWindow)):
            raise TypeError(f"otherwise must be Bidirectional or PrefixWindow, got {self.otherwise!r}")

    def visible_keys(self) -> VisibleKeys:
        return self.mask.visible_keys()._replace(
            prefix_window=self.otherwise.visible_keys().prefix_window, chosen=self.chosen
        )


AttentionMask = Bidirectional | Causal | BlockCausal | SlidingWindow | PrefixWindow | PerSequence


def _check_int(name: str, value: object, *, at_least: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
