"""``diffusion-runtime demo``: the shipped model on puzzles it was not trained on, step by step."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from diffusion_runtime import sudoku
from diffusion_runtime.cli import board
from diffusion_runtime.cli.errors import DONE, NOT_SOLVED
from diffusion_runtime.cli.output import live_console
from diffusion_runtime.cli.parser import check_decoding
from diffusion_runtime.cli.puzzles import clashes, fault
from diffusion_runtime.cli.session import Progressed, denoise, make_denoiser, sampling_backend
from diffusion_runtime.cli.sudoku_model import cells, load_sudoku_model, threads_for
from diffusion_runtime.denoiser import Denoiser

if TYPE_CHECKING:
    from rich.console import Console

# examples/sudoku_data.py keeps the solutions of these thousand puzzles, and all that are equivalent, out of training
_HELD_OUT = range(1_036_000_000, 1_036_001_000)
_GIVENS = range(36, 46)
_DELAY = 0.06


def run(args: argparse.Namespace) -> int:
    """Show each puzzle as it is denoised, then what ran."""
    check_decoding(args)
    console = live_console(board.WIDTH, board.HEIGHT)
    denoiser = make_denoiser(load_sudoku_model(args.model, args.device), args)
    num_solved, num_forwards, seconds = 0, 0, 0.0
    for number in range(args.puzzles):
        view = _view(args, number)
        with threads_for(1):
            if console is None:
                _show_lines(denoiser, view, args)
            else:
                _show_live(console, denoiser, view, args)
        num_solved += view.fault is None
        num_forwards += view.num_forwards
        seconds += view.seconds
    ran = (
        f"{args.policy}, {num_forwards} forwards, {seconds:.2f} s, sampling on {sampling_backend(denoiser.model, args)}"
    )
    print(f"{num_solved} of {args.puzzles} solved: {ran}")
    return DONE if num_solved == args.puzzles else NOT_SOLVED


def _view(args: argparse.Namespace, number: int) -> board.View:
    puzzle = held_out(args.seed + number)
    num_steps = None if args.policy == "threshold" else args.steps or puzzle.count(0)
    return board.View(puzzle, f"puzzle {number + 1} of {args.puzzles}", num_steps)


def held_out(number: int) -> sudoku.Board:
    """One of the thousand puzzles with 36 to 45 givens that training never saw."""
    index = number % len(_HELD_OUT)
    return sudoku.generate(_HELD_OUT[index], _GIVENS[index % len(_GIVENS)])[0]


def _advance(view: board.View, progressed: Progressed) -> None:
    step = progressed.step
    view.cells = cells(step.tokens)[0]
    fresh = cells(step.commit_mask)[0]
    view.fresh = {cell for cell in range(81) if fresh[cell]}
    probability = step.samples.logprob[0].exp().tolist()
    for cell in view.fresh:
        view.confidence[cell] = probability[sudoku.CELL_POSITIONS[cell] - step.blocks[0].start]
    view.least_confidence = progressed.least_confidence
    view.num_forwards, view.seconds = progressed.num_forwards, progressed.seconds


def _finish(view: board.View) -> None:
    view.finished = True
    view.fresh = set()
    decided = [view.confidence[cell] for cell in range(81) if not view.puzzle[cell]]
    view.least_confidence = min(decided, default=None)
    view.fault = fault(view.puzzle, view.cells)
    view.wrong = clashes(view.cells) if view.fault else set()


def _show_live(console: Console, denoiser: Denoiser, view: board.View, args: argparse.Namespace) -> None:
    from rich.live import Live

    delay = _DELAY if args.delay is None else args.delay
    with Live(board.draw(view), console=console, auto_refresh=False) as live:
        for progressed in denoise(denoiser, sudoku.encode([view.puzzle]).to(args.device), file=None):
            time.sleep(delay)
            _advance(view, progressed)
            live.update(board.draw(view), refresh=True)
        time.sleep(delay)
        _finish(view)
        live.update(board.draw(view), refresh=True)


def _show_lines(denoiser: Denoiser, view: board.View, args: argparse.Namespace) -> None:
    print(f"{view.title}\n{sudoku.render(view.puzzle)}", flush=True)
    for progressed in denoise(denoiser, sudoku.encode([view.puzzle]).to(args.device), file=None):
        time.sleep(args.delay or 0)
        _advance(view, progressed)
        placed = (
            ", ".join(f"r{cell // 9 + 1}c{cell % 9 + 1}={view.cells[cell]}" for cell in sorted(view.fresh)) or "nothing"
        )
        least = "" if view.least_confidence is None else f"; least confidence {view.least_confidence:.3f}"
        print(f"step {view.num_forwards}: {placed}; {progressed.num_left} left{least}", flush=True)
    _finish(view)
    print(f"{sudoku.render([digit if digit <= 9 else 0 for digit in view.cells])}\n{view.verdict}", flush=True)
