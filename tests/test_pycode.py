"""The Python model that ships: its files, what it was kept from seeing, and that it knows some Python."""

from __future__ import annotations

import ast
import bisect
import heapq
import inspect
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_runtime import Denoiser, Request, load
from diffusion_runtime.cli import main
from diffusion_runtime.loading import local_folder

ROOT = Path(__file__).parents[1]
FOLDER = local_folder("pycode")
assert FOLDER is not None
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def model() -> Any:
    return load("pycode", dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def test_the_files_are_small_and_fit_together(model: Any, tokenizer: Any) -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 16e6
    assert tokenizer.get_vocab_size() == model.config.vocab_size == 4096
    assert tokenizer.token_to_id("<|mask|>") == model.mask_token_id == 0
    assert model.block_length == 32
    card = (FOLDER / "README.md").read_text()
    assert "PSF" in card
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card


@pytest.mark.parametrize("text", ["def f(x):\n    return x + 1\n", "é = '\t☃'\r\n", "", "    \n\n\n  a=b<<=3"])
def test_the_tokenizer_loses_nothing(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert not {0, 1} & set(ids)


def test_held_out_modules_were_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import pycode_data

    training, held_out = pycode_data.split()
    assert held_out.keys() == set(pycode_data.HELD_OUT)
    assert not training.keys() & held_out.keys()
    bodies = {body for text in held_out.values() for body in pycode_data.functions(text) if body.count("\n") >= 3}
    assert len(bodies) > 100
    assert not any(bodies & set(pycode_data.functions(text)) for text in training.values())
    said = json.loads((FOLDER / "training.json").read_text())
    if said["python"] == ".".join(map(str, sys.version_info[:3])):
        assert said["training"] == pycode_data.digest(training)
        assert said["held-out"] == pycode_data.digest(held_out)


def test_it_fills_in_code_that_it_has_not_seen(model: Any, tokenizer: Any) -> None:
    """A third of the tokens of two blocks' ends, from held-out modules; guessing the most frequent one gives 5 %."""
    rows = []
    for module in (heapq, bisect, textwrap):
        ids = tokenizer.encode(inspect.getsource(module)).ids
        rows += [ids[start : start + 128] for start in range(0, len(ids) - 128, 128)]
    tokens = torch.tensor(rows)
    hidden = torch.zeros_like(tokens, dtype=torch.bool)
    hidden[:, 97::3] = True
    found = model(tokens.masked_fill(hidden, model.mask_token_id)).argmax(-1)
    assert (found == tokens)[hidden].float().mean() > 0.25


def test_caches_and_batches_change_nothing(model: Any, tokenizer: Any) -> None:
    heads = ("def fibonacci(n):", "def read(self, path):", "class Stack:\n    def push(self, item):")
    requests = [Request(tokenizer.encode(head).ids, max_new_tokens=40, seed=i) for i, head in enumerate(heads)]
    settings: dict[str, Any] = {"policy": "threshold", "temperature": 0.5}
    cached, plain = (Denoiser(model, cache=cache, **settings) for cache in ("block", "none"))
    together = {id(r.request): r.tokens.tolist() for r in cached.serve(requests)}
    for request in requests:
        (alone,) = plain.serve([request])
        assert alone.tokens.tolist() == together[id(request)]


def test_the_commands_use_it(capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--model", "pycode", "--json"]
    assert main(["generate", "def fibonacci(n):", "--max-new-tokens", "24", *run]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"].startswith("\n    ")
    assert answer["forwards"] <= 24
    assert main(["infill", "def double(x):\n    return x [MASK] 2\n", *run]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert text.startswith("def double(x):\n    return x")
    assert text.endswith("2\n")


def test_a_constraint_makes_every_answer_one_statement(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("outlines_core")
    names = r"\n    return [a-z]{1,8}( [-+*/] [a-z0-9]{1,4})?"
    run = ["generate", "def area(width, height):", "--model", "pycode", "--regex", names, "--quiet"]
    assert main([*run, "--max-new-tokens", "12"]) == 0
    function = "def area(width, height):" + capsys.readouterr().out
    (definition,) = ast.parse(function).body
    assert isinstance(definition, ast.FunctionDef)
