"""Backend choice: what auto picks, what a named backend promises, what the messages say."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from diffusion_runtime import ops
from diffusion_runtime.ops import _registry
from diffusion_runtime.ops._registry import REGISTRY, Implementation, OpSpec

FLOATS = frozenset({torch.float32})


def spec(*implementations: Implementation) -> OpSpec:
    return OpSpec("toy", lambda: "reference", lambda: None, implementations)


@pytest.fixture(autouse=True)
def _forget_the_toy():
    yield
    REGISTRY.pop("toy", None)
    for key in [key for key in _registry._RESOLVED if key[0] == "toy"]:
        del _registry._RESOLVED[key]


def missing() -> None:
    raise ImportError("no module named _C")


def test_auto_takes_the_first_that_can_run():
    toy = spec(
        Implementation("cuda", frozenset({"cuda"}), FLOATS, lambda: lambda: "cuda"),
        Implementation("triton", frozenset({"cpu"}), FLOATS, missing),
        Implementation("cpp", frozenset({"cpu"}), FLOATS, lambda: lambda: "cpp"),
    )
    assert toy.resolve("cpu", torch.float32, None)() == "cpp"
    assert toy.resolve("cuda", torch.float32, None)() == "cuda"
    assert ops.available_backends("toy", "cpu", torch.float32) == ["cpp", "reference"]
    assert ops.explain("toy", "cpu", torch.float32).splitlines() == [
        "toy(cpu, torch.float32)",
        "cuda       takes cuda tensors, got cpu",
        "triton     is not available: no module named _C",
        "cpp        ok",
        "reference  ok",
    ]


def test_a_fallback_is_said_once(caplog):
    toy = spec(Implementation("cpp", frozenset({"cpu"}), FLOATS, missing))
    with caplog.at_level(logging.INFO, "diffusion_runtime"):
        assert toy.resolve("cpu", torch.float32, None)() == "reference"
        assert toy.resolve("cpu", torch.float32, None)() == "reference"
    assert [record.getMessage() for record in caplog.records] == [
        "toy(cpu, torch.float32) -> reference\n  cpp is not available: no module named _C"
    ]


def test_a_named_backend_runs_or_raises_with_each_reason():
    toy = spec(Implementation("cpp", frozenset({"cpu"}), FLOATS, missing))
    with pytest.raises(ops.BackendUnavailableError, match="cpp is not available: no module named _C"):
        toy.resolve("cpu", torch.float32, "cpp")
    with pytest.raises(ops.BackendUnavailableError, match="toy has no triton implementation"):
        toy.resolve("cpu", torch.float32, "triton")
    with pytest.raises(ValueError, match="unknown backend 'cude'; expected one of auto, reference, cpp"):
        toy.resolve("cpu", torch.float32, "cude")


def test_the_real_order_on_a_cpu():
    assert ops.available_backends("sample_tokens", "cpu", torch.bfloat16)[0] == "cpp"
    assert ops.available_backends("sample_tokens", "cpu", torch.float64) == ["reference"]
    assert {"attention", "sample_tokens", "sample_from_hidden", "soft_embedding"} <= set(REGISTRY)


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("DIFFUSION_RUNTIME_BACKEND", "reference", "_sample_reference.py"),
        ("DIFFUSION_RUNTIME_INSTRUCTION_SET", "sse9", "DIFFUSION_RUNTIME_INSTRUCTION_SET=sse9, but this CPU has"),
    ],
)
def test_environment(variable, value, expected):
    code = (
        "import torch; from diffusion_runtime import ops; from diffusion_runtime.ops._sample_tokens import SPEC\n"
        "print(SPEC.resolve('cpu', torch.float32, None).__code__.co_filename)\n"
        "print(ops.explain('sample_tokens', 'cpu', torch.float32))"
    )
    environment = os.environ | {variable: value}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert expected in run.stdout
