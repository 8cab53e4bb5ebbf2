"""Lets ``pytest bench --benchmark-only`` find the benchmarks, which the suite in tests/ does not run."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")
    config.addinivalue_line("filterwarnings", "default")  # what a peer warns of is no fault of ours
