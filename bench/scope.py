"""What of the bench is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")

LEVELS = ("quick", "normal", "full")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Scope:
    """Where, in which dtypes, and how much.

    Args:
        device: where everything runs.
        dtypes: names of :data:`DTYPES`.
        level: one of :data:`LEVELS`.
        peers: words, of which the name of a peer holds one; none for all peers.
    """

    device: torch.device
    dtypes: tuple[str, ...] = tuple(DTYPES)
    level: str = "full"
    peers: tuple[str, ...] = ()

    @property
    def full(self) -> bool:
        """Everything, however long it takes."""
        return self.level == "full"

    @property
    def rounds(self) -> int:
        """Of each comparison; one more warms up."""
        return {"quick": 3, "normal": 5, "full": 7}[self.level]

    @property
    def seconds(self) -> float:
        """Within which there may be more rounds: a CPU that others share takes many to tell 1.1 from 1.2."""
        return {"quick": 0.0, "normal": 1.0, "full": 2.0}[self.level] if self.device.type == "cpu" else 0.0

    def some(self, cases: Sequence[T]) -> Sequence[T]:
        """The first case, unless all are wanted."""
        return cases if self.full else cases[:1]

    def torch_dtypes(self) -> list[torch.dtype]:
        """The first dtype, unless all are wanted."""
        return [DTYPES[name] for name in self.some(self.dtypes)]

    def wants(self, peer: str) -> bool:
        """Whether a peer is to be timed."""
        return not self.peers or any(word.lower() in peer.lower() for word in self.peers)
