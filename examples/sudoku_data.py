"""Puzzles to train on and puzzles held out, and what keeps the two apart."""

from __future__ import annotations

import random
from collections.abc import Iterator
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion_runtime import sudoku

# training grids come from seeds 0, 1, 2, ...; held-out puzzles from seeds at or above this one
HELD_OUT_SEED = 1_000_000_000
BANDS = ((25, 30), (31, 35), (36, 40), (41, 45))


def held_out(low: int, high: int, count: int, skip: int = 0) -> list[tuple[sudoku.Board, sudoku.Board]]:
    """``count`` held-out puzzles with ``low`` to ``high`` givens, equally many of each number, with solutions.

    The first 1,000 are for the table of results; a ``skip`` of 1,000 or more gives puzzles to watch training with.
    """
    first = HELD_OUT_SEED + 1_000_000 * low + skip
    return [sudoku.generate(first + i, low + i % (high - low + 1)) for i in range(count)]


def held_out_invariants() -> set[bytes]:
    """:func:`invariants` of every grid that is evaluated."""
    sets = [held_out(low, high, 1000) for low, high in (*BANDS, (36, 45))]
    return set(invariants(np.array([solution for each in sets for _, solution in each], dtype=np.int64)))


def _base(seed: int) -> tuple[sudoku.Board, sudoku.Board]:
    rng = random.Random(seed)
    solution = sudoku.random_grid(rng)
    return sudoku.dig(solution, 24, rng), solution


def training_bases(count: int, workers: int, cache: Path | None = None) -> tuple[Tensor, Tensor]:
    """Puzzles dug to 24 givens, or as far as they go, and their solutions: two ``[count or fewer, 81]`` int64.

    A base is dropped when its solution could be a held-out solution under the symmetries of Sudoku.
    """
    if cache is not None and cache.exists():
        pairs = np.load(cache)
    else:
        with Pool(workers) as pool:
            pairs = np.array(pool.map(_base, range(count), chunksize=64), dtype=np.int8)
        if cache is not None:
            np.save(cache, pairs)
    pairs = pairs[:count].astype(np.int64)
    excluded = held_out_invariants()
    kept = [key not in excluded for key in invariants(pairs[:, 1])]
    print(f"{len(pairs)} base puzzles, {len(pairs) - sum(kept)} dropped for a held-out grid with the same invariant")
    puzzles, solutions = torch.from_numpy(pairs[kept]).unbind(1)
    return puzzles, solutions


def invariants(grids: np.ndarray) -> list[bytes]:
    """A key for each full grid ``[n, 81]`` that no symmetry of Sudoku changes.

    Two lines, or two digits, are related by a permutation, and its cycle type survives relabelling, line and band
    permutations, and transposition. The key holds the cycle types of all pairs of rows, of columns and of digits,
    in an order of its own. Different keys prove that grids are not equivalent; equal keys prove nothing.
    """
    grids = grids.reshape(-1, 9, 9) - 1
    column_of = np.argsort(grids, axis=2)  # [n, row, digit]
    row_of = np.argsort(grids.transpose(0, 2, 1), axis=2)  # [n, column, digit]
    by_digit = column_of.transpose(0, 2, 1)  # [n, digit, row]
    rows, columns, digits = (_cycle_types(lines) for lines in (column_of, row_of, by_digit))
    keys = []
    for row, column, digit in zip(rows, columns, digits, strict=True):
        lines = sorted(b"".join(sorted(_line_key(kinds, i) for i in range(9))) for kinds in (row, column))
        keys.append(b"".join([*lines, *sorted(bytes(sorted(kinds)) for kinds in digit.tolist())]))
    return keys


def _line_key(kinds: np.ndarray, line: int) -> bytes:
    band = line // 3 * 3
    inside = sorted(kinds[line, band : band + 3].tolist())
    outside = sorted([*kinds[line, :band].tolist(), *kinds[line, band + 3 :].tolist()])
    return bytes(inside + outside)


def _cycle_types(lines: np.ndarray) -> np.ndarray:
    """``[n, 9, 9]`` permutations, nine a grid -> ``[n, 9, 9]`` small codes of the cycle type of each pair."""
    inverse = np.argsort(lines, axis=2)
    n = len(lines)
    codes = np.zeros((n, 9, 9), dtype=np.int64)
    identity = np.arange(9)
    for i in range(9):
        for j in range(9):
            step = np.take_along_axis(inverse[:, j], lines[:, i], axis=1)
            power = step
            # the numbers of fixed points of the square, cube and fourth power tell every cycle type without fixed
            # points apart: 2+2+2+3, 2+2+5, 2+3+4, 2+7, 3+3+3, 3+6, 4+5, 9
            for scale in (1, 10, 3):
                power = np.take_along_axis(step, power, axis=1)
                codes[:, i, j] += scale * (power == identity).sum(1)
    return codes


def batches(puzzles: Tensor, solutions: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Training examples without end: ``(visible, solutions, puzzles)``, each ``[size, 81]`` int64, 0 for a blank.

    Each is a base under a random symmetry, with further cells given so that 24 to 50 are, and then the forward
    process of masked diffusion on what is blank: a mask ratio, and each blank cell masked with that probability.
    """
    rng = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(puzzles), (size,), generator=rng)
        cells = _random_lines(size, rng).unsqueeze(2) * 9 + _random_lines(size, rng).unsqueeze(1)
        transpose = torch.rand(size, 1, 1, generator=rng) < 0.5
        cells = torch.where(transpose, cells.transpose(1, 2), cells).flatten(1)
        relabel = torch.rand(size, 9, generator=rng).argsort(1) + 1
        solution = relabel.gather(1, solutions[chosen].gather(1, cells) - 1)
        given = puzzles[chosen].gather(1, cells) > 0
        # the square leans towards few givens, where the model has most to learn
        num_givens = 24 + (27 * torch.rand(size, 1, generator=rng).square()).long()
        # rank the blanks in random order behind the givens, and give the first of them
        rank = (torch.rand(size, 81, generator=rng) - given.float()).argsort(1).argsort(1)
        given = given | (rank < num_givens)
        # and the square root towards high mask ratios
        ratio = torch.rand(size, 1, generator=rng).sqrt()
        masked = ~given & (torch.rand(size, 81, generator=rng) < ratio)
        yield solution.masked_fill(masked, 0), solution, solution.masked_fill(~given, 0)


def _random_lines(size: int, rng: torch.Generator) -> Tensor:
    """``[size, 9]``: the rows (or columns) in an order that keeps bands together."""
    bands = torch.rand(size, 3, 1, generator=rng).argsort(1)
    inside = torch.rand(size, 3, 3, generator=rng).argsort(2)
    return (3 * bands + inside).flatten(1)
