"""A record as markdown: the acceptance bars, then a table for each shape and dtype."""

from __future__ import annotations

from collections.abc import Iterator

from bench.acceptance import bars
from bench.record import Group, Measurement, Record, fastest_read
from bench.text import megabytes, number, significant, table
from bench.timing import Spread, ratio

PEER_TITLES = {"eager": "eager torch", "compiled": "torch.compile", "llada": "LLaDA, float64"}


def markdown(record: Record) -> str:
    facts = ["; ".join(f"{name} {fact}" for name, fact in part.items()) for part in (record.machine, record.rules)]
    parts = [f"`{record.op}` on {record.device}", *facts, *bars(record)]
    groups = _groups(record)
    for shape in dict.fromkeys((g.rows, g.vocab, g.dtype) for g in groups):
        chosen = {g: runs for g, runs in groups.items() if (g.rows, g.vocab, g.dtype) == shape}
        mb = next(iter(next(iter(chosen.values())).values())).bytes_moved / 1e6
        parts.append(f"### [{shape[0]}, {shape[1]}] {shape[2]}, {mb:.1f} MB")
        parts.append(table(_lines(record, chosen)))
    sets = table(_instruction_set_lines(groups))
    return "\n\n".join([*parts, *(["### Instruction sets of the C++ backend", sets] if sets else [])])


def _groups(record: Record) -> dict[Group, dict[str, Measurement]]:
    groups: dict[Group, dict[str, Measurement]] = {}
    for measurement in record.measurements:
        groups.setdefault(measurement.group, {})[measurement.runner] = measurement
    return groups


def _lines(record: Record, groups: dict[Group, dict[str, Measurement]]) -> Iterator[dict[str, str]]:
    on_gpu = record.device == "cuda"
    for group, runs in sorted(groups.items(), key=lambda item: item[0].threads):
        read = fastest_read(runs.values())
        peers = [runs[name] for name in PEER_TITLES]
        for ours in (run for run in runs.values() if run.kind == "ours"):
            spread = Spread.of(ours.ms)
            line = {} if on_gpu else {"threads": str(group.threads)}
            line |= {"case": group.mode, "backend": ours.runner, "ms": number(spread)}
            line |= {f"vs {PEER_TITLES[peer.runner]}": against(peer, ours) for peer in peers}
            line["GB/s"] = f"{ours.bytes_moved / spread.median / 1e6:.1f}"
            line["of the pure read"] = f"{ratio(read.ms, ours.ms).median:.0%} of {read.runner}"
            if on_gpu:
                rate = runs["copy"].bytes_moved / ours.bytes_moved
                line["of the copy"] = f"{ratio(runs['copy'].ms, ours.ms).median / rate:.0%}"
                line["launch us"] = f"{ours.launch_us:.0f}"
            line["peak MB: ours, peers"] = ", ".join(megabytes(run.peak_mb) for run in (ours, *peers))
            yield line


def _instruction_set_lines(groups: dict[Group, dict[str, Measurement]]) -> Iterator[dict[str, str]]:
    for group, runs in groups.items():
        sets = [run for run in runs.values() if run.kind == "instruction set"]
        if not sets:
            continue
        read = fastest_read(runs.values())
        line = {
            "shape": f"[{group.rows}, {group.vocab}] {group.dtype}",
            "threads": str(group.threads),
            "case": group.mode,
        }
        for run in sets:
            share = ratio(read.ms, run.ms).median
            line[f"{run.runner.removeprefix('cpp ')}: ms, of the read"] = f"{number(Spread.of(run.ms))}, {share:.0%}"
        yield line


def against(peer: Measurement, ours: Measurement) -> str:
    """The peer's time and how many times as long as ours it is, or why nothing is said."""
    if peer.not_run:
        return f"not run: {peer.not_run}"
    times = ratio(peer.ms, ours.ms)
    ms = f"{significant(Spread.of(peer.ms).median)} ms"
    if times.holds(1):
        return f"{ms}, no verdict ({times.low:.2f}-{times.high:.2f})"
    return f"{ms}, {significant(times.median)}x ({significant(times.low)}-{significant(times.high)})"
