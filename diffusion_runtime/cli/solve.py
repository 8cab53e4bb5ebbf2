"""``diffusion-runtime solve``: many puzzles at once, each answer checked against the rules."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from diffusion_runtime import sudoku
from diffusion_runtime.cli.errors import DONE, NOT_SOLVED, CommandError
from diffusion_runtime.cli.output import Progress, note, print_json
from diffusion_runtime.cli.parser import check_decoding
from diffusion_runtime.cli.puzzles import Puzzle, as_line, fault, read_puzzles
from diffusion_runtime.cli.session import denoise, make_denoiser, sampling_backend, trace_file
from diffusion_runtime.cli.sudoku_model import cells, load_sudoku_model, threads_for
from diffusion_runtime.denoiser import Denoiser

_BATCH = 256  # puzzles denoised together; the answers do not depend on it
# Counting solutions is quick from so many givens on, and stops after this many seconds in all.
_COUNTABLE = 25
_COUNTING_SECONDS = 1.0


@dataclass
class Answer:
    """What the model made of one puzzle."""

    puzzle: Puzzle
    cells: Sequence[int]
    num_forwards: int  # until its last blank was decided
    seconds: float  # the same, with its whole batch
    num_solutions: int | None = None  # of the puzzle: 0, 1, 2 for several, None for not counted

    def __post_init__(self) -> None:
        self.fault = fault(self.puzzle.board, self.cells)

    @property
    def verdict(self) -> str:
        if self.fault is None:
            return "solved; it has several solutions" if self.num_solutions == 2 else "solved"
        remark = "; the puzzle has no solution" if self.num_solutions == 0 else ""
        return f"not solved: {self.fault}{remark}"

    def as_json(self) -> dict[str, Any]:
        return {
            "puzzle": as_line(self.puzzle.board),
            "solution": None if self.fault else as_line(self.cells),
            "solved": self.fault is None,
            "answer": as_line(self.cells),
            "verdict": self.verdict,
            "num_solutions": self.num_solutions,
            "forwards": self.num_forwards,
            "seconds": round(self.seconds, 6),
        }


def run(args: argparse.Namespace) -> int:
    """Solve what the arguments name and print the answers in their order."""
    check_decoding(args)
    puzzles = read_puzzles(args.puzzles)
    if args.trace is not None and len(puzzles) > _BATCH:
        raise CommandError(f"--trace takes at most {_BATCH} puzzles, which are solved together, got {len(puzzles)}")
    with trace_file(args.trace) as file:
        model = load_sudoku_model(args.model, args.device, quiet=args.quiet)
        denoiser = make_denoiser(model, args)
        started = time.perf_counter()
        answers: list[Answer] = []
        for first in range(0, len(puzzles), _BATCH):
            batch = puzzles[first : first + _BATCH]
            with threads_for(len(batch)):
                answers += _solve_batch(denoiser, batch, args, file, first, len(puzzles))
        seconds = time.perf_counter() - started
    _count_solutions(answers)
    num_solved = sum(answer.fault is None for answer in answers)
    if args.json:
        print_json([answer.as_json() for answer in answers])
    else:
        print("\n".join(_lines(answers)), flush=True)
    if not args.quiet and not args.json:
        most = max(answer.num_forwards for answer in answers)
        ran = f"{args.policy}, at most {most} forwards, {seconds:.2f} s, sampling on {sampling_backend(model, args)}"
        note(f"{num_solved} of {len(answers)} solved: {ran}")
    return DONE if num_solved == len(answers) else NOT_SOLVED


def _solve_batch(
    denoiser: Denoiser, puzzles: list[Puzzle], args: argparse.Namespace, file: TextIO | None, first: int, total: int
) -> list[Answer]:
    tokens = sudoku.encode(puzzle.board for puzzle in puzzles).to(args.device)
    finished = [(0, 0.0)] * len(puzzles)
    progress = Progress(quiet=args.quiet)
    about = {"policy": args.policy, "steps": args.steps, "temperature": args.temperature, "seed": args.seed}
    for progressed in denoise(denoiser, tokens, file=file, text_of=_text_of, about=about, seed=args.seed):
        tokens = progressed.step.tokens
        for row in progressed.step.commit_mask.any(1).nonzero()[:, 0].tolist():
            finished[row] = (progressed.num_forwards, progressed.seconds)
        among = f"puzzles {first + 1} to {first + len(puzzles)} of {total}"
        progress.update(f"{among}: forward {progressed.num_forwards}, {progressed.num_left} blanks left")
    rows = zip(puzzles, cells(tokens), finished, strict=True)
    return [Answer(puzzle, answer, *reached) for puzzle, answer, reached in rows]


def _text_of(token: int) -> bytes:
    """A grid: the landmark before a row is a line break."""
    return b"" if token in (sudoku.MASK, sudoku.BOS) else str(token).encode() if token <= 9 else b"\n"


def _count_solutions(answers: list[Answer]) -> None:
    """Note how many solutions the puzzles have, as far as that takes little time."""
    deadline = time.monotonic() + _COUNTING_SECONDS
    for answer in answers:
        if time.monotonic() > deadline:
            return
        if 81 - answer.puzzle.board.count(0) >= _COUNTABLE:
            answer.num_solutions = sudoku.num_solutions(answer.puzzle.board, limit=2)


def _lines(answers: list[Answer]) -> Iterator[str]:
    """One puzzle as a grid; more of them on a line each."""
    if len(answers) > 1:
        yield from (f"{as_line(answer.cells)}  {answer.verdict}" for answer in answers)
        return
    only = answers[0]
    yield sudoku.render([digit if digit <= 9 else 0 for digit in only.cells])
    yield only.verdict
