"""Compiles every ``csrc/cuda/*.cu`` for GPUs that need not be here, and reads what the assembler says of each kernel.

    python tests/compile/compile_cuda.py [name ...]     # only the files so named

Fails where a kernel spills registers or keeps a stack frame: both mean that something sits in memory that was meant to
sit in a register; where it does not read its inputs by 16 bytes; and where it lacks an instruction that it is built
around (``OPCODES``). Skipped only where there is no nvcc.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("80", "90a")  # as in setup.py

# of inputs that nobody writes, by each way there is: a load, a copy to shared memory, a tile by the copy engine
WIDE_LOAD = r"LDG\S*\.128\S*\.CONSTANT|LDGSTS\S*\.128|UTMALDG"
# a kernel, by a word of its name: what its instructions must match, where that is not a wide load of its input
OPCODES: dict[str, tuple[str, ...]] = {
    # products by tensor cores; copies to shared memory that go past the registers, 16 bytes each
    "head_parts_kernel": (r"HMMA\.16816\.F32(\.BF16)?", r"LDGSTS\.E\.BYPASS\.(LTC128B\.)?128(\.ZFILL)?"),
    # logits that another kernel has just written
    "logit_parts_kernel": (r"LDG\.E\.(64|128)",),  # four tokens a lane
    "weigh_kernel": (r"LDG\.E\.128",),
    # products by tensor cores in 16 bits; none in float32, which is exact
    "attention_kernel": (r"HMMA\.16816\.F32(\.BF16)?|FFMA", r"LDGSTS\.E\.BYPASS\.(LTC128B\.)?128(\.ZFILL)?"),
    # warpgroup products, tiles by the copy engine, registers that change hands
    "attention_hopper_kernel": (r"HGMMA\.64x\d+x16\.F32(\.BF16)?", "UTMALDG", "USETMAXREG"),
    # some hundred positions: bytes do not matter there
    "commit_step_kernel": (),
    "choose_rows_kernel": (),
    # a cache or an output may be what was read
    "rms_norm_kernel": (r"LDG\.E\.128",),
    "qk_norm_rope_kernel": (r"LDG\.E\.128",),
}
# what must stand between two instructions, and how often: the exponentials of a block (here, the maxima before them)
# while the products of the block before run, where the assembler likes to put the wait for these products first
BETWEEN = {"attention_hopper_kernel": (r"DEPBAR\.LE gsb0, 0x1", r"DEPBAR\.LE gsb0, 0x0", "FMNMX", 32)}
# the only target of a kernel, by a word of its name: compiled to nothing for the others
ONLY = {"hopper": "sm_90a"}

PTXAS = re.compile(
    r"Compiling entry function '(?P<entry>\S+)' for '(?P<target>\S+)'"
    r"|(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r"|Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?"
)
SASS = re.compile(
    r"arch = (?P<target>sm_\w+)|Function : (?P<entry>\S+)|^\s+/\*[0-9a-f]+\*/\s+(?P<code>.*);", re.MULTILINE
)


class Usage(NamedTuple):
    """What one kernel takes on one target, as ptxas says it."""

    name: str
    target: str
    registers: int
    stack: int
    spills: int
    shared: int  # the static part
    missing: tuple[str, ...]  # of the instructions that it must have

    @property
    def faults(self) -> str:
        found = [f"a stack frame of {self.stack} bytes"] if self.stack else []
        found += [f"{self.spills} bytes of spills"] if self.spills else []
        found += [f"no {opcode}" for opcode in self.missing]
        return " and ".join(found)


def find_nvcc() -> str | None:
    """CUDA_HOME's, or the one on PATH: setup.py's rule."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def find_cuobjdump(nvcc: str) -> str:
    """The one beside nvcc or on PATH, or else the one that triton brings."""
    found = shutil.which("cuobjdump", path=f"{Path(nvcc).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is not None:
        return found
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump")


def usages_of(nvcc: str, cuobjdump: str, source: Path) -> list[Usage]:
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder, "kernel.o")
        command = [
            nvcc,
            "-std=c++17",
            "-O3",
            "-Xptxas",
            "-v",
            "-c",
            "-o",
            str(compiled),
            "--threads",
            str(len(TARGETS)),
        ]
        command += [f"-I{ROOT / include}" for include in ("csrc/include", "csrc/cuda")]
        command += [f"-gencode=arch=compute_{target},code=sm_{target}" for target in TARGETS]
        done = subprocess.run([*command, str(source)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{source.name} does not compile\n{done.stdout}{done.stderr}")
        sass = subprocess.run([cuobjdump, "-sass", str(compiled)], capture_output=True, text=True, check=True).stdout
    instructions = instructions_of(sass)
    return [with_instructions(usage, instructions[usage[:2]]) for usage in read_report(done.stdout + done.stderr)]


def instructions_of(sass: str) -> defaultdict[tuple[str, str], list[str]]:
    """By kernel and target."""
    found: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    target, entry = "", ""
    for match in SASS.finditer(sass):
        target, entry = match["target"] or target, match["entry"] or entry
        if match["code"]:
            found[entry, target].append(match["code"])
    return found


def with_instructions(usage: Usage, instructions: list[str]) -> Usage:
    if any(word in usage.name and usage.target != target for word, target in ONLY.items()):
        return usage
    wanted = next((patterns for word, patterns in OPCODES.items() if word in usage.name), (WIDE_LOAD,))
    missing = tuple(pattern for pattern in wanted if not any(re.search(pattern, code) for code in instructions))
    for word, (first, last, what, times) in BETWEEN.items():
        if word in usage.name and count_between(instructions, first, last, what) < times:
            missing = (*missing, f"{times} {what} between {first} and {last}")
    return usage._replace(missing=missing)


def count_between(instructions: list[str], first: str, last: str, what: str) -> int:
    """From the only instruction that matches ``first`` to the next that matches ``last``."""
    start = next((i for i, code in enumerate(instructions) if re.search(first, code)), len(instructions))
    rest = instructions[start:]
    end = next((i for i, code in enumerate(rest) if re.search(last, code)), 0)
    return sum(bool(re.search(what, code)) for code in rest[:end])


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
            usages.append(Usage(name, target, int(match["registers"]), stack, spills, int(match["shared"] or 0), ()))
    return usages


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
    cuobjdump = find_cuobjdump(nvcc)
    numbers = f"{'registers':>9s} {'stack':>5s} {'spills':>6s} {'static shared':>13s}"
    print(f"{'kernel':64s} {'target':7s} {numbers}")
    faults = []
    for source in sources:
        usages = usages_of(nvcc, cuobjdump, source)
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
