"""The model behind ``demo`` and ``solve``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffusion_runtime import sudoku
from diffusion_runtime.cli.errors import MISSING, CommandError
from diffusion_runtime.cli.session import load_model
from diffusion_runtime.loading import SHIPPED as CHECKPOINTS

SHIPPED = CHECKPOINTS / "sudoku"


def load_sudoku_model(path: str | None, device: str, *, quiet: bool = False) -> Any:
    """The shipped model, or the one in the folder ``path``, which must read the tokens of a Sudoku board."""
    if path is None and not (SHIPPED / "model.safetensors").is_file():
        raise CommandError(
            f"the Sudoku model is not in this installation ({SHIPPED}); train one with examples/train_sudoku.py and "
            "name its folder with --model",
            MISSING,
        )
    # the model is small, and few CPUs are quick in the bfloat16 of the file
    model = load_model(path or SHIPPED, device, dtype=torch.float32, quiet=quiet)
    found = (model.mask_token_id, model.config.vocab_size)
    if found != (sudoku.MASK, sudoku.VOCAB_SIZE):
        raise CommandError(
            f"{path} is not a Sudoku model: its mask token and vocabulary are {found[0]} and {found[1]}, expected "
            f"{sudoku.MASK} and {sudoku.VOCAB_SIZE}; leave --model out for the shipped one"
        )
    return model


@contextmanager
def threads_for(num_boards: int) -> Iterator[None]:
    """At most one thread for each board: more gain little, and lose much on a machine that is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, num_boards))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cells(tokens: Tensor) -> list[list[int]]:
    """The 81 tokens of each board; unlike :func:`diffusion_runtime.sudoku.decode`, also those that are no digit."""
    boards: list[list[int]] = tokens[:, list(sudoku.CELL_POSITIONS)].tolist()
    return boards
