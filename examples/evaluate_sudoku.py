"""Share of held-out Sudoku puzzles that a checkpoint solves exactly, by order of decoding and number of forwards.

    python examples/evaluate_sudoku.py --forwards 8 16 all

With ``all``, one cell is committed per forward. With a number, as many cells as it takes are committed together.
The weights are stored in bfloat16; arithmetic is float32 unless ``--dtype`` says otherwise.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from sudoku_data import BANDS, held_out

import diffusion_runtime
from diffusion_runtime import sudoku
from diffusion_runtime.denoiser import Denoiser
from diffusion_runtime.loading import load

CHECKPOINT = Path(diffusion_runtime.__file__).parent / "checkpoints" / "sudoku"
POLICIES = ("low_confidence", "topk_margin", "entropy", "random")


def solved(denoiser: Denoiser, pairs: list[tuple[sudoku.Board, sudoku.Board]], batch_size: int) -> int:
    """Number of puzzles whose every cell comes out right."""
    count = 0
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        boards = sudoku.decode(denoiser.infill(sudoku.encode(puzzle for puzzle, _ in batch)))
        count += sum(sudoku.is_solution(puzzle, board) for (puzzle, _), board in zip(batch, boards, strict=True))
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--puzzles", type=int, default=1000, help="number in each band")
    parser.add_argument("--forwards", nargs="+", default=["8", "16", "all"])
    parser.add_argument("--policies", nargs="+", default=POLICIES, choices=POLICIES)
    parser.add_argument("--bands", nargs="+", default=[f"{low}-{high}" for low, high in BANDS])
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load(args.checkpoint, dtype=getattr(torch, args.dtype))
    if args.compile:
        model.compile()
    print(f"| givens | forwards | {' | '.join(args.policies)} |")
    print("|---" * (2 + len(args.policies)) + "|")
    start = time.monotonic()
    for band in args.bands:
        low, high = map(int, band.split("-"))
        pairs = held_out(low, high, args.puzzles)
        for forwards in args.forwards:
            num_steps = None if forwards == "all" else int(forwards)
            counts = [
                solved(Denoiser(model, policy=policy, num_steps=num_steps), pairs, args.batch_size)
                for policy in args.policies
            ]
            cells = " | ".join(f"{100 * count / len(pairs):.1f} %" for count in counts)
            print(f"| {low} to {high} | {forwards} | {cells} |", flush=True)
    print(f"{args.puzzles} puzzles in each band, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
