"""Two records beside each other: what moved, and by more than noise."""

from __future__ import annotations

from collections.abc import Iterator

from bench.record import Record, Result, Timed
from bench.text import number, significant, table
from bench.timing import Spread, ratio, verdict

LEAST = 0.05  # less is nothing to speak of


def markdown(before: Record, after: Record) -> str:
    """A line for each call that moved, one for each verdict that is another, and what only one record has."""
    found = {result.key: result for result in after.results}
    both = [(result, found[result.key]) for result in before.results if result.key in found]
    lines = [line for old, new in both for line in _moved(old, new)]
    verdicts = [line for old, new in both for line in _verdicts(old, new)]
    alone = len(before.results) + len(after.results) - 2 * len(both)
    parts = [
        f"{len(both)} comparisons are in both" + (f", {alone} in one only" if alone else ""),
        table(lines) if lines else "nothing moved by more than noise",
    ]
    return "\n\n".join([*parts, *(["Other verdicts:", table(verdicts)] if verdicts else [])])


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
            was, now = verdict(ratio(peer.ms, mine.ms)), verdict(ratio(peer_now.ms, mine_now.ms))
            if was != now:
                yield {
                    "op": old.op,
                    "case": f"{old.group}, {old.case}",
                    "ours": mine.name,
                    "beside": peer.name,
                    "was": was,
                    "is": now,
                }


def _pairs(old: Result, new: Result) -> Iterator[tuple[Timed, Timed]]:
    found = {(timed.kind, timed.name): timed for timed in new.timed}
    for timed in old.timed:
        if (timed.kind, timed.name) in found:
            yield timed, found[timed.kind, timed.name]
