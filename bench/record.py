"""What a run of the bench leaves: every raw sample, from which tables and plots are made."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

SCHEMA = 2
KINDS = ("ours", "peer", "limit")


@dataclass(frozen=True)
class Timed:
    """A call of a comparison. Sample ``i`` of all of them comes from the same round.

    Args:
        name: of the backend, the peer or the limit.
        kind: one of :data:`KINDS`.
        ms: raw samples.
        peak_mb: memory in use at the worst moment of a call, beyond what was in use before it; 10^6 bytes. None: it
            cannot be measured on that machine.
        launch_us: time that the host needs to enqueue a call; of ours, on a GPU.
        decode_ms: of each sample what came after the first forward, which reads the prompt; of whole answers.
    """

    name: str
    kind: str
    ms: list[float]
    peak_mb: float | None = None
    launch_us: float | None = None
    decode_ms: list[float] | None = None


@dataclass(frozen=True)
class Result:
    """A comparison as it was measured; see :class:`bench.comparison.Comparison`."""

    op: str
    group: str
    case: str
    threads: int  # 0 on a GPU
    cold: bool  # whether caches were flushed before each call
    timed: list[Timed]
    flop: float = 0.0
    num_bytes: float = 0.0
    tokens: int = 0
    forwards: int = 0
    at: float = 0.0

    def of(self, kind: str) -> list[Timed]:
        """The calls of one kind, in their order."""
        return [timed for timed in self.timed if timed.kind == kind]

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What it is, in any record."""
        return self.op, self.group, self.case, self.threads


@dataclass(frozen=True)
class Record:
    """A whole run.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        machine: what it ran on and with.
        rules: how it was timed.
        peers: libraries that peers need, and their versions, or that they are not here.
        results: of every comparison.
    """

    device: str
    machine: dict[str, str]
    rules: dict[str, str]
    peers: dict[str, str]
    results: list[Result] = field(default_factory=list)
    schema: int = SCHEMA

    def save(self, path: Path) -> None:
        """One result a line: a diff of two records can be read."""
        head = asdict(self)
        lines = ",\n".join("  " + json.dumps(result) for result in head.pop("results"))
        path.write_text(json.dumps(head, indent=1).removesuffix("\n}") + f',\n "results": [\n{lines}\n ]\n}}\n')


def load(path: Path) -> Record:
    """Read what :meth:`Record.save` wrote.

    Raises:
        ValueError: it is no record, or one of another schema.
    """
    try:
        found = json.loads(path.read_text())
        if found["schema"] != SCHEMA:
            raise ValueError(f"{path} has schema {found['schema']}, this bench reads {SCHEMA}")
        results = [_made(Result, {**r, "timed": [_made(Timed, t) for t in r["timed"]]}) for r in found.pop("results")]
        record: Record = _made(Record, {**found, "results": results})
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a record of the bench: {type(error).__name__} {error}") from error
    return record


def _made(kind: Any, values: dict[str, Any]) -> Any:
    if unknown := values.keys() - {each.name for each in fields(kind)}:
        raise TypeError(f"unknown fields {sorted(unknown)}")
    return kind(**values)
