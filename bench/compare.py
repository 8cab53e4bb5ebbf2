"""Two records beside each other: what moved, and by more than noise."""

from __future__ import annotations

from collections.abc import Iterator

from bench.record import Record, Result, Timed
from bench.text import number, significant, table
from bench.timing import NONE, Spread, ratio, verdict

LEAST = 0.05  # less is nothing to speak of


def markdown(before: Record, after: Record) -> str:
    """What moved, the verdicts that differ or are in one record alone, and how many there are of each."""
    found = {result.key: result for result in after.results}
    both = [(result, found[result.key]) for result in before.results if result.key in found]
    alone = len(before.results) + len(after.results) - 2 * len(both)
    moved = [line for old, new in both for line in _moved(old, new)]
    verdicts = [line for old, new in both for line in _verdicts(old, new)]
    of_both = [line for line in verdicts if line["was"] != NONE != line["is"]]
    changed = [line for line in verdicts if line["was"] != line["is"]]
    differ = sum(line["was"] != line["is"] for line in of_both)
    parts = [
        f"{len(both)} comparisons are in both" + (f", {alone} in one only" if alone else ""),
        table(moved) if moved else "nothing moved by more than noise",
        f"{len(of_both)} verdicts are in both, {differ} of them differ, {len(changed) - differ} are in one only",
    ]
    return "\n\n".join([*parts, *([table(changed)] if changed else [])])


def _moved(old: Result, new: Result) -> Iterator[dict[str, str]]:
    for a, b in _pairs(old, new):
        was, now = Spread.of(a.ms), Spread.of(b.ms)
        apart = now.low > was.high or now.high < was.low
        if apart and abs(now.median / was.median - 1) > LEAST:
            yield {
                "op": old.op,
                "case": f"{old.group}, {old.case}",
                "what": a.name,
                "was, ms": number(was),
                "is, ms": number(now),
                "times as long": significant(now.median / was.median),
            }


def _verdicts(old: Result, new: Result) -> Iterator[dict[str, str]]:
    peers = {timed.name for timed in old.of("peer")}
    pairs = list(_pairs(old, new))
    for mine, mine_now in pairs:
        for peer, peer_now in pairs:
            if peer.name not in peers or mine.kind != "ours":
                continue
            yield {
                "op": old.op,
                "case": f"{old.group}, {old.case}",
                "ours": mine.name,
                "beside": peer.name,
                "was": verdict(ratio(peer.ms, mine.ms)),
                "is": verdict(ratio(peer_now.ms, mine_now.ms)),
            }


def _pairs(old: Result, new: Result) -> Iterator[tuple[Timed, Timed]]:
    found = {(timed.kind, timed.name): timed for timed in new.timed}
    for timed in old.timed:
        if (timed.kind, timed.name) in found:
            yield timed, found[timed.kind, timed.name]
