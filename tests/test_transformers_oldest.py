"""The tests of DiffusionGemma once more, on the oldest transformers that has it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
OLDEST = Path(sys.prefix) / "transformers-oldest"
FILES = [f"test_transformers_{name}.py" for name in ("diffusion_gemma", "denoising_step", "injected_draws")]


@pytest.mark.skipif(
    not OLDEST.is_dir(), reason="needs the oldest transformers beside the newest: `make test` installs it"
)
def test_on_the_oldest_transformers():
    version = "import transformers; assert transformers.__version__.startswith('5.17.'), transformers.__version__"
    environment = os.environ | {"PYTHONPATH": str(OLDEST)}
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST"):
        environment.pop(name, None)
    subprocess.run([sys.executable, "-c", version], env=environment, check=True)
    files = [str(TESTS / file) for file in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not example", *files]
    run = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    summary = run.stdout.strip().splitlines()[-1]
    assert "passed" in summary, summary
    assert "skipped" not in summary, summary
