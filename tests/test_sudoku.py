"""Sudoku: text, rules, puzzles, tokens, and the checkpoint that ships."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import diffusion_runtime
from diffusion_runtime import sudoku

CHECKPOINT = Path(diffusion_runtime.__file__).parent / "checkpoints" / "sudoku"
PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"


def test_parse_ignores_decoration() -> None:
    board = sudoku.parse(PUZZLE)
    assert sudoku.parse(sudoku.render(board)) == board
    assert sudoku.parse(PUZZLE.replace(".", "0")) == board
    assert board[:5] == (5, 3, 0, 0, 7)


@pytest.mark.parametrize(("text", "got"), [("", 0), ("1" * 80, 80), ("." * 82, 82)])
def test_parse_counts_the_cells(text: str, got: int) -> None:
    with pytest.raises(ValueError, match=f"expected 81 cells, got {got}"):
        sudoku.parse(text)


def test_parse_names_the_cell_of_a_bad_character() -> None:
    with pytest.raises(ValueError, match="got 'x' at row 3, column 5"):
        sudoku.parse("." * 22 + "x" + "." * 58)
    # an Arabic-Indic digit is a digit to str.isdigit
    with pytest.raises(ValueError, match="row 1, column 1"):
        sudoku.parse("\u0663" + "." * 80)


@pytest.mark.parametrize("function", [sudoku.check, sudoku.num_solutions, sudoku.solve, lambda b: sudoku.encode([b])])
@pytest.mark.parametrize(
    ("board", "message"),
    [([0] * 80, "81 cells, got 80"), ([0] * 9 + [10] + [0] * 71, "row 2, column 1, got 10")],
)
def test_what_is_no_board_is_refused(function: Callable[[list[int]], Any], board: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(board)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({1: 5, 6: 5}, "row 1, column 2 and row 1, column 7 both hold 5 in row 1"),
        ({4: 9, 76: 9}, "row 1, column 5 and row 9, column 5 both hold 9 in column 5"),
        ({60: 1, 80: 1}, "row 7, column 7 and row 9, column 9 both hold 1 in box 9"),
        ({0: 1, 1: 2, 2: 3, 3: 4, 4: 5, 5: 6, 15: 7, 17: 8, 80: 9, 53: 9}, "row 6, column 9 and row 9, column 9"),
        ({1: 1, 2: 2, 3: 3, 9: 4, 18: 5, 27: 6, 36: 7, 10: 8, 20: 9}, "no digit is possible at row 1, column 1"),
    ],
)
def test_check_names_the_contradiction(cells: dict[int, int], message: str) -> None:
    board = [cells.get(cell, 0) for cell in range(81)]
    with pytest.raises(ValueError, match=message):
        sudoku.check(board)
    assert sudoku.num_solutions(board) == 0
    assert sudoku.solve(board) is None


def test_solve_and_rules() -> None:
    puzzle, solution = sudoku.parse(PUZZLE), sudoku.parse(SOLUTION)
    sudoku.check(puzzle)
    sudoku.check(solution)
    assert sudoku.solve(puzzle) == solution
    assert sudoku.num_solutions(puzzle) == 1
    assert sudoku.is_solution(puzzle, solution)
    assert not sudoku.is_solution(puzzle, puzzle)
    assert not sudoku.is_solution(puzzle, solution[:80])
    swapped = tuple({1: 2, 2: 1}.get(digit, digit) for digit in solution)
    assert sudoku.is_solution([0] * 81, swapped)
    assert not sudoku.is_solution(puzzle, swapped)  # the givens are not kept


def test_num_solutions_stops_at_the_limit() -> None:
    assert sudoku.num_solutions([0] * 81, limit=5) == 5
    # four cells of two digits in two boxes can be swapped
    grid = list(sudoku.parse(SOLUTION))
    pairs = [
        (a, b, c, d)
        for a in range(81)
        for b in range(a + 1, a // 9 * 9 + 9)
        for c, d in ((a + 9 * k, b + 9 * k) for k in (1, 2) if (a // 9) % 3 + k < 3)
        if a % 9 // 3 != b % 9 // 3 and (grid[a], grid[b]) == (grid[d], grid[c])
    ]
    a, b, c, d = pairs[0]
    grid[a] = grid[b] = grid[c] = grid[d] = 0
    assert sudoku.num_solutions(grid, limit=9) == 2


@pytest.mark.parametrize("num_givens", [25, 30, 40, 81])
def test_generated_puzzles_have_one_solution(num_givens: int) -> None:
    for seed in range(5):
        puzzle, solution = sudoku.generate(seed, num_givens)
        assert 81 - puzzle.count(0) == num_givens
        assert sudoku.num_solutions(puzzle) == 1
        assert sudoku.is_solution(puzzle, solution)
        assert sudoku.generate(seed, num_givens) == (puzzle, solution)


def test_generate_is_pinned() -> None:
    puzzle, _ = sudoku.generate(7, 30)
    assert (
        "".join(map(str, puzzle)) == "000007098070009025000540000500020007691000000800006310038600000400008030005030981"
    )
    assert sudoku.generate(8, 30)[0] != puzzle


@pytest.mark.parametrize("num_givens", [16, 82])
def test_generate_refuses_impossible_numbers(num_givens: int) -> None:
    with pytest.raises(ValueError, match=f"got {num_givens}"):
        sudoku.generate(0, num_givens)


def test_dig_keeps_every_given_that_is_needed() -> None:
    solution = sudoku.parse(SOLUTION)
    puzzle = sudoku.dig(solution, 0, random.Random(3))
    for cell in (cell for cell in range(81) if puzzle[cell]):
        fewer = [*puzzle[:cell], 0, *puzzle[cell + 1 :]]
        assert sudoku.num_solutions(fewer) == 2


def test_tokens_round_trip() -> None:
    boards = [sudoku.parse(PUZZLE), sudoku.parse(SOLUTION)]
    tokens = sudoku.encode(boards)
    assert tokens.shape == (2, sudoku.LENGTH)
    assert tokens.dtype == torch.int64
    assert tokens[0, 0] == sudoku.BOS
    assert tokens[1, 1::10].tolist() == list(sudoku.ROW_STARTS)
    assert (tokens == sudoku.MASK).sum(1).tolist() == [PUZZLE.count("."), 0]
    assert sudoku.decode(tokens) == boards
    assert sudoku.encode([]).shape == (0, sudoku.LENGTH)
    assert sudoku.decode(sudoku.encode([])) == []


def test_decode_names_what_is_wrong() -> None:
    tokens = sudoku.encode([[0] * 81])
    with pytest.raises(ValueError, match=r"got \[1, 90\]"):
        sudoku.decode(tokens[:, 1:])
    tokens[0, sudoku.CELL_POSITIONS[12]] = sudoku.BOS
    with pytest.raises(ValueError, match="row 2, column 4, got 19"):
        sudoku.decode(tokens)


def test_the_checkpoint_solves_held_out_puzzles() -> None:
    from diffusion_runtime.denoiser import Denoiser
    from diffusion_runtime.loading import load

    assert (CHECKPOINT / "model.safetensors").stat().st_size < 8_000_000
    # seeds at or above 1,000,000,000 were not trained on (examples/sudoku_data.py)
    pairs = [sudoku.generate(1_036_000_000 + i, 36 + i % 10) for i in range(100)]
    # at every forward the most confident cells, about five of a puzzle
    denoiser = Denoiser(load(CHECKPOINT, dtype=torch.float32), policy="low_confidence", num_steps=8)
    boards = sudoku.decode(denoiser.infill(sudoku.encode(puzzle for puzzle, _ in pairs)))
    solved = sum(sudoku.is_solution(puzzle, board) for (puzzle, _), board in zip(pairs, boards, strict=True))
    assert solved >= 90
