"""The counts that may not grow: what is a fault, what is said, what is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from compile import guard


def test_what_grew_appeared_or_went_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    before = {"a": 100, "b": 100, "c": 100, "d": 100, "gone": 1, "none": 0}
    now = {"a": 105, "b": 106, "c": 120, "d": 90, "new": 1, "none": 3}
    assert guard.faults(before, now) == [
        "b: 106, 6.0% more than the 100 kept",
        "c: 120, 20.0% more than the 100 kept",
        "gone is not counted any more",
        "new is new: keep its count with --record",
        "none: 3, more than the 0 kept",
    ]
    assert capsys.readouterr().out == "d: 90, fewer than the 100 kept; --record keeps it so\n"


def test_counts_are_kept_by_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(guard, "COUNTS", tmp_path / "counts.json")
    assert guard.check("g++ 1", {"a": 1}, record=False) == []
    assert "nothing is kept of g++ 1" in capsys.readouterr().out
    assert guard.check("g++ 1", {"a": 10}, record=True) == []
    assert guard.check("g++ 2", {"a": 20}, record=True) == []
    assert json.loads((tmp_path / "counts.json").read_text()) == {"g++ 1": {"a": 10}, "g++ 2": {"a": 20}}
    assert guard.check("g++ 1", {"a": 12}, record=False) == ["a: 12, 20.0% more than the 10 kept"]
    assert guard.check("g++ 2", {"a": 12}, record=False) == []


def test_a_kernel_is_counted_by_what_it_takes() -> None:
    opcodes = ["LDG.E.128", "LDGSTS.E", "STS", "FFMA", "EXIT", "UTMALDG.2D"]
    assert guard.of_kernel("k", 40, 0, opcodes) == {
        "k: registers": 40,
        "k: bytes of shared memory": 0,
        "k: instructions": 6,
        "k: of memory": 4,
    }


def test_every_compiler_of_the_checks_has_counts() -> None:
    kept = json.loads(guard.COUNTS.read_text())
    assert {name.split()[0] for name in kept} == {"GCC:", "nvcc", "triton"}
    assert all(type(count) is int and count >= 0 for counts in kept.values() for count in counts.values())
