"""``pytest bench --benchmark-only``: ours and eager torch under pytest-benchmark, for its ``--benchmark-compare``.

``python -m bench`` is what figures are quoted from: it interleaves what it compares.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.check import Truth
from bench.peers import make_peer
from bench.record import MODES, Mode
from bench.runners import Runner, default_backends, our_runner

CPU = torch.device("cpu")


@cache
def _logits(dtype: torch.dtype) -> Tensor:
    return (torch.randn(64, 126_464, generator=torch.Generator().manual_seed(0)) * 2.5).to(dtype)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("runner", [*default_backends(CPU, torch.float32), "eager"])
def bench_sample_tokens(benchmark: BenchmarkFixture, runner: str, dtype: torch.dtype, mode: Mode) -> None:
    logits = _logits(dtype)
    if runner == "eager":
        chosen = Runner("eager", "peer", make_peer("eager", mode.temperature, CPU))
    else:
        chosen = our_runner(runner, mode.temperature)
    Truth(logits, mode.temperature).check(chosen.name, chosen.call(logits), ours=chosen.kind == "ours")
    benchmark.group = f"{mode.name} [64, 126464] {str(dtype)[6:]}, {torch.get_num_threads()} threads"
    benchmark.pedantic(chosen.call, args=(logits,), rounds=9, warmup_rounds=2)
