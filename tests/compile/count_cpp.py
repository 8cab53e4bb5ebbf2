"""Counts the instructions of every C++ kernel under valgrind, and fails where one takes over 5 % more than is kept.

    python tests/compile/count_cpp.py [--record]

No time is taken, so that a busy machine counts the same. Valgrind simulates AVX2 and not AVX-512, whose kernels are
made of the same files. Skipped where there is no valgrind.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from guard import Counts, check

DRIVER = Path(__file__).with_name("run_cpp.py")
ENTRIES = (
    *("sample_tokens_cpu", "attention_cpu", "rms_norm_cpu", "qk_norm_rope_cpu"),
    *("read_head_tile", "sample_head", "weigh_cpu", "commit_step_cpu", "product_cpu", "decoder_layers_cpu"),
)
INSTRUCTION_SETS = ("avx2", "portable")


def compiler_of(module: Path) -> str:
    """As it signed the module."""
    found = re.search(rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", module.read_bytes())
    return found[0].decode() if found else "an unknown compiler"


def count(module: Path, instruction_set: str) -> Counts:
    """Instructions of each case, a few thousand of Python's around the call among them."""
    with tempfile.TemporaryDirectory() as folder:
        triggers = [f"--dump-before=diffusion_runtime::{name}(*&)" for name in ENTRIES]
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out", *triggers]
        run = subprocess.run(
            [*command, sys.executable, str(DRIVER), str(module), instruction_set],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            sys.exit(f"the kernels did not run under valgrind:\n{run.stderr}")
        cases = run.stdout.splitlines()
        # the first one ends where the first call begins, the one without a number at the end of the process
        totals = [_total(Path(folder) / f"out.{number}") for number in range(2, len(cases) + 2)]
    return {f"{case} ({instruction_set})": total for case, total in zip(cases, totals, strict=True)}


def _total(dump: Path) -> int:
    found = re.search(r"^summary: (\d+)", dump.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def main() -> None:
    if shutil.which("valgrind") is None:
        print("no valgrind: the instructions of C++ kernels are not counted")
        return
    spec = find_spec("diffusion_runtime._C")
    if spec is None or spec.origin is None:
        sys.exit("the C++ module is not built")
    module = Path(spec.origin)
    counts: Counts = {}
    for instruction_set in INSTRUCTION_SETS:
        counts |= count(module, instruction_set)
    found = check(compiler_of(module), counts, record="--record" in sys.argv[1:])
    if found:
        sys.exit("\n".join(found))
    print(f"{len(counts)} cases of C++ kernels take as many instructions as before")


if __name__ == "__main__":
    main()
