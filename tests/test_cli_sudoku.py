"""``demo`` and ``solve``: what is refused, what is answered, and that nothing unsolved passes for solved."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli_cases import PUZZLE, SOLUTION, Captured, error_of, write_model

from diffusion_runtime import sudoku
from diffusion_runtime.cli import main
from diffusion_runtime.cli.demo import held_out
from diffusion_runtime.cli.puzzles import as_line, clashes, fault
from diffusion_runtime.cli.solve import Answer, Puzzle
from diffusion_runtime.cli.sudoku_model import SHIPPED

ROOT = Path(__file__).resolve().parents[1]

ship = pytest.mark.skipif(not (SHIPPED / "model.safetensors").is_file(), reason="the Sudoku checkpoint is not here")


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Sudoku model with random weights: it solves nothing."""
    return write_model(tmp_path_factory.mktemp("untrained"), sudoku.VOCAB_SIZE)


# --- solve: what is refused


@pytest.mark.parametrize(
    ("puzzle", "message"),
    [
        (PUZZLE[:-1], "puzzle 2: expected 81 cells, got 80"),
        ("x" + PUZZLE[1:], "'x' at row 1, column 1"),
        ("55" + PUZZLE[2:], "row 1, column 1 and row 1, column 2 both hold 5"),
        ("12345678." + "." * 8 + "9" + "." * 63, "no digit is possible at row 1, column 9"),
    ],
)
def test_a_puzzle_that_cannot_be_is_refused(capsys: Captured, puzzle: str, message: str) -> None:
    assert message in error_of(capsys, ["solve", PUZZLE, puzzle], 2)


def test_a_refusal_names_the_line_of_the_file(capsys: Captured, tmp_path: Path) -> None:
    file = tmp_path / "puzzles.txt"
    file.write_text(f"# two\n{PUZZLE}\n55{PUZZLE[2:]}\n")
    assert f"puzzle 2 ({file}, line 3): row 1, column 1" in error_of(capsys, ["solve", str(file)], 2)
    file.write_text("# none\n\n")
    assert "no puzzle was given" in error_of(capsys, ["solve", str(file)], 2)


def test_what_is_missing(capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untrained: str) -> None:
    assert "no file puzzles.txt" in error_of(capsys, ["solve", "puzzles.txt"], 3)
    assert "config.json" in error_of(capsys, ["solve", PUZZLE, "--model", str(tmp_path)], 3)
    assert "no folder" in error_of(capsys, ["solve", PUZZLE, "--model", "./nowhere"], 3)
    solve = ["solve", PUZZLE, "--model", untrained]
    assert "backend 'cuda' cannot run this call" in error_of(capsys, [*solve, "--backend", "cuda"], 3)
    assert "--device abacus" in error_of(capsys, [*solve, "--device", "abacus"], 3)
    monkeypatch.setattr("diffusion_runtime.cli.sudoku_model.SHIPPED", tmp_path)
    assert "train_sudoku.py" in error_of(capsys, ["demo"], 3)


def test_a_model_of_something_else_is_refused(capsys: Captured, tmp_path: Path) -> None:
    model = write_model(tmp_path / "other", 33)
    assert "not a Sudoku model" in error_of(capsys, ["solve", PUZZLE, "--model", model], 2)


# --- solve: what is answered


def test_an_unsolved_answer_is_reported_as_unsolved(capsys: Captured, untrained: str) -> None:
    assert main(["solve", PUZZLE, "--model", untrained, "--steps", "3"]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 12
    assert out.splitlines()[-1].startswith("not solved: row ")
    assert "0 of 1 solved: low_confidence" in err
    assert main(["demo", "--model", untrained, "--steps", "3"]) == 1
    out = capsys.readouterr().out
    assert "\nnot solved: row " in out
    assert re.fullmatch(r"0 of 1 solved: low_confidence, 3 forwards, [\d.]+ s, sampling on \S+", out.splitlines()[-1])
    assert "\x1b" not in out


def test_json_and_trace(capsys: Captured, untrained: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    puzzles = [PUZZLE, SOLUTION]
    assert main(["solve", *puzzles, "--model", untrained, "--steps", "4", "--json", "--trace", str(trace)]) == 1
    unsolved, solved = json.loads(capsys.readouterr().out)
    assert (unsolved["puzzle"], unsolved["solution"], unsolved["solved"]) == (PUZZLE, None, False)
    assert (unsolved["forwards"], unsolved["num_solutions"]) == (4, 1)
    assert unsolved["seconds"] > 0
    assert (solved["puzzle"], solved["solution"], solved["solved"], solved["forwards"]) == (SOLUTION, SOLUTION, True, 0)
    _, *steps = [json.loads(line) for line in trace.read_text().splitlines()]
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    assert sum(len(step["rows"][0]["position"]) for step in steps) == PUZZLE.count(".")


def test_files_and_stdin_keep_the_order(
    capsys: Captured, untrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boards = [held_out(number) for number in range(5)]
    lines = [as_line(board) for board in boards]
    file = tmp_path / "puzzles.txt"
    grids = "\n\n".join(sudoku.render(board) for board in boards[1:3])
    file.write_text(f"{lines[0]} # first\n{grids}\n{lines[3].replace('.', '0')}\n")
    monkeypatch.setattr("sys.stdin", io.StringIO(lines[4]))
    monkeypatch.setattr("diffusion_runtime.cli.solve._BATCH", 2)
    arguments = ["solve", str(file), "-", "--model", untrained, "--steps", "2", "--json", "--quiet"]
    assert main(arguments) == 1
    answers = json.loads(capsys.readouterr().out)
    assert [answer["puzzle"] for answer in answers] == lines
    monkeypatch.setattr("sys.stdin", io.StringIO(lines[4]))
    assert main([each for each in arguments if each != "--json"]) == 1
    out, err = capsys.readouterr()
    assert [line[:81] for line in out.splitlines()] == [answer["answer"] for answer in answers]
    assert err == ""


def test_what_is_wrong_with_an_answer() -> None:
    puzzle, solution = sudoku.parse(PUZZLE), list(sudoku.parse(SOLUTION))
    assert fault(puzzle, solution) is None
    assert fault(puzzle, [*solution[:2], 13, *solution[3:]]) == "row 1, column 3 holds no digit"
    assert fault(puzzle, [*solution[:4], 9, *solution[5:]]) == "row 1, column 5 holds 9, but 7 was given"
    assert "row 1, column 3 and row 1, column 7 both hold 9" in str(fault(puzzle, [*solution[:2], 9, *solution[3:]]))
    assert clashes([*solution[:2], 9, *solution[3:]]) == {2, 6, 19, 29}
    assert clashes(solution) == set()


def test_several_or_no_solutions_are_said() -> None:
    puzzle, solution = Puzzle("", sudoku.parse(PUZZLE)), sudoku.parse(SOLUTION)
    assert Answer(puzzle, solution, 1, 0.0, num_solutions=2).verdict == "solved; it has several solutions"
    assert Answer(puzzle, puzzle.board, 1, 0.0, num_solutions=0).verdict.endswith("the puzzle has no solution")


# --- demo


def test_demo_without_rich_says_how_to_get_it(
    capsys: Captured, untrained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert main(["demo", "--model", untrained, "--steps", "2"]) == 1
    out, err = capsys.readouterr()
    assert "step 2: " in out
    assert "\x1b" not in out
    assert "pip install 'diffusion-runtime[cli]'" in err


def test_demo_on_a_terminal_draws_the_board(untrained: str) -> None:
    pty = pytest.importorskip("pty")
    pytest.importorskip("rich")
    main_end, terminal = pty.openpty()
    command = [sys.executable, "-m", "diffusion_runtime", "demo", "--model", untrained, "--steps", "2", "--delay", "0"]
    env = {
        **os.environ,
        "TERM": "xterm-256color",
        "COLUMNS": "80",
        "LINES": "24",
        "OMP_NUM_THREADS": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    process = subprocess.Popen(command, cwd=ROOT, stdout=terminal, stderr=subprocess.DEVNULL, env=env)
    os.close(terminal)
    drawn = b""
    try:
        while chunk := os.read(main_end, 65536):
            drawn += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(main_end)
    assert process.wait(60) == 1
    text = drawn.decode()
    assert "┌─────────┬" in text
    assert "blanks left" in text
    assert "not solved" in text
    assert "\x1b[" in text


@ship
def test_the_shipped_model_solves_the_demo(capsys: Captured) -> None:
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "\nstep 45: " in out
    assert "\nsolved\n1 of 1 solved: low_confidence, 45 forwards" in out


def test_the_demo_shows_what_training_never_saw() -> None:
    assert [81 - held_out(number).count(0) for number in (0, 1, 9, 10, 1000)] == [36, 37, 45, 36, 36]
    assert held_out(1000) == held_out(0)
