"""One comparison: ours beside its peers on one input, checked, measured for memory, then timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from bench.memory import peak_extra_mb, unmeasurable
from bench.text import megabytes, number, significant, table
from bench.timing import Call, CudaTimer, Spread, cpu_ms, interleave, ratio


@dataclass(frozen=True)
class Comparison:
    """What is timed together, in one process, in one round after the other.

    Args:
        group: Comparisons of one group share a table.
        case: The first column.
        ours: Calls of ours by name.
        peers: Calls that do the same work.
        limits: Calls that do a part of it which nobody can be faster than: a read of the input, a product alone.
        check: Raises WrongAnswerError where an answer of ours is wrong; called before anything is timed.
        flop: Floating-point operations of one call, where they are what it is about.
    """

    group: str
    case: str
    ours: Mapping[str, Call]
    peers: Mapping[str, Call]
    check: Callable[[], None]
    limits: Mapping[str, Call] = field(default_factory=dict)
    flop: float = 0.0  # 0: not what matters


@dataclass(frozen=True)
class Result:
    """Raw samples in ms and peak memory in MB (None: not measured), by the names of the comparison's calls."""

    group: str
    case: str
    ours: tuple[str, ...]
    peers: tuple[str, ...]
    limits: tuple[str, ...]
    ms: dict[str, list[float]]
    peak_mb: dict[str, float | None]
    flop: float


def compare(comparisons: Iterable[Comparison], device: torch.device, rounds: int) -> Iterator[Result]:
    """Check, then measure, each comparison; they may be made while this runs."""
    timer = CudaTimer(device) if device.type == "cuda" else cpu_ms
    blind = unmeasurable(device) is not None
    for comparison in comparisons:
        calls = {**comparison.ours, **comparison.peers, **comparison.limits}
        with torch.no_grad():
            for call in comparison.ours.values():
                call()  # the first call loads code, which would count as memory
            comparison.check()
            peak = {name: None if blind else peak_extra_mb(call, device)[1] for name, call in calls.items()}
            ms = interleave({name: _without_round(call) for name, call in calls.items()}, timer, rounds)
        yield Result(
            comparison.group,
            comparison.case,
            tuple(comparison.ours),
            tuple(comparison.peers),
            tuple(comparison.limits),
            {name: [round(sample, 5) for sample in samples] for name, samples in ms.items()},
            peak,
            comparison.flop,
        )


def _without_round(call: Call) -> Callable[[int], object]:
    return lambda _: call()


def markdown(results: Iterable[Result]) -> str:
    """A table for each group."""
    results = list(results)
    parts = []
    for group in dict.fromkeys(result.group for result in results):
        parts.append(f"### {group}")
        parts.append(table(line for result in results if result.group == group for line in _lines(result)))
    return "\n\n".join(parts)


def _lines(result: Result) -> Iterator[dict[str, str]]:
    for name in result.ours:
        mine = result.ms[name]
        line = {"case": result.case, "ours": name, "ms": number(Spread.of(mine))}
        if result.flop:
            line["TFLOP/s"] = significant(result.flop / Spread.of(mine).median / 1e9)
        for peer in result.peers:
            times, ms = ratio(result.ms[peer], mine), significant(Spread.of(result.ms[peer]).median)
            verdict = "no verdict" if times.holds(1) else f"{significant(times.median)}x"
            line[f"vs {peer}"] = f"{ms} ms, {verdict} ({significant(times.low)}-{significant(times.high)})"
        for limit in result.limits:
            line[f"share that is {limit}"] = f"{ratio(result.ms[limit], mine).median:.0%}"
        names = [name, *result.peers]
        line["peak MB: ours, peers"] = ", ".join(megabytes(result.peak_mb[each]) for each in names)
        yield line
