"""Compiles every ``csrc/cuda/*.cu`` for GPUs that need not be here, and reads what the assembler says of each kernel.

    python tests/compile/compile_cuda.py [name ...]     # only the files so named

Fails where a kernel spills registers or keeps a stack frame: both mean that something sits in memory that was meant to
sit in a register. Fails as well where a kernel lacks an instruction that it is built around (``OPCODES``). Skipped only
where there is no nvcc; instructions are not looked at where there is no cuobjdump.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("80", "90a")  # as in setup.py
# a kernel, by a word of its name: what its instructions must match. Products by tensor cores; copies to shared memory
# that go past the registers, 16 bytes each.
OPCODES = {"head_parts_kernel": (r"HMMA\.16816\.F32(\.BF16)?", r"LDGSTS\.E\.BYPASS\.(LTC128B\.)?128(\.ZFILL)?")}

PTXAS = re.compile(
    r"Compiling entry function '(?P<entry>\S+)' for '(?P<target>\S+)'"
    r"|(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r"|Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?"
)


class Usage(NamedTuple):
    """What one kernel takes on one target, as ptxas says it."""

    name: str
    target: str
    registers: int
    stack: int
    spills: int
    shared: int  # the static part

    @property
    def faults(self) -> str:
        found = [f"a stack frame of {self.stack} bytes"] if self.stack else []
        found += [f"{self.spills} bytes of spills"] if self.spills else []
        return " and ".join(found)


def find_nvcc() -> str | None:
    """CUDA_HOME's, or the one on PATH: setup.py's rule."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def find_cuobjdump() -> str | None:
    """Beside nvcc, on PATH, or the one that comes with Triton."""
    home, triton = os.environ.get("CUDA_HOME"), importlib.util.find_spec("triton")
    found = shutil.which("cuobjdump", path=f"{home}/bin" if home else None)
    if found is None and triton is not None and triton.origin is not None:
        found = shutil.which("cuobjdump", path=Path(triton.origin).parent / "backends/nvidia/bin")
    return found


def ptxas_report(nvcc: str, source: Path, target: Path) -> str:
    command = [nvcc, "-std=c++17", "-O3", "-Xptxas", "-v", "-c", "-o", str(target), "--threads", str(len(TARGETS))]
    command += [f"-I{ROOT / folder}" for folder in ("csrc/include", "csrc/cuda")]
    command += [f"-gencode=arch=compute_{target},code=sm_{target}" for target in TARGETS]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{source.name} does not compile\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def read_report(report: str) -> list[Usage]:
    """Each kernel's line of the table. The stack and spills of functions it calls count as its own."""
    usages: list[Usage] = []
    name, target, stack, spills = "", "", 0, 0
    for match in PTXAS.finditer(report):
        if match["entry"]:
            name, target, stack, spills = match["entry"], match["target"], 0, 0
        elif match["stack"]:
            stack += int(match["stack"])
            spills += int(match["stores"]) + int(match["loads"])
        else:
            usages.append(Usage(name, target, int(match["registers"]), stack, spills, int(match["shared"] or 0)))
    return usages


def missing_opcodes(cuobjdump: str, target: Path) -> list[str]:
    """Kernels of an object file without an instruction that OPCODES wants of them."""
    sass = subprocess.run([cuobjdump, "-sass", target], capture_output=True, text=True, check=True).stdout
    missing, arch = [], ""
    for part in re.split(r"^\s*(?=Function : |arch = )", sass, flags=re.MULTILINE):
        first, _, code = part.partition("\n")
        if first.startswith("arch = "):
            arch = first.removeprefix("arch = ")
        for word, patterns in OPCODES.items():
            if first.startswith("Function : ") and word in first:
                absent = [pattern for pattern in patterns if not re.search(rf"\s{pattern}\s", code)]
                missing += [f"{readable(first.split()[-1])}, {arch}: no {pattern}" for pattern in absent]
    return missing


def readable(name: str) -> str:
    """``kernel<template arguments>`` without namespace and parameters, where c++filt is at hand."""
    if shutil.which("c++filt") is None:
        return name
    demangled = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    without_parameters = re.sub(r"\((?!anonymous).*", "", demangled.removeprefix("void "))
    return re.sub(r"(\(anonymous namespace\)|\w+)::", "", without_parameters)


def main(names: list[str]) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        print("skipped: no CUDA kernel was compiled, because there is no nvcc in CUDA_HOME/bin or on PATH")
        return
    sources = [path for path in sorted((ROOT / "csrc/cuda").glob("*.cu")) if path.stem in names or not names]
    if not sources:
        sys.exit(f"there is no .cu file in csrc/cuda{' so named' if names else ''}")
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        print("no cuobjdump beside nvcc, on PATH or with Triton: instructions are not looked at")
    print(f"{'kernel':64s} {'target':7s} {'registers':>9s} {'stack':>5s} {'spills':>6s} {'static shared':>13s}")
    faults = []
    for source in sources:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder, f"{source.stem}.o")
            usages = read_report(ptxas_report(nvcc, source, target))
            if cuobjdump is not None:
                faults += missing_opcodes(cuobjdump, target)
        if not usages:
            sys.exit(f"{source.name}: ptxas names no kernel")
        for usage in usages:
            title = f"{source.stem}: {readable(usage.name)}"
            numbers = f"{usage.registers:9d} {usage.stack:5d} {usage.spills:6d} {usage.shared:13d}"
            print(f"{title:64s} {usage.target:7s} {numbers}", flush=True)
            if usage.faults:
                faults.append(f"{title}, {usage.target}: {usage.faults}")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main(sys.argv[1:])
