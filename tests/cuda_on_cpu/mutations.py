"""Breaks a kernel in one place at a time; shows which build of its test notices: mutations.py [--all] [words]

The kernels' mutations are in mutations_<kernel>.py.

Builds are tried up to the first that notices, with --all in any case. Fails if none does. Words: only mutations whose
name has one of them, or the name of the test.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILDS = {"plain": "-O1", "address": "-O1 -DQUICK -fsanitize=address", "thread": "-O1 -DQUICK -fsanitize=thread"}

# of each kernel: (file, what is broken, the text, what stands there instead, the test if it is not the module's TEST)
MODULES = [importlib.import_module(path.stem) for path in sorted(HERE.glob("mutations_*.py"))]
MUTATIONS = [
    (mutation[4] if len(mutation) > 4 else module.TEST, *mutation[:4])
    for module in MODULES
    for mutation in module.MUTATIONS
]

SIGNS = (
    ("deadlock", "deadlock"),
    ("of the mask is at", "diverged"),
    ("no multiple", "misaligned"),
    ("data race", "race"),
    ("AddressSanitizer", "bad address"),
    ("FAILED", "wrong result"),
)


def verdict(test: str, file: str, old: str, new: str, build: str) -> str:
    """What the test says of the broken source in one build: - is nothing."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("csrc/include", "csrc/cuda", "tests/cuda_on_cpu"):
            shutil.copytree(ROOT / part, Path(folder, part), ignore=shutil.ignore_patterns("build"))
        if old:
            source = Path(folder, file)
            text = source.read_text()
            assert text.count(old) == 1, f"{file} has {old!r} {text.count(old)} times"
            source.write_text(text.replace(old, new))
        includes = "-Itests/cuda_on_cpu/emulation -Icsrc/include -Icsrc/cuda"
        command = f"g++ -std=c++17 -w {BUILDS[build]} {includes} tests/cuda_on_cpu/test_{test}.cpp -o test"
        subprocess.run(command.split(), cwd=folder, check=True)
        try:
            run = subprocess.run(["./test"], cwd=folder, capture_output=True, text=True, errors="replace", timeout=300)
        except subprocess.TimeoutExpired:
            return "hangs"
    if run.returncode == 0:
        return "-"
    output = run.stdout + run.stderr
    return next((word for sign, word in SIGNS if sign in output), f"exit {run.returncode}")


def verdicts(test: str, file: str, old: str, new: str, every_build: bool) -> list[str]:
    """Of each build in turn, up to the first that notices: the others may do without."""
    found: list[str] = []
    for build in BUILDS:
        noticed = bool(old) and not every_build and any(v != "-" for v in found)
        found.append("" if noticed else verdict(test, file, old, new, build))
    return found


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--all"]
    chosen = [m for m in MUTATIONS if not words or any(word in m[2] or word == m[0] for word in words)]
    unexpected = 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = [pool.submit(verdicts, test, file, old, new, "--all" in sys.argv) for test, file, _, old, new in chosen]
        print(f"{'file':28}{'broken':54}" + "".join(f"{build:14}" for build in BUILDS))
        for (_, file, what, old, _), run in zip(chosen, runs, strict=True):
            row = run.result()
            unexpected += bool(old) == all(v in ("-", "") for v in row)
            print(f"{Path(file).name:28}{what:54}{''.join(f'{v:14}' for v in row)}".rstrip(), flush=True)
    sys.exit(f"{unexpected} unexpected" if unexpected else 0)


if __name__ == "__main__":
    main()
