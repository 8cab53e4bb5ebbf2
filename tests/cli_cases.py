"""What the tests of the command line share: a puzzle, models with random weights, and the shape of an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusion_runtime.cli import main
from diffusion_runtime.models import LLaDA, LLaDAConfig

PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"

Captured = pytest.CaptureFixture[str]


def write_model(folder: Path, vocab_size: int) -> str:
    """A tiny LLaDA checkpoint with random weights; token 0 is its mask."""
    torch.manual_seed(0)
    config = {"d_model": 16, "n_layers": 1, "n_heads": 2, "mlp_hidden_size": 16, "vocab_size": vocab_size}
    config |= {"mask_token_id": 0}
    folder.mkdir(exist_ok=True)
    save_file(LLaDA(LLaDAConfig(**config)).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llada", **config}))
    return str(folder)


def error_of(capsys: Captured, arguments: list[str], code: int) -> str:
    """Run a command that fails with ``code``: nothing on standard output, one line on standard error."""
    assert main(arguments) == code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("loading ")]
    assert out == ""
    assert len(lines) == 1
    assert lines[0].startswith("diffusion-runtime: error: ")
    return lines[0]
