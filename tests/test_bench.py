"""The bench: its record, its refusal to time a wrong answer, what it concludes from samples. No test reads a time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import runners
from bench.__main__ import main
from bench.acceptance import bars
from bench.check import Truth, WrongAnswerError
from bench.memory import available_mb, peak_extra_mb, unmeasurable
from bench.peers import PEERS, make_peer
from bench.record import MODES, Group, Measurement, Record, fastest_read, load
from bench.report import against, markdown
from bench.session import Plan, Session
from bench.text import megabytes, table
from bench.timing import Spread, interleave, ratio
from diffusion_runtime import ops

CPU = torch.device("cpu")
TINY = ["--quick", "--device", "cpu", "--rows", "2,5", "--vocab", "300", "--dtype", "float32,bfloat16"]
REFERENCE = ["--backend", "reference", "--threads", "1"]


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled peer is its eager self: g++ takes longer than all of these tests."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def _measurement(runner: str, kind: str, ms: list[float], mode: str = "statistics", **fields: object) -> Measurement:
    group = Group(64, 126_464, "float32", 1, mode)
    return Measurement(group, runner, kind, ms, 32_374_784, **fields)  # type: ignore[arg-type]


def _record(*measurements: Measurement) -> Record:
    return Record("sample_tokens", "cpu", {"CPU": "a test"}, {}, list(measurements))


def test_a_quick_run_prints_tables_and_writes_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "record.json"
    assert main([*TINY, *REFERENCE, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "### [5, 300] bfloat16" in printed

    record = load(path)
    assert (record.op, record.device) == ("sample_tokens", "cpu")
    assert {"CPU", "torch", "date", "diffusion-runtime"} <= record.machine.keys()
    assert len({m.group for m in record.measurements}) == 2 * 2 * 2  # rows, dtypes, modes
    for measurement in record.measurements:
        assert (measurement.not_run is None) == (len(measurement.ms) == 5)
        assert all(sample > 0 for sample in measurement.ms)
    assert {m.runner for m in record.measurements if m.kind == "peer"} == set(PEERS)
    assert {m.runner for m in record.measurements if m.not_run} == {"compiled", "llada"}  # left out where sampled

    assert main(["--show", str(path)]) == 0
    assert capsys.readouterr().out == printed


def test_all_that_can_run_is_timed_by_default():
    plan = Plan(rows=(3,), vocab=(300,), dtypes=("float32",), threads=(1,), modes=MODES[1:2], peers=(), rounds=2)
    record = Session(plan, lambda _: None).run()
    ours = {m.runner for m in record.measurements if m.kind == "ours"}
    assert ours == set(ops.available_backends("sample_tokens", "cpu", torch.float32)) - {"reference", "triton"}
    assert {m.not_run for m in record.measurements if m.kind == "peer"} == {"not asked for"}
    if "cpp" in ours:
        assert any(m.runner == "cpp portable" for m in record.measurements)
        assert "### Instruction sets" in markdown(record)


@pytest.mark.parametrize("field", ["token", "logprob", "confidence", "margin", "entropy", "logsumexp"])
def test_a_wrong_answer_is_not_timed(field: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def wrong(*args: object, **kwargs: object) -> ops.TokenSamples:
        samples = ops.sample_tokens(*args, **kwargs)  # type: ignore[arg-type]
        values = getattr(samples, field)
        return samples._replace(**{field: values + (1 if field == "token" else 0.01)})

    monkeypatch.setattr(runners, "ops", type("Broken", (), {"sample_tokens": staticmethod(wrong)}))
    monkeypatch.setattr("bench.session.interleave", lambda *_: pytest.fail("timed"))
    assert main([*TINY, *REFERENCE]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert f"reference is not timed, its answer is wrong: {field} of row 0" in err


def test_a_backend_that_cannot_run_says_why(capsys: pytest.CaptureFixture[str]):
    assert main([*TINY, "--backend", "cuda"]) == 1
    assert "takes cuda tensors" in capsys.readouterr().err


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("name", PEERS)
def test_peers_compute_what_they_stand_for(name: str, mode):
    logits = torch.randn(4, 1000)
    logits[2, [3, 500]] = 9.0  # a tie
    truth = Truth(logits, mode.temperature)
    answer = make_peer(name, mode.temperature, CPU)(logits)
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


def test_a_peer_that_takes_too_long_on_large_logits_is_named():
    plan = replace(
        Plan(rows=(4,), vocab=(300,), dtypes=("float32",), threads=(1,), modes=MODES[:1], backends=("reference",)),
        large=0,
        longest_call_ms=0.0,
    )
    record = Session(plan, lambda _: None).run()
    peers = [m for m in record.measurements if m.kind == "peer"]
    assert len(peers) == len(PEERS)
    assert all(m.not_run is not None and m.not_run.endswith("s a call") for m in peers)
    assert "not run: about" in markdown(record)


def test_peak_memory_of_a_known_allocation():
    reason = unmeasurable(CPU)
    if reason is not None:
        pytest.skip(reason)
    result, mb = peak_extra_mb(lambda: torch.ones(20_000_000, dtype=torch.uint8), CPU)
    assert result.numel() == 20_000_000
    assert mb == pytest.approx(20, abs=1)
    assert available_mb(CPU) > 0
    assert [megabytes(value) for value in (None, 0.01, 3.21, 97.4)] == ["-", "<0.5", "3.2", "97"]


def test_a_ratio_is_taken_round_by_round():
    ours = [1.0, 10.0, 2.0, 1.0, 1.0]  # a slow round slows everyone
    assert ratio([3 * ms for ms in ours], ours) == Spread(3, 3, 3)
    assert Spread.of([4.0]) == Spread(4, 4, 4)
    spread = Spread.of([float(i) for i in range(11)])
    assert (spread.median, spread.low, spread.high) == (5, 2, 8)


@pytest.mark.parametrize(
    ("peer_ms", "text"),
    [
        ([6.0, 6.0, 6.3, 5.7, 6.0], "6.00 ms, 3.00x"),
        ([1.0, 1.0, 1.05, 1.0, 1.0], "1.00 ms, 0.500x"),
        ([1.0, 3.0, 2.0, 1.0, 3.0], "no verdict"),
    ],
)
def test_a_spread_that_holds_one_is_no_verdict(peer_ms: list[float], text: str):
    ours = _measurement("cpp", "ours", [2.0] * 5)
    assert text in against(_measurement("eager", "peer", peer_ms), ours)


def test_the_order_is_shuffled_and_the_first_round_does_not_count():
    seen: list[tuple[str, int]] = []
    calls = {name: (lambda number, name=name: seen.append((name, number))) for name in "abc"}
    ticks = iter(range(1000))

    def timer(call) -> float:
        call()
        return float(next(ticks))

    samples = interleave(calls, timer, rounds=6)
    assert {name: len(ms) for name, ms in samples.items()} == {"a": 6, "b": 6, "c": 6}
    assert min(min(ms) for ms in samples.values()) == 3  # 0, 1 and 2 were the round that warms up
    rounds = [seen[i : i + 3] for i in range(0, len(seen), 3)]
    assert all({number for _, number in each} == {i} for i, each in enumerate(rounds))
    assert len({tuple(name for name, _ in each) for each in rounds}) > 1


def test_shares_are_of_the_fastest_read():
    reads = [_measurement(name, "read", [ms] * 3) for name, ms in (("slow", 2.0), ("fast", 1.0))]
    assert fastest_read([*reads, _measurement("cpp", "ours", [0.1])]).runner == "fast"


def test_bars_are_met_missed_or_without_a_figure():
    record = _record(
        _measurement("cpp", "ours", [2.0] * 5, peak_mb=0.1),
        _measurement("eager", "peer", [31.0, 31.0, 33.0, 29.0, 29.0]),
        _measurement("compiled", "peer", [8.0] * 5),
        _measurement("amax", "read", [1.0] * 5),
        _measurement("cpp", "ours", [2.0] * 5, mode="sampled at 1", peak_mb=5.0),
        _measurement("eager", "peer", [], mode="sampled at 1", not_run="about 9 s a call"),
    )
    lines = "\n".join(bars(record)).splitlines()
    for start, text in [
        ("statistics vs torch.compile", "MISSED: 4.00 (4.00-4.00) "),
        ("statistics vs eager", "met: 15.5 (14.5-15.7), but its spread crosses the bar"),
        ("sampled vs eager", "not run: about 9 s a call"),
        ("statistics, time over", "met: 2.00"),
        ("statistics, peak", "met: <0.5"),
        ("sampled, peak", "MISSED: 5.0"),
    ]:
        line = next(line for line in lines if line.startswith(f"| {start}"))
        assert text in line
    assert list(bars(_record())) == []


def test_a_record_of_another_schema_is_refused(tmp_path: Path):
    path = tmp_path / "record.json"
    _record(_measurement("cpp", "ours", [1.0], peak_mb=0.1)).save(path)
    assert load(path).measurements == [_measurement("cpp", "ours", [1.0], peak_mb=0.1)]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 0}))
    with pytest.raises(ValueError, match="has schema 0"):
        load(path)


def test_a_table_is_markdown():
    assert table([{"a": "1", "long": "x"}]) == "| a | long |\n| - | ---- |\n| 1 | x    |"


@pytest.mark.parametrize("arguments", [["--vocab", "301"], ["--rows", "0"], ["--dtype", "float64"], ["--peers", "x"]])
def test_arguments_that_cannot_be_timed_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "expected" in capsys.readouterr().err
