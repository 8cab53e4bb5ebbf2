"""Counts that may not grow: of instructions, registers, shared memory. Kept beside this file, by compiler."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

COUNTS = Path(__file__).with_name("counts.json")
MOST = 1.05  # times as many
Counts = dict[str, int]


def check(compiler: str, counts: Counts, *, record: bool) -> list[str]:
    """What is wrong with these counts; with ``record`` they are kept instead, in place of those they replace.

    A compiler that nothing is kept of is no fault: other versions make other code. It is said, though.
    """
    kept: dict[str, Counts] = json.loads(COUNTS.read_text()) if COUNTS.exists() else {}
    if record:
        kept[compiler] = dict(sorted(counts.items()))
        COUNTS.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
        print(f"{len(counts)} counts kept for {compiler}")
        return []
    if compiler not in kept:
        print(f"nothing is kept of {compiler}, only of {', '.join(kept) or 'nobody'}: not compared")
        return []
    return faults(kept[compiler], counts)


MEMORY = ("LD", "ST", "ATOM", "RED", "UTMA")  # how opcodes begin that touch memory


def of_kernel(title: str, registers: int, shared: int, opcodes: Sequence[str]) -> Counts:
    """What of a GPU kernel may not grow: opcodes are those of all its instructions."""
    memory = sum(opcode.startswith(MEMORY) for opcode in opcodes)
    found = {"registers": registers, "bytes of shared memory": shared, "instructions": len(opcodes)}
    return {f"{title}: {what}": count for what, count in {**found, "of memory": memory}.items()}


def faults(before: Counts, now: Counts) -> list[str]:
    """Each count that grew by over 5 %, appeared or is gone, as a sentence. Smaller ones are printed: keep them."""
    found = [f"{name} is not counted any more" for name in before.keys() - now.keys()]
    found += [f"{name} is new: keep its count with --record" for name in now.keys() - before.keys()]
    for name in before.keys() & now.keys():
        if now[name] > MOST * before[name]:
            share = f"{now[name] / before[name] - 1:.1%} more" if before[name] else "more"
            found.append(f"{name}: {now[name]}, {share} than the {before[name]} kept")
        elif now[name] * MOST < before[name]:
            print(f"{name}: {now[name]}, fewer than the {before[name]} kept; --record keeps it so")
    return sorted(found)
