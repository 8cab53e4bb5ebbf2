"""The trace file: lines of JSON, the first about the whole run, each further one about a step.

First line::

    {"format": "diffusion-runtime trace", "version": 1, "mask_token_id": 0, "about": {...},
     "tokens": [[5, 6, 0, 0], ...], "texts": {"5": "de", "6": "f "}}

``tokens`` are the rows as they were before the first step. ``texts`` has the bytes of tokens, each byte as the Latin-1
character of its number; a special token has the empty text; absent where nothing is known of texts. A step::

    {"step": 0, "seconds": 0.031, "blocks": [[2, 4], ...], "texts": {...},
     "rows": [{"position": [3], "token": [9], "was": [0], "logprob": [-0.1], "confidence": [0.9], "margin": [0.8],
               "entropy": [0.4]}, ...]}

``seconds`` are those since the first line, spent in the forward and the loop. A row lists the positions that the step
committed or changed, from the left: the new token, the one before, and where it was committed the statistics that it
had (nats; else null). A token that goes back to the mask was masked again; one without statistics was set by the loop,
as copies behind a stop token are, or in uniform diffusion is what would be answered. ``texts`` has tokens not seen
before.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar

from torch import Tensor

FORMAT, VERSION = "diffusion-runtime trace", 1
_LONGEST = 10_000_000  # positions of a row
STATISTICS = ("logprob", "confidence", "margin", "entropy")


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


def write(
    steps: Iterable[AnyStep],
    file: TextIO,
    *,
    tokens: Tensor,
    mask_token_id: int,
    text_of: Callable[[int], bytes] | None = None,
    about: dict[str, Any] | None = None,
) -> Iterator[AnyStep]:
    """Pass ``steps`` on, each after its line was written.

    Args:
        steps: of :meth:`diffusion_runtime.Denoiser.stream`.
        file: written to; not closed.
        tokens: ``[batch, length]`` int64, what the steps begin with; new positions may be left out.
        mask_token_id: where undecided; -1 in uniform diffusion.
        text_of: the bytes of a token.
        about: anything that JSON can hold: the model, the settings.
    """
    known: set[int] = set()

    def texts(ids: Iterable[int]) -> dict[str, Any]:
        if text_of is None:
            return {}
        fresh = sorted(set(ids) - known - {mask_token_id})
        known.update(fresh)
        return {"texts": {str(token): text_of(token).decode("latin-1") for token in fresh}}

    before = tokens.tolist()
    head = {"format": FORMAT, "version": VERSION, "mask_token_id": mask_token_id, "about": about or {}}
    started: float | None = None
    seconds = 0.0
    steps = iter(steps)
    while True:
        resumed = time.perf_counter()
        step = next(steps, None)
        if step is None and started is not None:
            return
        after = before if step is None else step.tokens.tolist()  # waits for the device
        seconds += time.perf_counter() - resumed
        if started is None:
            before = [row + [mask_token_id] * (len(new) - len(row)) for row, new in zip(before, after, strict=True)]
            file.write(json.dumps({**head, "tokens": before, **texts(token for row in before for token in row)}) + "\n")
            started = resumed
            if step is None:
                return
        assert step is not None
        rows = [_changes(step, row, old, new) for row, (old, new) in enumerate(zip(before, after, strict=True))]
        line = {
            "step": step.index,
            "seconds": round(seconds, 6),
            "blocks": [[block.start, block.stop] for block in step.blocks],
            "rows": rows,
            **texts(token for row in rows for token in row["token"]),
        }
        file.write(json.dumps(line) + "\n")
        before = after
        yield step


def _changes(step: TracedStep, row: int, old: list[int], new: list[int]) -> dict[str, list[Any]]:
    committed = step.commit_mask[row].tolist()
    places = [p for p, token in enumerate(new) if committed[p] or p >= len(old) or token != old[p]]
    changes: dict[str, list[Any]] = {
        "position": places,
        "token": [new[p] for p in places],
        "was": [old[p] if p < len(old) else None for p in places],
    }
    start = step.blocks[row].start
    for name in STATISTICS:
        values = getattr(step.samples, name)[row].tolist()
        changes[name] = [_number(values[p - start]) if committed[p] else None for p in places]
    return changes


def _number(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None


@dataclass(frozen=True)
class TraceStep:
    """A step's line; ``rows`` as it is there."""

    step: int
    seconds: float
    blocks: list[list[int]]
    rows: list[dict[str, list[Any]]]


@dataclass(frozen=True)
class Trace:
    """A trace file, read."""

    mask_token_id: int
    about: dict[str, Any]
    tokens: list[list[int]]  # before the first step
    steps: list[TraceStep]
    texts: dict[int, bytes] = field(default_factory=dict)

    def tokens_after(self, num_steps: int) -> list[list[int]]:
        """The rows as so many steps left them."""
        rows = [list(row) for row in self.tokens]
        for step in self.steps[:num_steps]:
            for row, changes in zip(rows, step.rows, strict=True):
                for position, token in zip(changes["position"], changes["token"], strict=True):
                    row.extend([self.mask_token_id] * (position + 1 - len(row)))
                    row[position] = token
        return rows


def read(path: str | Path) -> Trace:
    """Read a trace file.

    Raises:
        OSError: there is none.
        ValueError: it is not one, or of another version; the message names the line.
    """
    trace: Trace | None = None
    number = 0
    try:
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):  # noqa: B007
                if trace is None:
                    trace = _begun(json.loads(line))
                else:
                    _add(trace, json.loads(line))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}, line {number}: {error}") from error
    if trace is None:
        raise ValueError(f"{path} is empty")
    return trace


def _begun(head: dict[str, Any]) -> Trace:
    if head.get("format") != FORMAT:
        raise ValueError(f"not a trace: it does not say {FORMAT!r}")
    if head.get("version") != VERSION:
        raise ValueError(f"a trace of version {head.get('version')}; this is version {VERSION}")
    tokens = [[int(token) for token in row] for row in head["tokens"]]
    return Trace(int(head["mask_token_id"]), dict(head["about"]), tokens, [], _texts(head))


def _add(trace: Trace, record: dict[str, Any]) -> None:
    rows = [_checked(changes) for changes in record["rows"]]
    if not len(rows) == len(record["blocks"]) == len(trace.tokens):
        raise ValueError(f"a step must have {len(trace.tokens)} rows and blocks")
    trace.steps.append(TraceStep(int(record["step"]), float(record["seconds"]), record["blocks"], rows))
    trace.texts.update(_texts(record))


def _texts(record: dict[str, Any]) -> dict[int, bytes]:
    return {int(token): str(text).encode("latin-1") for token, text in record.get("texts", {}).items()}


def _checked(changes: dict[str, list[Any]]) -> dict[str, list[Any]]:
    columns = {name: list(changes[name]) for name in ("position", "token", "was", *STATISTICS)}
    if len({len(column) for column in columns.values()}) != 1:
        raise ValueError("the columns of a row must have one length")
    if not all(isinstance(x, int) and 0 <= x < _LONGEST for x in columns["position"]):
        raise ValueError(f"positions must be whole numbers from 0 and below {_LONGEST}")
    return columns
