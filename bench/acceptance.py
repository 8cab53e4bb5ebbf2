"""The bars that the CPU backend has to clear, on the logits of one block of LLaDA-8B."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench.record import Group, Measurement, Record, fastest_read
from bench.text import megabytes, number, table
from bench.timing import Spread, ratio

ROWS, VOCAB = 64, 126_464
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Bar:
    """One promise. ``peer`` is a runner's name, ``"read"``, or None for peak memory in MB."""

    title: str
    mode: str
    peer: str | None
    value: float
    dtypes: tuple[str, ...] = DTYPES

    @property
    def at_least(self) -> bool:
        return self.peer not in (None, "read")


BARS = (
    Bar("statistics vs torch.compile", "statistics", "compiled", 6.0),
    Bar("statistics vs eager torch", "statistics", "eager", 15.0),
    Bar("sampled vs eager torch", "sampled at 1", "eager", 25.0),
    Bar("statistics, time over the pure read", "statistics", "read", 2.5, ("float32",)),
    Bar("statistics, peak extra MB", "statistics", None, 4.0),
    Bar("sampled, peak extra MB", "sampled at 1", None, 4.0),
)


def bars(record: Record) -> Iterator[str]:
    """A table of every bar, or nothing where the record is not about them."""
    groups = {(m.group.dtype, m.group.threads) for m in record.measurements if _is_about(m.group)}
    columns = sorted(groups, key=lambda group: (DTYPES.index(group[0]), group[1]))
    if record.device != "cpu" or not columns:
        return
    yield f"### Acceptance on [{ROWS}, {VOCAB}]"
    yield table(
        {"what": bar.title, "bar": f"at {'least' if bar.at_least else 'most'} {bar.value:g}"}
        | {
            f"{dtype}, {threads} thread{'s' * (threads > 1)}": _cell(bar, record, dtype, threads)
            for dtype, threads in columns
        }
        for bar in BARS
    )


def _is_about(group: Group) -> bool:
    return (group.rows, group.vocab) == (ROWS, VOCAB) and group.dtype in DTYPES


def _cell(bar: Bar, record: Record, dtype: str, threads: int) -> str:
    group = Group(ROWS, VOCAB, dtype, threads, bar.mode)
    runs = [m for m in record.measurements if m.group == group]
    ours = next((m for m in runs if m.kind == "ours"), None)
    if dtype not in bar.dtypes:
        return ""
    if ours is None:
        return "not in this record"
    figure = _figure(bar, ours, runs)
    if isinstance(figure, str):
        return figure
    met = figure.median >= bar.value if bar.at_least else figure.median <= bar.value
    doubt = ", but its spread crosses the bar" if figure.holds(bar.value) else ""
    if bar.peer is None:
        return f"{'met' if met else 'MISSED'}: {megabytes(figure.median)}"
    return f"{'met' if met else 'MISSED'}: {number(figure)}{doubt}"


def _figure(bar: Bar, ours: Measurement, runs: list[Measurement]) -> Spread | str:
    """What is compared with the bar, or why there is nothing to compare."""
    if bar.peer is None:
        return "not measured" if ours.peak_mb is None else Spread.of([ours.peak_mb])
    if bar.peer == "read":
        return ratio(ours.ms, fastest_read(runs).ms)
    peer = next(m for m in runs if m.runner == bar.peer)
    return f"not run: {peer.not_run}" if peer.not_run else ratio(peer.ms, ours.ms)
