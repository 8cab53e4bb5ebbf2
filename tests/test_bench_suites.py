"""The suites of the bench on tiny inputs: they check before they time. No test reads a time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import CONFIG, random_llada
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench import (
    attention_suites,
    bench_suites,
    commit_suite,
    diffusion_gemma_suite,
    generate_suite,
    growth_suites,
    head_suites,
    norm_suites,
    plain_models,
    sampling_suites,
    suites,
)
from bench.__main__ import main
from bench.comparison import measure
from bench.record import load
from bench.scope import Scope
from bench.timing import MOST, interleave
from diffusion_runtime import Denoiser, ops

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_suites, "SHAPES", ((4, 600),))
    monkeypatch.setattr(sampling_suites, "RESTRICTED", (4, 600))
    monkeypatch.setattr(head_suites, "HEADS", ((5, 16, 300),))
    monkeypatch.setattr(head_suites, "SOFT", ((5, 16, 300),))
    monkeypatch.setattr(commit_suite, "CANVASES", ((2, 12),))
    monkeypatch.setattr(attention_suites, "SQUARES", {"cpu": ((40, 2),)})
    monkeypatch.setattr(attention_suites, "CANVASES", {"cpu": ((8, 30),)})
    monkeypatch.setattr(attention_suites, "PREFILL", 70)
    monkeypatch.setattr(norm_suites, "NORMS", ((3, 40),))
    monkeypatch.setattr(norm_suites, "HEADS", ((5, 4, 2, 16),))
    tiny = dict.fromkeys(
        ("hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim", "global_head_dim"), 16
    )
    few = dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_global_key_value_heads"), 1)
    text = tiny | few | {"vocab_size": 99, "num_hidden_layers": 2, "num_experts": 2, "top_k_experts": 1}
    size = diffusion_gemma_suite.Size("tiny", text, prompts=((2, 5),), canvas=4, static_up_to=9)
    monkeypatch.setattr(diffusion_gemma_suite, "SIZES", {"cpu": (size,)})
    answers = ((2, 6, 8, 4, 4),)
    monkeypatch.setattr(generate_suite, "SIZES", {"cpu": generate_suite.Size("tiny", CONFIG, answers)})
    monkeypatch.setattr(generate_suite, "PYCODE", (((1, 32, 32), (32, 0.0)),) * 2)
    # compiling takes longer than all of this
    monkeypatch.setattr(attention_suites, "_flex", lambda: lambda q, k, v, **_: sdpa(q, k, v, enable_gqa=True))
    for curve, points in (("VOCABULARY", (50, 80, 400)), ("ROWS", (1, 3)), ("PREFIX", (9, 40)), ("CANVAS", (2, 8))):
        monkeypatch.setattr(growth_suites, curve, points)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, of its compiler
def test_every_suite_runs_and_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    assert main(["--quick", "--device", "cpu", "--json", str(path), "--plot", str(tmp_path)]) == 0
    printed, said = capsys.readouterr()
    kept = load(path)
    assert list(dict.fromkeys(result.op for result in kept.results)) == list(suites.SUITES)
    for result in kept.results:
        assert result.of("ours"), result
        assert result.of("peer"), result
        assert all(len(timed.ms) == 3 and min(timed.ms) > 0 for timed in result.timed)
    for part in ("## Summary", "### Restricted draws on [4, 600] float32", "### Growth of sample_tokens"):
        assert part in printed
    assert "sample_tokens: Restricted draws" in said
    assert {path.name for path in tmp_path.glob("*.svg")} == {
        f"{name}-{theme}.svg" for name in ("ratios", "growth") for theme in ("light", "dark")
    }


def test_a_full_run_has_every_shape_and_dtype() -> None:
    (quick, full) = (list(suites.SUITES["rms_norm"](Scope(CPU, level=level))) for level in ("quick", "full"))
    assert [comparison.group for comparison in quick] == [comparison.group for comparison in full[:2]]
    assert {comparison.group[-8:] for comparison in full} == {" float32", "bfloat16"}


def test_whole_answers_keep_what_follows_the_first_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast-dLLM's loop and our prefix cache give the same tokens, which is checked before anything is timed."""
    monkeypatch.setattr(generate_suite, "BATCHES", (1, 2))
    full = Scope(CPU, level="full")
    (result,) = measure("generate", generate_suite.llada, full, lambda _: None)
    assert [timed.name for timed in result.of("peer")] == ["published loop", "Fast-dLLM's loop"]
    curve = list(measure("growth", generate_suite.pycode_by_batch, full, lambda _: None))
    assert [(each.at, each.tokens, each.forwards) for each in curve] == [(1, 32, 8), (2, 64, 8)]
    for timed in (timed for each in (result, *curve) for timed in each.timed):
        assert timed.decode_ms is not None
        assert len(timed.decode_ms) == len(timed.ms)
        assert all(0 < decode < whole for decode, whole in zip(timed.decode_ms, timed.ms, strict=True))


def test_fast_dllms_loop_sees_what_its_cache_holds() -> None:
    """Its tokens are not those without a cache: keys before a block are those of the block's first step."""
    model = random_llada()
    asked = (torch.randint(0, 60, (2, 20)), 32, 8, 16, 0.0)
    forward = plain_models.llada(model)
    cached, whole = (
        list(loop(forward, *asked, mask=60, suppress_mask=True))[-1]
        for loop in (generate_suite.fast_dllm, generate_suite.published)
    )
    assert not torch.equal(cached, whole)
    denoiser = Denoiser(model, cache="prefix", block_length=8, num_steps=16)
    assert torch.equal(cached, denoiser.generate(asked[0], max_new_tokens=32))


def test_short_calls_take_more_rounds_while_there_is_time() -> None:
    calls = {"ours": lambda: None, "peer": lambda: None}
    assert {len(ms) for ms in interleave(calls, lambda _: 0.0, 2, seconds=60.0).values()} == {2 * MOST}
    assert {len(ms) for ms in interleave(calls, lambda _: 0.0, 2, seconds=0.0).values()} == {2}
    assert Scope(CPU, level="quick").seconds == 0 < Scope(CPU, level="normal").seconds
    assert Scope(torch.device("cuda"), level="full").seconds == 0


def test_long_calls_take_fewer_rounds_and_cold_ones_flushed_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    monkeypatch.setattr("bench.timing._other_memory", lambda: torch.zeros(1) if flushed.append(1) is None else None)

    monkeypatch.setattr(Scope, "seconds", 0.0)

    def times() -> tuple[int, bool]:
        result = next(measure("commit_step", suites.SUITES["commit_step"], Scope(CPU, level="full"), lambda _: None))
        return len(result.timed[0].ms), result.cold

    assert (times(), flushed) == ((7, False), [])
    monkeypatch.setattr("bench.comparison.LONG_S", 0.0)
    monkeypatch.setattr("bench.comparison.SHORT_MS", 0.0)
    assert times() == (3, True)
    assert len(flushed) == 8  # ours and a peer, in a round that does not count and in three


def test_what_would_be_ignored_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["commit_step", "--quick", "--device", "cuda", "--threads", "1"]) == 2
    assert "--threads are those of a CPU" in capsys.readouterr().err
    assert main(["growth", "--quick", "--device", "cpu", "--dtype", "bfloat16"]) == 2
    assert "growth are timed in float32 here" in capsys.readouterr().err
    assert main(["commit_step", "--quick", "--device", "cpu", "--peer", "eager,nobody"]) == 2
    assert "no peer has nobody in its name" in capsys.readouterr().err


@pytest.mark.parametrize("op", ["sample_tokens", "commit_step", "rms_norm"])
def test_a_wrong_answer_ends_the_run(
    op: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = getattr(ops, op)

    def wrong(*args: object, backend: str | None = None, **kwargs: object) -> object:
        found = right(*args, backend=backend, **kwargs)
        if backend == "reference":
            return found
        if op == "rms_norm":
            return found + 0.01
        name = "tokens" if op == "commit_step" else "token"
        return found._replace(**{name: getattr(found, name) + 1})

    monkeypatch.setattr(ops, op, wrong)
    monkeypatch.setattr("bench.comparison.interleave", lambda *_: pytest.fail("timed"))
    assert main([op, "--quick", "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "is not timed" in err


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_the_cases_of_pytest_are_those_of_a_quick_run() -> None:
    """Collecting them makes every input once."""
    wanted = sum(
        len(comparison.ours) + len(comparison.peers)
        for suite in suites.SUITES.values()
        for comparison in suite(bench_suites.QUICK)
    )
    found: list[object] = []
    bench_suites.pytest_generate_tests(SimpleNamespace(parametrize=lambda _, cases: found.extend(cases)))  # type: ignore[arg-type]
    assert len(found) == wanted
    assert len({case.id for case in found}) == wanted  # type: ignore[attr-defined]
