"""A record as markdown: what it ran on, a line for each op, and a table for each shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import geometric_mean

from bench.record import Record, Result, Timed
from bench.text import megabytes, number, significant, table
from bench.timing import NONE, Spread, ratio, verdict


def markdown(record: Record) -> str:
    """All of it."""
    facts = ["; ".join(f"{name} {fact}" for name, fact in part.items()) for part in (record.machine, record.rules)]
    peers = "peers: " + ", ".join(f"{name} {version}" for name, version in record.peers.items())
    return "\n\n".join([*facts, peers, "## Summary", summary(record.results), *tables(record.results)])


def summary(results: Iterable[Result]) -> str:
    """How many times as long as ours each peer takes, over all cases of an op."""
    ratios: dict[tuple[str, str], list[Spread]] = {}
    for result in results:
        for peer in result.of("peer"):
            ratios.setdefault((result.op, peer.name), []).append(ratio(peer.ms, fastest(result).ms))
    return table(
        {
            "op": op,
            "beside": peer,
            "times as long, mean": f"{significant(geometric_mean([each.median for each in found]))}x",
            "least": f"{significant(min(each.median for each in found))}x",
            "most": f"{significant(max(each.median for each in found))}x",
            "cases": str(len(found)),
            "lost": str(sum(verdict(each) == "slower" for each in found)),
        }
        for (op, peer), found in ratios.items()
    )


def fastest(result: Result) -> Timed:
    """Of ours, the one that a user gets: the first that is named, unless another is faster."""
    return min(result.of("ours"), key=lambda timed: Spread.of(timed.ms).median)


def tables(results: Iterable[Result]) -> Iterator[str]:
    """A heading and a table for each group."""
    results = list(results)
    for op, group in dict.fromkeys((result.op, result.group) for result in results):
        yield f"### {group}"
        yield table(line for r in results if (r.op, r.group) == (op, group) for line in _lines(r))


def _lines(result: Result) -> Iterator[dict[str, str]]:
    peers = result.of("peer")
    for mine in result.of("ours"):
        spread = Spread.of(mine.ms)
        line = {"case": result.case}
        if result.threads:
            line["threads"] = str(result.threads)
        line |= {"ours": mine.name, "ms": number(spread)}
        if result.flop:
            line["GFLOP/s"] = significant(result.flop / spread.median / 1e6)
        if result.num_bytes:
            line["GB/s"] = significant(result.num_bytes / spread.median / 1e6)
        if result.tokens:
            line["forwards"] = str(result.forwards)
            line["tokens a forward"] = significant(result.tokens / result.forwards)
            line["tokens/s"] = significant(1e3 * result.tokens / spread.median)
        if mine.decode_ms:
            line["decode ms"] = number(Spread.of(mine.decode_ms))
        line |= {f"vs {peer.name}": against(peer, mine) for peer in peers}
        for limit in result.of("limit"):
            line[f"share that is {limit.name}"] = f"{ratio(limit.ms, mine.ms).median:.0%}"
        if mine.launch_us is not None:
            line["launch us"] = f"{mine.launch_us:.0f}"
        line["peak MB: ours, peers"] = ", ".join(megabytes(each.peak_mb) for each in (mine, *peers))
        yield line


def against(peer: Timed, ours: Timed) -> str:
    """The peer's time and how many times as long as ours it is, if there is a verdict."""
    times, ms = ratio(peer.ms, ours.ms), significant(Spread.of(peer.ms).median)
    if verdict(times) == NONE:
        return f"{ms} ms, {NONE}"
    said = f"{significant(times.median)}x" if times.median > 1 else f"**{significant(times.median)}x**"
    return f"{ms} ms, {said} ({significant(times.low)}-{significant(times.high)})"
