"""The Sudoku board in a terminal, with what the current step did beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffusion_runtime import sudoku

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

WIDTH = 68
HEIGHT = 18

_SURE, _LIKELY = 0.95, 0.7
_GIVEN, _BLANK, _WRONG = "bold", "dim", "bold white on red"
_BAR = 30


@dataclass
class View:
    """What there is to see of one puzzle."""

    puzzle: sudoku.Board
    name: str
    num_steps: int | None = None  # None: not known ahead
    cells: Sequence[int] = ()
    confidence: list[float] = field(default_factory=lambda: [0.0] * 81)  # of a cell when it was decided
    fresh: set[int] = field(default_factory=set)  # decided by the current step
    wrong: set[int] = field(default_factory=set)
    least_confidence: float | None = None  # of the current step; in the end, of all
    num_forwards: int = 0
    seconds: float = 0.0
    finished: bool = False
    fault: str | None = None

    def __post_init__(self) -> None:
        self.cells = self.cells or self.puzzle

    @property
    def num_blanks(self) -> int:
        return self.puzzle.count(0)

    @property
    def title(self) -> str:
        return f"{self.name}: {81 - self.num_blanks} givens, {self.num_blanks} blanks"

    @property
    def verdict(self) -> str:
        return "solved" if self.fault is None else f"not solved: {self.fault}"


def draw(view: View) -> Table:
    """The board, and beside it the numbers, as something rich can print."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 3))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=False)
    table.add_row(Text(""))
    table.add_row(Text("\n").join(_board_lines(view)), Text("\n").join(_panel_lines(view)))
    table.add_row(Text(""))
    return table


def _board_lines(view: View) -> list[Text]:
    from rich.text import Text

    def rule(left: str, middle: str, right: str) -> Text:
        return Text(f" {left}{middle.join(['─' * 9] * 3)}{right}", style="dim")

    lines = [rule("┌", "┬", "┐")]
    for row in range(9):
        line = Text(" ")
        for column in range(9):
            if column % 3 == 0:
                line.append("│", style="dim")
            line.append(*_cell(view, 9 * row + column))
        lines.append(line.append("│", style="dim"))
        if row in (2, 5):
            lines.append(rule("├", "┼", "┤"))
    return [*lines, rule("└", "┴", "┘")]


def _cell(view: View, cell: int) -> tuple[str, str]:
    """Three characters and their style."""
    digit = view.cells[cell]
    if digit == sudoku.MASK:
        return " · ", _BLANK
    text = f" {digit} " if digit in sudoku.DIGITS else " ? "
    if cell in view.wrong:
        return text, _WRONG
    if view.puzzle[cell]:
        return text, _GIVEN
    colour = _colour(view.confidence[cell])
    return text, f"bold black on {colour}" if cell in view.fresh else colour


def _colour(confidence: float) -> str:
    return "green" if confidence >= _SURE else "yellow" if confidence >= _LIKELY else "red"


def _panel_lines(view: View) -> list[Text]:
    from rich.text import Text

    least = "-" if view.least_confidence is None else f"{view.least_confidence:.3f}"
    left = view.cells.count(sudoku.MASK)
    rows = (
        ("step", str(view.num_forwards) if view.num_steps is None else f"{view.num_forwards} of {view.num_steps}"),
        ("forwards", str(view.num_forwards)),
        ("committed", str(len(view.fresh)) if not view.finished else "-"),
        ("blanks left", str(left)),
        ("least confidence", least),
        ("seconds", f"{view.seconds:.2f}"),
    )
    lines = [Text(view.title, style="bold"), Text("")]
    lines += [Text.assemble((f"{name:<18}", "dim"), value) for name, value in rows]
    done = _BAR * (view.num_blanks - left) // max(view.num_blanks, 1)
    lines += [Text(""), Text.assemble(("━" * done, "green"), ("─" * (_BAR - done), "dim")), Text("")]
    return [*lines, *_bottom_lines(view)]


def _bottom_lines(view: View) -> list[Text]:
    from rich.text import Text

    if view.finished:
        return [Text(view.verdict, style="bold green" if view.fault is None else "bold red")]
    legend = Text.assemble(("given", _GIVEN), "  ", ("blank", _BLANK), "  ", (" new ", "bold black on green"))
    colours = Text.assemble(
        "confidence  ",
        (f"≥{_SURE:.2f}", "green"),
        "  ",
        (f"≥{_LIKELY:.2f}", "yellow"),
        "  ",
        (f"<{_LIKELY:.2f}", "red"),
    )
    return [legend, colours]
