"""The bench: its record, its refusal to time a wrong answer, what it concludes from samples. No test reads a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import plots, published, report
from bench.__main__ import main
from bench.check import Truth, WrongAnswerError
from bench.comparison import Comparison, measure
from bench.memory import available_mb, peak_extra_mb, unmeasurable
from bench.peers import PEERS, make_peer
from bench.record import Record, Result, Timed, load
from bench.sampling_suites import MODES
from bench.scope import Scope
from bench.text import megabytes, table
from bench.timing import Spread, interleave, ratio, verdict, warm_ms

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled peer is its eager self: g++ takes longer than all of these tests."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def timed(name: str, kind: str, ms: list[float], mb: float | None = 0.1) -> Timed:
    return Timed(name, kind, ms, mb)


def result(*calls: Timed, op: str = "op", case: str = "case", **fields: float) -> Result:
    return Result(op, "group", case, 2, True, list(calls), **fields)  # type: ignore[arg-type]


def record(*results: Result) -> Record:
    return Record("cpu", {"CPU": "a test"}, {}, {"torch": "1"}, list(results))


def suite(*comparisons: Comparison) -> Callable[[Scope], Iterator[Comparison]]:
    return lambda _: iter(comparisons)


# --- what is timed


def test_ours_peers_and_limits_are_timed_in_turns() -> None:
    seen: list[str] = []
    calls = {name: (lambda name=name: seen.append(name)) for name in ("ours", "peer", "other", "limit")}
    comparison = Comparison(
        "group", "case", {"ours": calls["ours"]}, {"peer": calls["peer"], "other": calls["other"]},
        lambda: seen.append("check"), {"limit": calls["limit"]}, flop=8.0,
    )  # fmt: skip
    said: list[str] = []
    (found,) = measure("op", suite(comparison), Scope(CPU, level="quick", peers=("PEER",)), said.append)
    assert said == ["op: group, case"]
    assert [(each.name, each.kind, len(each.ms)) for each in found.timed] == [
        ("ours", "ours", 3), ("peer", "peer", 3), ("limit", "limit", 3),
    ]  # fmt: skip
    assert "other" not in seen
    assert (found.flop, found.cold, found.threads) == (8.0, False, torch.get_num_threads())
    assert seen.index("check") == 3  # each was called once, to load what it needs


def test_a_wrong_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise WrongAnswerError("ours is off")

    monkeypatch.setattr("bench.comparison.interleave", lambda *_: pytest.fail("timed"))
    comparison = Comparison("group", "case", {"ours": lambda: None}, {}, refuse)
    with pytest.raises(WrongAnswerError, match="ours is off"):
        list(measure("op", suite(comparison), Scope(CPU), lambda _: None))


@pytest.mark.parametrize("temperature", MODES.values(), ids=MODES)
@pytest.mark.parametrize("name", PEERS)
def test_peers_compute_what_they_stand_for(name: str, temperature: float):
    logits = torch.randn(4, 1000)
    logits[2, [3, 500]] = 9.0  # a tie
    truth = Truth(logits, temperature)
    answer = make_peer(name, temperature, CPU)(logits)
    truth.check(name, answer, ours=False)
    with pytest.raises(WrongAnswerError, match="token of row 0"):
        truth.check(name, answer | {"token": torch.full((4,), 1000)}, ours=False)
    with pytest.raises(WrongAnswerError, match="is nan"):
        truth.check(name, answer | {"logprob": torch.full((4,), torch.nan)}, ours=False)


@pytest.mark.parametrize("name", PEERS)
def test_peers_draw_from_the_distribution_at_their_temperature(name: str):
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5])
    drawn = make_peer(name, 0.7, CPU)(logits.expand(20_000, -1).contiguous())["token"]
    shares = drawn.bincount(minlength=4) / len(drawn)
    torch.testing.assert_close(shares, torch.softmax(logits / 0.7, -1), atol=0.02, rtol=0)


def test_peak_memory_of_a_known_allocation():
    reason = unmeasurable(CPU)
    if reason is not None:
        pytest.skip(reason)
    result, mb = peak_extra_mb(lambda: torch.ones(20_000_000, dtype=torch.uint8), CPU)
    assert result.numel() == 20_000_000
    assert mb == pytest.approx(20, abs=1)
    assert available_mb(CPU) > 0
    assert [megabytes(value) for value in (None, 0.01, 3.21, 97.4)] == ["-", "<0.5", "3.2", "97"]


# --- what is concluded


def test_a_ratio_is_taken_round_by_round():
    ours = [1.0, 10.0, 2.0, 1.0, 1.0]  # a slow round slows everyone
    assert ratio([3 * ms for ms in ours], ours) == Spread(3, 3, 3)
    assert Spread.of([4.0]) == Spread(4, 4, 4)
    assert Spread.of([float(i) for i in range(11)]) == Spread(5, 2, 8)


@pytest.mark.parametrize(
    ("peer_ms", "text", "expected"),
    [
        ([6.0, 6.0, 6.3, 5.7, 6.0], "6.00 ms, 3.00x", "faster"),
        ([1.0, 1.0, 1.05, 1.0, 1.0], "1.00 ms, **0.500x**", "slower"),
        ([1.0, 3.0, 2.0, 1.0, 3.0], "no verdict", "no verdict"),
        ([2.1, 2.1, 2.1, 2.1, 2.1], "no verdict", "no verdict"),
        ([1.9, 1.9, 1.9, 1.9, 1.9], "no verdict", "no verdict"),
    ],
)
def test_within_a_tenth_there_is_no_verdict(peer_ms: list[float], text: str, expected: str) -> None:
    ours, peer = timed("cpp", "ours", [2.0] * 5), timed("eager", "peer", peer_ms)
    assert text in report.against(peer, ours)
    assert verdict(ratio(peer.ms, ours.ms)) == expected


def test_the_order_is_shuffled_and_the_first_round_does_not_count() -> None:
    seen: list[str] = []
    calls = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    ticks = iter(range(1000))

    def timer(call: Callable[[], object]) -> float:
        call()
        return float(next(ticks))

    samples = interleave(calls, timer, rounds=6)
    assert {name: len(ms) for name, ms in samples.items()} == {"a": 6, "b": 6, "c": 6}
    assert min(min(ms) for ms in samples.values()) == 3  # 0, 1 and 2 were the round that warms up
    rounds = [tuple(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert all(set(each) == set("abc") for each in rounds)
    assert len(set(rounds)) > 1


def test_short_calls_are_repeated() -> None:
    seen: list[int] = []
    assert warm_ms(lambda: seen.append(1)) > 0
    assert len(seen) > 100


# --- tables


def test_a_table_names_peers_limits_and_memory() -> None:
    calls = (
        timed("cpp", "ours", [1.0, 1.0]),
        timed("eager", "peer", [8.0, 10.0], 33.0),
        timed("a read", "limit", [0.5] * 2),
    )
    text = "\n".join(report.tables([result(*calls, flop=2e9, num_bytes=3e6, tokens=4, forwards=2)]))
    for part in (
        "### group",
        "9.00 ms, 9.00x",
        "50%",
        "<0.5, 33",
        "| 2000    |",
        "| 3.00 |",
        "| 4000     |",
        "| 2        |",
    ):
        assert part in text, part


def test_a_summary_counts_losses() -> None:
    ours = timed("slow", "ours", [4.0, 4.0]), timed("fast", "ours", [2.0, 2.0])
    won, lost = (result(*ours, timed("eager", "peer", [ms, ms])) for ms in (8.0, 1.0))
    line = report.summary([won, lost]).splitlines()[-1]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["op", "eager", "1.41x", "0.500x", "4.00x", "2", "1"]


def test_a_table_is_markdown():
    assert table([{"a": "1", "long": "x"}]) == "| a | long |\n| - | ---- |\n| 1 | x    |"


# --- records


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    (written := record(result(timed("cpp", "ours", [1.0, 2.0], None), at=3.0))).save(path)
    assert load(path) == written
    assert main(["show", str(path)]) == 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content | {"schema": 1}, "has schema 1"),
        (lambda content: [content], "is not a record"),
        (lambda content: content | {"colour": 1}, "unknown fields .'colour'"),
        (lambda content: content | {"results": [{}]}, "is not a record"),
    ],
)
def test_what_is_no_record_is_refused(
    tmp_path: Path, spoil: Callable[[object], object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.json"
    record().save(path)
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=message):
        load(path)
    assert main(["show", str(path)]) == 2
    assert capsys.readouterr().err.startswith("bench: ")


def test_compare_names_what_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = [0.99, 1.0, 1.0, 1.01, 1.02]
    ours, peer = timed("cpp", "ours", noise), timed("eager", "peer", [1.5 * ms for ms in noise])
    before = record(result(ours, peer), result(ours, case="gone"))
    before.save(tmp_path / "a")
    for name, times in (("b", 1.2), ("c", 2.0), ("d", 1.45)):
        record(result(replace(ours, ms=[times * ms for ms in noise]), peer)).save(tmp_path / name)
    said: dict[str, str] = {}
    for name in "abcd":
        assert main(["compare", str(tmp_path / "a"), str(tmp_path / name)]) == 0
        said[name] = capsys.readouterr().out
    assert "nothing moved" in said["a"]
    assert "| 1.20 " in said["b"]
    assert "1 in one only" in said["b"]
    for name, counts, change in (("b", (1, 0, 0), ""), ("c", (1, 1, 0), "slower |"), ("d", (0, 0, 1), "no verdict |")):
        assert "{} verdicts are in both, {} of them differ, {} are in one only".format(*counts) in said[name]
        assert (f"| faster | {change}" in said[name]) == bool(change)


# --- plots, and what is published


def test_plots_are_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curve = [result(timed("cpp", "ours", [n, n]), timed("eager", "peer", [2 * n, 3 * n]), at=n) for n in (1.0, 10.0)]
    results = [result(timed("cpp", "ours", [1.0]), timed("eager", "peer", [3.0])), *curve]
    drawn = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paths = plots.write(results, tmp_path / name)
        assert [path.name for path in paths] == [
            "ratios-light.svg", "ratios-dark.svg", "growth-light.svg", "growth-dark.svg",
        ]  # fmt: skip
        drawn.append([path.read_bytes() for path in paths])
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 4
    assert b"op, eager" in drawn[0][0]
    assert plots.write([], tmp_path) == []


def test_what_is_published_is_what_the_records_say(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["publish", "--check"]) == 0, capsys.readouterr().out


def test_publishing_writes_what_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    results, images, page = tmp_path / "results", tmp_path / "images", tmp_path / "page.md"
    results.mkdir()
    images.mkdir()
    record(result(timed("cpp", "ours", [1.0]), timed("eager", "peer", [3.0]))).save(results / "here.json")
    page.write_text("before\n<!-- bench: summary here -->\nold\n<!-- end -->\nbehind\n")
    for name, value in (("RESULTS", results), ("IMAGES", images), ("FILES", (page,))):
        monkeypatch.setattr(published, name, value)
    assert main(["publish", "--check"]) == 1
    assert "old" in page.read_text()
    assert main(["publish"]) == 0
    assert "3.00x" in page.read_text()
    assert page.read_text()[:7] + page.read_text()[-20:] == "before\n<!-- end -->\nbehind\n"
    assert sorted(path.name for path in images.iterdir()) == [
        "bench-here-ratios-dark.svg",
        "bench-here-ratios-light.svg",
    ]
    assert main(["publish", "--check"]) == 0
    page.write_text("<!-- bench: colours here -->\n<!-- end -->")
    assert main(["publish"]) == 2


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--dtype", "float64"], ["nothing"], ["--quick", "--full"]])
def test_arguments_that_cannot_be_timed_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert "usage: bench" in capsys.readouterr().err
