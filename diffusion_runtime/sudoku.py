"""Sudoku boards for a masked diffusion model: text, rules, puzzles, and the tokens the shipped checkpoint reads.

A board is 81 integers, row by row; 0 is a blank cell. Nothing here needs a model.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Board = tuple[int, ...]

# The vocabulary: a digit is its own token, a blank cell is the mask. Rotary attention sees distances only, so
# landmarks carry the absolute position: every row begins with a token of its own.
MASK = 0
DIGITS = range(1, 10)
ROW_STARTS = range(10, 19)
BOS = 19
VOCAB_SIZE = 20

CELL_POSITIONS = tuple(1 + 10 * (cell // 9) + 1 + cell % 9 for cell in range(81))
LENGTH = 91

_ROW = tuple(cell // 9 for cell in range(81))
_COLUMN = tuple(cell % 9 for cell in range(81))
_BOX = tuple(cell // 27 * 3 + cell % 9 // 3 for cell in range(81))
_UNITS = tuple(zip(_ROW, _COLUMN, _BOX, strict=True))
_ALL = 0b111111111  # bit d - 1 stands for digit d
# digits of a candidate set, by its bits
_DIGITS_OF = tuple(tuple(d for d in DIGITS if bits >> (d - 1) & 1) for bits in range(512))


def parse(text: str) -> Board:
    """Read a board: 81 digits, ``.`` or ``0`` for a blank; white space, ``|``, ``-`` and ``+`` are decoration.

    Raises:
        ValueError: a character that is none of these, with its cell, or a wrong number of cells.
    """
    cells: list[int] = []
    for character in text:
        if character.isspace() or character in "|-+":
            continue
        if character not in ".0123456789":
            raise ValueError(
                f"expected a digit 1 to 9, or . or 0 for a blank, got {character!r} at {_name(len(cells))}"
            )
        cells.append(0 if character == "." else int(character))
    return _board(cells)


def check(board: Sequence[int]) -> None:
    """Raise ValueError where a board contradicts itself.

    Raises:
        ValueError: a row, column or box holds a digit twice (the message names both cells), or a blank cell has no
            digit left (the message names it).
    """
    board = _board(board)
    for unit, units in (("row", _ROW), ("column", _COLUMN), ("box", _BOX)):
        first: dict[tuple[int, int], int] = {}
        for cell, digit in enumerate(board):
            key = (units[cell], digit)
            if digit and key in first:
                both = f"{_name(first[key])} and {_name(cell)} both hold {digit}"
                raise ValueError(f"{both} in {unit} {units[cell] + 1}")
            first[key] = cell
    rows, columns, boxes, blanks = _state(board)
    for cell in blanks:
        r, c, b = _UNITS[cell]
        if rows[r] | columns[c] | boxes[b] == _ALL:
            raise ValueError(f"no digit is possible at {_name(cell)}")


def is_solution(puzzle: Sequence[int], board: Sequence[int]) -> bool:
    """Whether ``board`` is full, keeps every given of ``puzzle``, and breaks no rule."""
    if len(board) != 81 or any(given not in (0, digit) for given, digit in zip(puzzle, board, strict=True)):
        return False
    full = set(DIGITS)
    groups: dict[tuple[str, int], set[int]] = {}
    for digit, (r, c, b) in zip(board, _UNITS, strict=True):
        for key in (("row", r), ("column", c), ("box", b)):
            groups.setdefault(key, set()).add(digit)
    return all(group == full for group in groups.values())


def encode(boards: Iterable[Sequence[int]]) -> Tensor:
    """Boards to tokens ``[number of boards, LENGTH]`` int64: a beginning, then each row after its own landmark."""
    cells = torch.tensor([_board(board) for board in boards], dtype=torch.int64).reshape(-1, 9, 9)
    starts = torch.tensor(ROW_STARTS).view(1, 9, 1).expand(len(cells), 9, 1)
    rows = torch.cat((starts, cells), dim=2).flatten(1)
    return torch.cat((torch.full((len(cells), 1), BOS), rows), dim=1)


def decode(tokens: Tensor) -> list[Board]:
    """Tokens ``[number of boards, LENGTH]`` back to boards; a mask token gives 0.

    Raises:
        ValueError: the shape is wrong, or a cell holds a token that is neither a digit nor the mask.
    """
    if tokens.ndim != 2 or tokens.shape[1] != LENGTH:
        raise ValueError(f"expected tokens [number of boards, {LENGTH}], got {list(tokens.shape)}")
    return [_board(row) for row in tokens[:, CELL_POSITIONS].tolist()]


def num_solutions(board: Sequence[int], limit: int = 2) -> int:
    """Number of solutions, counted up to ``limit``; a board that contradicts itself has none."""
    return len(_solutions(_board(board), limit))


def solve(board: Sequence[int]) -> Board | None:
    """The first solution found by backtracking, or None."""
    return next(iter(_solutions(_board(board), 1)), None)


def generate(seed: int, num_givens: int) -> tuple[Board, Board]:
    """A puzzle with one solution, and that solution: ``(puzzle, solution)``, the same for a seed on any machine.

    A random full grid is dug in random order while its solution stays unique. Where no further cell can go before
    ``num_givens`` are left, a grid of the next derived seed is taken; that is rare above 26.
    """
    if not 22 <= num_givens <= 81:
        raise ValueError(f"expected num_givens from 22 to 81 (fewer take too long to find), got {num_givens}")
    attempt = 0
    while True:
        rng = random.Random(f"{seed} {attempt}" if attempt else seed)
        solution = random_grid(rng)
        puzzle = dig(solution, num_givens, rng)
        if 81 - puzzle.count(0) == num_givens:
            return puzzle, solution
        attempt += 1


def random_grid(rng: random.Random) -> Board:
    """A full grid, by backtracking over digits in random order."""
    return _solutions((0,) * 81, 1, rng)[0]


def dig(solution: Sequence[int], num_givens: int, rng: random.Random) -> Board:
    """Blank the cells of a full grid in random order, each where the solution stays unique, down to ``num_givens``.

    The result has more givens where no cell can be blanked any more; each cell is tried once, which is enough: a
    cell that cannot go now cannot go later, with fewer givens.
    """
    board = list(solution)
    cells = list(range(81))
    rng.shuffle(cells)
    left = 81
    for cell in cells:
        if left == num_givens:
            break
        digit, board[cell] = board[cell], 0
        if _another(board, cell, digit):
            board[cell] = digit
        else:
            left -= 1
    return tuple(board)


def render(board: Sequence[int]) -> str:
    """The board as lines of text, a dot for a blank; :func:`parse` reads it back."""
    lines = []
    for row in range(9):
        digits = [str(digit) if digit else "." for digit in board[9 * row : 9 * row + 9]]
        lines.append(" | ".join(" ".join(digits[start : start + 3]) for start in (0, 3, 6)))
        if row in (2, 5):
            lines.append("------+-------+------")
    return "\n".join(lines)


def _name(cell: int) -> str:
    return f"row {cell // 9 + 1}, column {cell % 9 + 1}"


def _board(cells: Sequence[int]) -> Board:
    if len(cells) != 81:
        raise ValueError(f"expected 81 cells, got {len(cells)}")
    for cell, digit in enumerate(cells):
        if not 0 <= digit <= 9:
            raise ValueError(f"expected 0 to 9 at {_name(cell)}, got {digit}")
    return tuple(cells)


def _state(board: Sequence[int]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Digits used by each row, column and box, as bits, and the blank cells."""
    rows, columns, boxes, blanks = [0] * 9, [0] * 9, [0] * 9, []
    for cell, digit in enumerate(board):
        if digit == 0:
            blanks.append(cell)
            continue
        r, c, b = _UNITS[cell]
        bit = 1 << (digit - 1)
        rows[r] |= bit
        columns[c] |= bit
        boxes[b] |= bit
    return rows, columns, boxes, blanks


def _another(board: list[int], cell: int, digit: int) -> bool:
    """Whether a solution exists with something other than ``digit`` in the blank ``cell``."""
    rows, columns, boxes, _ = _state(board)
    r, c, b = _UNITS[cell]
    others = _ALL & ~(rows[r] | columns[c] | boxes[b] | 1 << (digit - 1))
    found = False
    for other in _DIGITS_OF[others]:
        board[cell] = other
        if _solutions(board, 1):
            found = True
            break
    board[cell] = 0
    return found


def _solutions(board: Sequence[int], limit: int, rng: random.Random | None = None) -> list[Board]:
    """Up to ``limit`` solutions by backtracking, the cell with the fewest candidates first."""
    filled = list(board)
    rows, columns, boxes, blanks = _state(board)
    givens = 81 - len(blanks)
    # a digit twice in a unit sets one bit for two cells
    if any(sum(used.bit_count() for used in units) != givens for units in (rows, columns, boxes)):
        return []
    solutions: list[Board] = []

    def search() -> None:
        if not blanks:
            solutions.append(tuple(filled))
            return
        fewest, chosen, candidates = 10, 0, 0
        for index, cell in enumerate(blanks):
            r, c, b = _UNITS[cell]
            free = _ALL & ~(rows[r] | columns[c] | boxes[b])
            count = free.bit_count()
            if count < fewest:
                fewest, chosen, candidates = count, index, free
                if count <= 1:
                    break
        # constant-time removal; the order of the blanks is undone below, so that the search is deterministic
        cell, blanks[chosen] = blanks[chosen], blanks[-1]
        blanks.pop()
        r, c, b = _UNITS[cell]
        digits = list(_DIGITS_OF[candidates])
        if rng is not None:
            rng.shuffle(digits)
        for digit in digits:
            bit = 1 << (digit - 1)
            filled[cell] = digit
            rows[r] |= bit
            columns[c] |= bit
            boxes[b] |= bit
            search()
            rows[r] ^= bit
            columns[c] ^= bit
            boxes[b] ^= bit
            if len(solutions) >= limit:
                break
        if chosen == len(blanks):
            blanks.append(cell)
        else:
            blanks.append(blanks[chosen])
            blanks[chosen] = cell

    search()
    return solutions
