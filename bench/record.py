"""What a run of the bench leaves: every raw sample, from which the tables are made."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

SCHEMA = 1
KINDS = ("ours", "instruction set", "peer", "read", "copy")


@dataclass(frozen=True)
class Mode:
    """What is asked of a row besides its statistics, which are always those at temperature 1."""

    name: str
    temperature: float


MODES = (Mode("statistics", 0.0), Mode("sampled at 1", 1.0), Mode("sampled at 0.7", 0.7))


@dataclass(frozen=True)
class Group:
    """What was timed together: round by round, in one process, on the same logits."""

    rows: int
    vocab: int
    dtype: str
    threads: int
    mode: str


@dataclass(frozen=True)
class Measurement:
    """One runner in one group. Sample ``i`` of each runner of a group comes from the same round.

    Args:
        kind: One of :data:`KINDS`.
        ms: Raw samples; empty where ``not_run`` says why there are none.
        bytes_moved: Of one call; for ours and peers the logits, read once.
        peak_mb: Memory in use at the worst moment of a call, beyond what was in use before it; 10^6 bytes.
        launch_us: Time the host needs to enqueue a call (GPU only).
    """

    group: Group
    runner: str
    kind: str
    ms: list[float]
    bytes_moved: int
    peak_mb: float | None = None
    launch_us: float | None = None
    not_run: str | None = None


@dataclass(frozen=True)
class Record:
    """A whole run."""

    op: str
    device: str
    machine: dict[str, str]
    rules: dict[str, str]
    measurements: list[Measurement]
    schema: int = SCHEMA

    def save(self, path: Path) -> None:
        """One measurement a line: a diff of two records can be read."""
        fields = asdict(self)
        measurements = fields.pop("measurements")
        lines = ",\n".join("  " + json.dumps(m) for m in measurements)
        head = json.dumps(fields, indent=1).removesuffix("\n}")
        path.write_text(f'{head},\n "measurements": [\n{lines}\n ]\n}}\n')


def load(path: Path) -> Record:
    fields = json.loads(path.read_text())
    if fields["schema"] != SCHEMA:
        raise ValueError(f"{path} has schema {fields['schema']}, this bench reads {SCHEMA}")
    measurements = [Measurement(**{**m, "group": Group(**m["group"])}) for m in fields.pop("measurements")]
    return Record(**fields, measurements=measurements)


def fastest_read(runs: Iterable[Measurement]) -> Measurement:
    """The pure read that the shares are taken of: not the one that flatters."""
    return min((run for run in runs if run.kind == "read"), key=lambda run: median(run.ms))
