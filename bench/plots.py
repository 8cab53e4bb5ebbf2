"""Two pictures of a record: how many times as long peers take, and how times grow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bench.record import Result
from bench.report import fastest
from bench.timing import Spread, ratio, verdict

THEMES = {
    "light": {"text": "#1f2328", "faint": "#d0d7de", "good": "#0969da", "bad": "#cf222e", "other": "#8250df"},
    "dark": {"text": "#e6edf3", "faint": "#30363d", "good": "#58a6ff", "bad": "#ff7b72", "other": "#d2a8ff"},
}


def load_matplotlib() -> Any:
    """The library, which is an extra.

    Raises:
        ImportError: it is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'diffusion-runtime[bench]'") from error
    return matplotlib


def write(results: Iterable[Result], folder: Path) -> list[Path]:
    """``ratios`` and ``growth``, on light and on dark, as SVG; nothing of what the results do not hold.

    Raises:
        ImportError: matplotlib is missing.
    """
    results = list(results)
    written = []
    for name, draw in (("ratios", _ratios), ("growth", _growth)):
        for theme, colours in THEMES.items():
            figure = draw(results, colours)
            if figure is not None:
                path = folder / f"{name}-{theme}.svg"
                # nothing of the day or the machine it was drawn on, so that it can be compared
                figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
                written.append(path)
    return written


def _ratios(results: list[Result], colours: dict[str, str]) -> Any:
    """A row for each op and peer, a dot for each case: blue where ours is faster, red where it is not."""
    rows: dict[str, list[Spread]] = {}
    for result in results:
        for peer in result.of("peer"):
            if not result.at:
                rows.setdefault(f"{result.op}, {peer.name}", []).append(ratio(peer.ms, fastest(result).ms))
    if not rows:
        return None
    figure, axes = _figure(8, 1.0 + 0.24 * len(rows), colours)
    for place, found in enumerate(rows.values()):
        for each in found:
            colour = colours[{"faster": "good", "slower": "bad"}.get(verdict(each), "other")]
            axes.plot([each.low, each.high], [place, place], color=colour, linewidth=1.5, alpha=0.5)
            axes.plot([each.median], [place], "o", color=colour, markersize=4)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color=colours["text"], linewidth=0.8)
    axes.set_xlabel("times as long as ours (right of 1: ours is faster)", color=colours["text"])
    axes.xaxis.set_major_formatter("{x:g}")
    return figure


def _growth(results: list[Result], colours: dict[str, str]) -> Any:
    """A panel for each curve: ours, and its peer."""
    curves = list(_curves(results))
    if not curves:
        return None
    figure, panels = _figure(8, 2.6 * ((len(curves) + 1) // 2), colours, ((len(curves) + 1) // 2, 2))
    for axes, (title, lines) in zip(panels.flat, curves, strict=False):
        for (name, points), colour in zip(lines.items(), ("good", "other", "bad"), strict=False):
            at, spreads = [x for x, _ in points], [spread for _, spread in points]
            axes.fill_between(at, [s.low for s in spreads], [s.high for s in spreads], color=colours[colour], alpha=0.2)
            axes.plot(at, [s.median for s in spreads], "o-", color=colours[colour], markersize=3, label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(title, fontsize=8, color=colours["text"])
        axes.set_ylabel("ms", color=colours["text"])
        axes.legend(fontsize=7, labelcolor=colours["text"], frameon=False)
    for axes in list(panels.flat)[len(curves) :]:
        axes.set_visible(False)
    return figure


def _curves(results: list[Result]) -> Iterator[tuple[str, dict[str, list[tuple[float, Spread]]]]]:
    for group in dict.fromkeys(result.group for result in results if result.at):
        lines: dict[str, list[tuple[float, Spread]]] = {}
        for result in results:
            if result.group == group:
                for timed in (*result.of("ours"), *result.of("peer")):
                    lines.setdefault(timed.name, []).append((result.at, Spread.of(timed.ms)))
        yield group.removeprefix("Growth of "), lines


def _figure(width: float, height: float, colours: dict[str, str], panels: tuple[int, int] = (1, 1)) -> tuple[Any, Any]:
    matplotlib = load_matplotlib()
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 8})
    figure = Figure(figsize=(width, height), layout="constrained")
    found = figure.subplots(*panels)
    for axes in [found] if panels == (1, 1) else found.flat:
        axes.set_facecolor("none")
        axes.tick_params(colors=colours["text"], which="both")
        axes.grid(color=colours["faint"], linewidth=0.6)
        axes.set_axisbelow(True)
        for side in axes.spines.values():
            side.set_color(colours["faint"])
    return figure, found
