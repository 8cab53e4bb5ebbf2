"""The command line: usage, text, doctor, and how a command ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_cases import PUZZLE, Captured, error_of, write_model

from diffusion_runtime import sudoku
from diffusion_runtime.cli import main, parser
from diffusion_runtime.decoding import POLICIES
from diffusion_runtime.ops._registry import BACKENDS, REGISTRY

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["[MASK]", "[UNK]", "the", "cat", "sat", "on", "mat", "a"]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with random weights and without a tokenizer."""
    return write_model(tmp_path_factory.mktemp("untrained"), sudoku.VOCAB_SIZE)


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with a tokenizer of whole words."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("speaker")
    words = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return write_model(folder, len(WORDS))


@pytest.fixture(scope="module")
def speller(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with a tokenizer of single bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("speller")
    names = ["<mask>", "<end>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<mask>", "<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return write_model(folder, len(names))


# --- usage


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys, types; package = types.ModuleType('diffusion_runtime'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['diffusion_runtime'] = package\n"
        "from diffusion_runtime.cli import main\n"
        "assert main(['--help']) == main(['solve', '--help']) == 0 and main(['solve', '--steps', '0', 'x']) == 2\n"
        "heavy = {'torch', 'rich', 'tokenizers', 'numpy'} & sys.modules.keys(); assert not heavy, heavy"
    )
    command = [sys.executable, "-c", code, str(ROOT / "diffusion_runtime")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "examples:" in result.stdout


def test_the_names_in_the_parser_are_those_of_the_library() -> None:
    assert set(parser.SCHEDULED) == {name for name, policy in POLICIES.items() if policy.scheduled}
    assert set(parser.DECIDING_THEMSELVES) == {name for name, policy in POLICIES.items() if not policy.scheduled}
    assert set(parser.BACKENDS) == set(BACKENDS)


def test_version(capsys: Captured) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"diffusion-runtime \d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["dance"], "invalid choice"),
        (["demo", "--policy", "luck"], "low_confidence"),
        (["solve", PUZZLE, "--steps", "0"], "whole number from 1"),
        (["solve", PUZZLE, "--temperature", "nan"], "number from 0"),
        (["solve", PUZZLE, "--seed", str(2**64)], "whole number from 0 to"),
        (["solve", PUZZLE, "--threshold", "0.5"], "leave one of them out"),
        (["solve", PUZZLE, "--policy", "threshold", "--steps", "4"], "leave --steps out"),
        (["solve", PUZZLE, "--trace", "/nowhere/trace"], "cannot write /nowhere/trace"),
        (["infill", "a", "--model", "m", "--mask", "____"], "MARK=N"),
    ],
)
def test_usage_errors(capsys: Captured, arguments: list[str], message: str) -> None:
    assert message in error_of(capsys, arguments, 2)


# --- text


def test_generate(capsys: Captured, speaker: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    arguments = ["generate", "the cat", "--model", speaker, "--max-new-tokens", "6", "--block-length", "3"]
    arguments += ["--temperature", "1", "--seed", "7"]
    assert main([*arguments, "--json", "--trace", str(trace)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["prompt"] == "the cat"
    assert (len(document["tokens"]), document["forwards"]) == (6, 6)
    assert 0 not in document["tokens"]
    assert document["text"] == " ".join(WORDS[token] for token in document["tokens"])
    assert len(trace.read_text().splitlines()) == 1 + 6
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out == document["text"] + "\n"
    assert err.splitlines()[-1].startswith("low_confidence, 6 forwards, ")


def test_infill(capsys: Captured, speaker: str) -> None:
    text = "the [MASK] sat ____ a [MASK:2]"
    assert main(["infill", text, "--model", speaker, "--mask", "____=3", "--policy", "threshold", "--json"]) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    assert len(tokens) == 9
    assert [tokens[0], tokens[2], tokens[6]] == [WORDS.index(word) for word in ("the", "sat", "a")]
    assert 0 not in tokens


def test_text_is_refused(capsys: Captured, speaker: str, untrained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "has no tokenizer.json" in error_of(capsys, ["generate", "a", "--model", untrained], 3)
    assert "write [MASK]" in error_of(capsys, ["infill", "the cat", "--model", speaker], 2)
    assert "infill fills" in error_of(capsys, ["generate", "the [MASK]", "--model", speaker], 2)
    steps = ["--max-new-tokens", "6", "--block-length", "3", "--steps", "3"]
    assert "multiple of the 2 blocks" in error_of(capsys, ["generate", "the", "--model", speaker, *steps], 2)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install 'diffusion-runtime[cli]'" in error_of(capsys, ["generate", "a", "--model", speaker], 3)


def test_half_denoised_text_comes_in_pieces(speaker: str) -> None:
    from diffusion_runtime.cli.tokens import TextTokens

    tokens = TextTokens(Path(speaker) / "tokenizer.json")
    tokens.fit(0, len(WORDS))
    pieces = tokens.pieces([2, 3, 0, 0, 4, 5], [False, False, False, False, True, False])
    assert pieces == [("decided", "the cat"), ("blank", "░░"), ("fresh", " sat"), ("decided", " on")]


# --- doctor, and how a command ends


def test_doctor_knows_every_op(capsys: Captured) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ops"].keys() == REGISTRY.keys()
    for by_device in report["ops"].values():
        for by_dtype in by_device.values():
            assert by_dtype.keys() == {"float32", "bfloat16", "float16"}
            assert all(outcome["candidates"]["reference"] == "ok" for outcome in by_dtype.values())
    assert report["versions"]["torch"] == torch.__version__
    assert bool(report["devices"]["cuda"]["devices"]) == torch.cuda.is_available()
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name}\n" in out for name in REGISTRY)
    assert max(map(len, out.splitlines())) < 200


def test_doctor_survives_a_broken_backend(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("half installed")

    monkeypatch.setattr("diffusion_runtime.ops._registry.Implementation.rejects", broken)
    assert main(["doctor"]) == 0
    assert "fails to load: RuntimeError: half installed" in capsys.readouterr().out


def test_interrupted_and_closed_pipe(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("diffusion_runtime.cli.doctor.run", interrupt)
    assert main(["doctor"]) == 130
    assert capsys.readouterr() == ("", "")
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "diffusion_runtime", "--version"]
    result = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (result.returncode, result.stderr) == (141, "")


def test_answers_in_a_language(capsys: Captured, speller: str, tmp_path: Path) -> None:
    run = ["generate", "x", "--model", speller, "--temperature", "1", "--policy", "random", "--quiet"]
    assert main([*run, "--regex", "[ab]{3}c+", "--stop", "<end>", "--max-new-tokens", "9"]) == 0
    assert re.fullmatch("[ab]{3}c{1,6}\n", capsys.readouterr().out)
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["yes", "no"]}')
    assert main([*run, "--json-schema", str(schema), "--stop", "<end>", "--max-new-tokens", "9"]) == 0
    assert json.loads(capsys.readouterr().out) in ("yes", "no")
    assert main(["infill", "x[MASK:2]a", "--model", speller, "--regex", "é", "--quiet"]) == 0
    assert capsys.readouterr().out == "xéa\n"
    assert "no text of the constraint fits 9 positions" in error_of(
        capsys, [*run, "--regex", "a", "--max-new-tokens", "9"], 2
    )
    assert "cannot be used" in error_of(capsys, [*run, "--regex", "("], 2)
    assert "No such file" in error_of(capsys, [*run, "--json-schema", "/nowhere"], 2)
    assert "no token '<stop>'" in error_of(capsys, [*run, "--stop", "<stop>"], 2)


def test_a_language_needs_tokens_of_bytes(capsys: Captured, speaker: str) -> None:
    run = ["generate", "cat", "--model", speaker, "--quiet", "--regex", "a"]
    assert "decoder must be byte-level" in error_of(capsys, run, 2)


def test_an_answer_ends_where_the_model_says_so(capsys: Captured, speller: str, tmp_path: Path) -> None:
    folder = tmp_path / "ending"
    shutil.copytree(speller, folder)
    config = json.loads((folder / "config.json").read_text())
    run = ["generate", "x", "--model", str(folder), "--regex", "ab?", "--max-new-tokens", "9", "--json"]
    assert "no text of the constraint fits 9 positions" in error_of(capsys, run, 2)
    for named in (1, [1, 2]):
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": named}))
        assert main(run) == 0
        assert json.loads(capsys.readouterr().out)["text"] in ("a", "ab")
    for named in ("<end>", 1 << 20, [-1], True):
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": named}))
        assert "eos_token_id must be tokens below" in error_of(capsys, run, 2)


# --- bench


def test_bench_hands_over_all_that_stands_behind_it(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["bench", "show", "--help"]) == 0
    assert "usage: bench show" in capsys.readouterr().out
    assert main(["bench", "--quick", "--full"]) == 2
    assert "not allowed with argument" in capsys.readouterr().err
    monkeypatch.setattr("diffusion_runtime.cli.bench.REPOSITORY", Path("/nowhere"))
    assert "clone the repository" in error_of(capsys, ["bench", "--quick"], 3)
