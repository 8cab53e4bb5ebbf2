"""How figures and tables are written."""

from __future__ import annotations

from collections.abc import Iterable

from bench.memory import GAUGE_ERROR_MB
from bench.timing import Spread


def table(rows: Iterable[dict[str, str]]) -> str:
    """A markdown table whose columns are aligned, so that it reads in a terminal as well."""
    rows = list(rows)
    if not rows:
        return ""
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells)


def significant(value: float) -> str:
    """Three digits."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def number(spread: Spread) -> str:
    return f"{significant(spread.median)} ({significant(spread.low)}-{significant(spread.high)})"


def megabytes(value: float | None) -> str:
    """No finer than the measurement is."""
    if value is None:
        return "-"
    if value < GAUGE_ERROR_MB:
        return f"<{GAUGE_ERROR_MB}"
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"
