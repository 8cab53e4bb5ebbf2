"""``pytest bench --benchmark-only``: the quick cases of every suite, for ``--benchmark-compare`` between two commits.

``python -m bench run`` is what figures are quoted from: it interleaves what it compares.
"""

from __future__ import annotations

from functools import cache
from itertools import islice

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.comparison import Comparison
from bench.scope import Scope
from bench.suites import SUITES

QUICK = Scope(torch.device("cpu"), level="quick")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A case for each call of ours and of peers; inputs are made again where one runs, so that few are held."""
    cases = [
        pytest.param(op, number, name, id=f"{op}-{number}-{comparison.case}-{name}")
        for op, suite in SUITES.items()
        for number, comparison in enumerate(suite(QUICK))
        for name in (*comparison.ours, *comparison.peers)
    ]
    metafunc.parametrize(("op", "number", "name"), cases)


@cache
def _checked(op: str, number: int) -> Comparison:
    _checked.cache_clear()
    comparison = next(islice(SUITES[op](QUICK), number, None))
    comparison.check()
    return comparison


def bench_suites(benchmark: BenchmarkFixture, op: str, number: int, name: str) -> None:
    comparison = _checked(op, number)
    benchmark.group = f"{comparison.group}, {comparison.case}, {torch.get_num_threads()} threads"
    with torch.no_grad():
        benchmark.pedantic({**comparison.ours, **comparison.peers}[name], rounds=5, warmup_rounds=1)
