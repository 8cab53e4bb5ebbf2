"""Puzzles from arguments, files and standard input, and what is wrong with an answer."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from diffusion_runtime import sudoku
from diffusion_runtime.cli.errors import MISSING, CommandError

_DECORATION = "|-+"
# one line with so many cells is meant as a whole puzzle, not as a row of a grid
_WHOLE = 18


class Puzzle(NamedTuple):
    origin: str  # where it was found
    board: sudoku.Board


def read_puzzles(arguments: Sequence[str]) -> list[Puzzle]:
    """Every puzzle that the arguments name, checked.

    Raises:
        CommandError: a puzzle is malformed or contradicts itself, or a file cannot be read.
    """
    puzzles: list[Puzzle] = []
    for argument in arguments:
        for origin, text in _texts(argument):
            name = f"puzzle {len(puzzles) + 1} ({origin})" if origin else f"puzzle {len(puzzles) + 1}"
            try:
                board = sudoku.parse(text)
                sudoku.check(board)
            except ValueError as error:
                raise CommandError(f"{name}: {error}; nothing was solved, correct it and try again") from error
            puzzles.append(Puzzle(name, board))
    if not puzzles:
        raise CommandError("no puzzle was given; a puzzle is 81 characters, with . or 0 for a blank")
    return puzzles


def _texts(argument: str) -> Iterator[tuple[str, str]]:
    """The text of each puzzle with its place."""
    if argument == "-":
        yield from _split(sys.stdin.read(), "standard input")
    elif os.path.isfile(argument):
        try:
            with open(argument, encoding="utf-8-sig", errors="replace") as file:
                content = file.read()
        except OSError as error:
            raise CommandError(f"cannot read {argument}: {error.strerror}", MISSING) from error
        yield from _split(content, argument)
    elif 2 * sum(character in ".0123456789" for character in argument) > len(argument):
        yield "", argument
    else:
        raise CommandError(f"no file {argument}, and not a puzzle: that is 81 digits, with . or 0 for a blank", MISSING)


def _split(content: str, source: str) -> Iterator[tuple[str, str]]:
    """Puzzles of a line each, and grids that end at a blank line."""
    grid: list[str] = []
    first = 0
    for number, line in enumerate([*content.splitlines(), ""], 1):
        text, comment, _ = line.partition("#")
        whole = sum(not character.isspace() and character not in _DECORATION for character in text) >= _WHOLE
        ends = not text.strip() and not comment
        if grid and (whole or ends):
            yield f"{source}, line {first}", "\n".join(grid)
            grid = []
        if whole:
            yield f"{source}, line {number}", text
        elif text.strip():
            first = first if grid else number
            grid.append(text)


def cell_name(cell: int) -> str:
    """A cell as people count them."""
    return f"row {cell // 9 + 1}, column {cell % 9 + 1}"


def fault(puzzle: sudoku.Board, answer: Sequence[int]) -> str | None:
    """Why ``answer``, 81 tokens, is no solution of ``puzzle``; None if it is one."""
    if sudoku.is_solution(puzzle, answer):
        return None
    for cell, (given, digit) in enumerate(zip(puzzle, answer, strict=True)):
        if digit not in sudoku.DIGITS:
            return f"{cell_name(cell)} holds no digit"
        if given not in (0, digit):
            return f"{cell_name(cell)} holds {digit}, but {given} was given"
    try:
        sudoku.check(answer)
    except ValueError as error:
        return str(error)
    raise AssertionError("a full board that keeps the givens and breaks no rule is a solution")


def clashes(answer: Sequence[int]) -> set[int]:
    """The cells of a full answer that hold the digit of another one in the same row, column or box."""
    by_unit: dict[tuple[str, int, int], list[int]] = {}
    for cell, digit in enumerate(answer):
        box = cell // 27 * 3 + cell % 9 // 3
        for unit in (("row", cell // 9, digit), ("column", cell % 9, digit), ("box", box, digit)):
            by_unit.setdefault(unit, []).append(cell)
    return {cell for cells in by_unit.values() if len(cells) > 1 for cell in cells}


def as_line(answer: Sequence[int]) -> str:
    """81 characters: a dot for a blank, a question mark for what is no digit."""
    return "".join("." if digit == 0 else str(digit) if digit <= 9 else "?" for digit in answer)
