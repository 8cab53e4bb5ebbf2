"""What happened at each denoising step, as data: one JSON object per line, for viewers to read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TextIO, TypeVar

from torch import Tensor


class TracedStep(Protocol):
    """The fields of a :class:`diffusion_runtime.denoiser.Step` that a trace keeps."""

    @property
    def index(self) -> int: ...
    @property
    def blocks(self) -> Sequence[slice]: ...
    @property
    def tokens(self) -> Tensor: ...
    @property
    def commit_mask(self) -> Tensor: ...
    @property
    def samples(self) -> Any: ...


AnyStep = TypeVar("AnyStep", bound=TracedStep)

_STATISTICS = ("logprob", "confidence", "margin", "entropy")


def record(step: TracedStep) -> dict[str, Any]:
    """One step as plain lists and numbers.

    Returns:
        ``{"step", "blocks": [[start, stop], ...], "rows": [[{"position", "token", "logprob", ...}, ...], ...]}``: for
        each row of the batch its block, and the positions that this step committed, from the left, with the statistics
        they had (nats).
    """
    samples = step.samples
    rows: list[list[dict[str, Any]]] = [[] for _ in range(step.commit_mask.shape[0])]
    for row, position in step.commit_mask.nonzero().tolist():
        at = (row, position - step.blocks[row].start)
        entry = {"position": position, "token": int(step.tokens[row, position])}
        entry |= {name: round(float(getattr(samples, name)[at]), 6) for name in _STATISTICS}
        rows[row].append(entry)
    return {"step": step.index, "blocks": [[block.start, block.stop] for block in step.blocks], "rows": rows}


def write(steps: Iterable[AnyStep], file: TextIO) -> Iterator[AnyStep]:
    """Pass ``steps`` on, writing each one's record to ``file`` as a line of JSON before it is passed."""
    for step in steps:
        file.write(json.dumps(record(step)) + "\n")
        yield step
