"""The suites of the bench on tiny inputs: they check before they time. No test reads a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import CONFIG
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench import attention_suites, diffusion_gemma_suite, generate_suite, growth, norm_suites, suites
from bench.__main__ import main
from bench.comparison import Result, markdown
from bench.growth import Point, fit
from diffusion_runtime import ops


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "RESTRICTED", (4, 600))
    monkeypatch.setattr(suites, "HEADS", ((5, 16, 300),))
    monkeypatch.setattr(suites, "SOFT", (5, 16, 300))
    monkeypatch.setattr(suites, "CANVASES", ((2, 12),))
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
    # compiling takes longer than all of this
    monkeypatch.setattr(attention_suites, "_flex", lambda: lambda q, k, v, **_: sdpa(q, k, v, enable_gqa=True))
    monkeypatch.setattr(growth, "ROWS", (1, 3))
    monkeypatch.setattr(growth, "VOCAB", (50, 400))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, of its compiler
def test_every_suite_runs_and_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "suites.json"
    assert main(["--suite", "all", "--device", "cpu", "--rounds", "2", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    kept = json.loads(path.read_text())
    assert set(kept) == {"machine", "growth", *suites.SUITES}
    for name in suites.SUITES:
        assert all(len(samples) == 2 for result in kept[name] for samples in result["ms"].values())
    assert "### Restricted draws on [4, 600] float32" in printed
    assert "Farthest above it" in printed


def test_a_wrong_answer_ends_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    sample = ops.sample_tokens

    def wrong(*args: object, backend: str | None = None, **kwargs: object) -> ops.TokenSamples:
        samples = sample(*args, backend=backend, **kwargs)  # type: ignore[arg-type]
        return samples if backend == "reference" else samples._replace(token=samples.token + 1)

    monkeypatch.setattr(ops, "sample_tokens", wrong)
    assert main(["--suite", "restricted", "--device", "cpu"]) == 1
    assert "is not timed, it draws other tokens" in capsys.readouterr().err


def test_a_table_names_peers_limits_and_memory():
    ms = {"cpp": [1.0, 1.0], "eager": [8.0, 10.0], "read": [0.5, 0.5]}
    result = Result(
        "shape", "case", ("cpp",), ("eager",), ("read",), ms, {"cpp": 0.1, "eager": 33.0, "read": None}, 2e9
    )
    text = markdown([result])
    for part in ("### shape", "9.00 ms, 9.00x", "50%", "<0.5, 33", "| 2.00    |"):
        assert part in text


def test_growth_is_fitted():
    points = [Point(rows, vocab, 0.01 + 2e-6 * rows * vocab) for rows in (1, 3) for vocab in (50, 400)]
    fixed, per_logit = fit(points)
    torch.testing.assert_close((fixed, per_logit), (0.01, 2e-6), rtol=1e-6, atol=0)
    assert "Farthest above it: 1.00 times" in growth.markdown(points)
