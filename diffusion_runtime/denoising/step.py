"""What one denoising step did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_runtime.ops import TokenSamples


@dataclass(frozen=True)
class Step:
    """What one denoising step did."""

    index: int  # counts the forwards of the whole run, from 0
    blocks: Sequence[slice]  # of each row: the canvas, in the sequence; empty for a row that is done
    tokens: Tensor  # [batch, length] int64 after this step; a copy. In uniform diffusion to the end of the block, the
    # most probable token at each of its positions
    commit_mask: Tensor  # [batch, length] bool: the positions that took their candidate in this step, or kept it
    samples: TokenSamples  # [batch, longest block]: column 0 is where a row's block begins; token -1 where nothing
    # was sampled

    def at_blocks(self, mask: Tensor) -> Tensor:
        """A ``[batch, length]`` mask in the columns of :attr:`samples`."""
        width = self.samples.token.shape[1]
        return torch.stack(
            [
                torch.nn.functional.pad(row[block], (0, width - (block.stop - block.start)))
                for row, block in zip(mask, self.blocks, strict=True)
            ]
        )


def last_tokens(steps: Iterator[Step], default: Tensor | None = None) -> Tensor:
    """What the steps come to: the tokens after the last, or a copy of ``default`` where there are none."""
    tokens = None if default is None else default.clone()
    for step in steps:
        tokens = step.tokens
    assert tokens is not None, "generate has at least one masked position"
    return tokens
