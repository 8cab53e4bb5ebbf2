"""The tables and plots of README and docs, made of the records in ``bench/results``.

In a file, what stands between ``<!-- bench: NAME -->`` and ``<!-- end -->`` is generated.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench import plots, report
from bench.machine import ROOT
from bench.record import Record, load

RESULTS = ROOT / "bench" / "results"
IMAGES = ROOT / "docs" / "images"
FILES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
_BLOCK = re.compile(r"(<!-- bench: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def write(*, check: bool = False) -> list[Path]:
    """Write what is not current; with ``check``, only say what that is."""
    stale = []
    for file in FILES:
        text = file.read_text()
        fresh = _BLOCK.sub(_block, text)
        if fresh != text:
            stale.append(file)
            if not check:
                file.write_text(fresh)
    with tempfile.TemporaryDirectory() as folder:
        for record in sorted(RESULTS.glob("*.json")):
            for drawn in plots.write(load(record).results, Path(folder)):
                path = IMAGES / f"bench-{record.stem}-{drawn.name}"
                if not path.exists() or path.read_bytes() != drawn.read_bytes():
                    stale.append(path)
                    if not check:
                        path.write_bytes(drawn.read_bytes())
    return stale


def _block(match: re.Match[str]) -> str:
    kind, name = match[2], match[3]
    if kind not in _KINDS:
        raise ValueError(f"{match[1].strip()}: expected one of {', '.join(_KINDS)}")
    return f"{match[1]}\n{_KINDS[kind](load(RESULTS / f'{name}.json'))}\n\n{match[4]}"


def _facts(record: Record) -> str:
    return "; ".join(f"{name} {fact}" for name, fact in record.machine.items())


_KINDS: dict[str, Callable[[Record], str]] = {
    "facts": _facts,
    "summary": lambda record: report.summary(record.results),
    "tables": lambda record: "\n\n".join(report.tables(record.results)),
}
