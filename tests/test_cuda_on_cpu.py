"""The CUDA kernels, run on the CPU: builds and runs the plain tests of ``tests/cuda_on_cpu``, whose README says how."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "cuda_on_cpu"
NAMES = """emulation tensor_core_ops sample_tokens sample_tokens_full restricted_draw restricted_draw_full
head head_full weigh commit rms_norm qk_norm_rope hopper_ops attention attention_full attention_hopper
attention_hopper_full""".split()
MISSING = [tool for tool in ("g++", "make") if shutil.which(tool) is None]


def _run(*command: str) -> None:
    run = subprocess.run(command, cwd=HERE, capture_output=True, text=True, errors="replace")
    assert run.returncode == 0, f"{' '.join(command)} failed:\n{run.stdout}{run.stderr}"


@pytest.mark.skipif(bool(MISSING), reason=f"the emulated CUDA tests need {' and '.join(MISSING)}, not found")
@pytest.mark.parametrize("name", NAMES)
def test_cuda_on_cpu(name: str):
    _run("make", "--no-print-directory", "CXX=g++", f"build/plain/{name}")
    _run(f"build/plain/{name}")
