"""Reads what nvcc made of each CUDA kernel, out of the built module: it needs no GPU.

    python tests/compile/compile_cuda.py [word ...]     # only the kernels whose names hold one of these
    python tests/compile/compile_cuda.py --record       # keep the counts, which may not grow by over 5 % from then on

Fails where a kernel keeps a stack frame, which is where spilled registers lie: something sits in memory that was meant
to sit in a register; where it does not read its inputs by 16 bytes; where it lacks an instruction that it is built
around (``OPCODES``); and where a count grew (``guard.py``). Skipped only where there is no nvcc.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import guard

ROOT = Path(__file__).resolve().parents[2]
MODULE = "diffusion_runtime._C_cuda"
TARGETS = ("sm_80", "sm_90a")  # as in setup.py

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

RESOURCES = re.compile(
    r"arch = (?P<target>sm_\w+)|Function (?P<entry>\S+):"
    r"|REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+) LOCAL:(?P<local>\d+)"
)
SASS = re.compile(
    r"arch = (?P<target>sm_\w+)|Function : (?P<entry>\S+)|^\s+/\*[0-9a-f]+\*/\s+(?P<code>.*);", re.MULTILINE
)


class Usage(NamedTuple):
    """What one kernel takes on one target."""

    name: str
    target: str
    registers: int
    stack: int  # bytes, those of spilled registers among them
    shared: int  # the static part
    missing: tuple[str, ...]  # of the instructions that it must have
    opcodes: tuple[str, ...] = ()  # of all its instructions

    @property
    def faults(self) -> str:
        found = [f"a stack frame of {self.stack} bytes"] if self.stack else []
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


def built_module(nvcc: str) -> Path:
    """The extension module, which must be newer than what it is made of."""
    found = find_spec(MODULE)
    if found is None or found.origin is None:
        sys.exit(f"{nvcc} is there and {MODULE} is not: the build failed, or left it out")
    module = Path(found.origin)
    sources = [path for folder in ("cuda", "include") for path in (ROOT / "csrc" / folder).iterdir()]
    if newer := [path.name for path in sources if path.stat().st_mtime > module.stat().st_mtime]:
        sys.exit(f"{module.name} is older than {newer[0]}: build it again")
    return module


def usages_of(cuobjdump: str, module: Path) -> list[Usage]:
    resources, sass = (
        subprocess.run([cuobjdump, option, str(module)], capture_output=True, text=True, check=True).stdout
        for option in ("-res-usage", "-sass")
    )
    instructions = instructions_of(sass)
    return [with_instructions(usage, instructions[usage[:2]]) for usage in read_resources(resources)]


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
    usage = usage._replace(opcodes=tuple(re.sub(r"^@!?U?P\w+\s+", "", code).split(" ", 1)[0] for code in instructions))
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


def read_resources(report: str) -> list[Usage]:
    """Each kernel's line of the table."""
    usages: list[Usage] = []
    name, target = "", ""
    for match in RESOURCES.finditer(report):
        name, target = match["entry"] or name, match["target"] or target
        if match["registers"]:
            stack = int(match["stack"]) + int(match["local"])
            usages.append(Usage(name, target, int(match["registers"]), stack, int(match["shared"]), ()))
    return usages


def readable(name: str) -> str:
    """``kernel<template arguments>`` without namespace and parameters, where c++filt is at hand."""
    if shutil.which("c++filt") is None:
        return name
    demangled = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    without_parameters = re.sub(r"\((?!anonymous).*", "", demangled.removeprefix("void "))
    return re.sub(r"(\(anonymous namespace\)|\w+)::", "", without_parameters)


def version_of(nvcc: str) -> str:
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V[\d.]+", said)
    return f"nvcc {found[0] if found else 'unknown'}"


def main(arguments: list[str]) -> None:
    words = [word for word in arguments if word != "--record"]
    nvcc = find_nvcc()
    if nvcc is None:
        print("skipped: no CUDA kernel was compiled, because there is no nvcc in CUDA_HOME/bin or on PATH")
        return
    usages = usages_of(find_cuobjdump(nvcc), built_module(nvcc))
    if {usage.target for usage in usages} != set(TARGETS):
        sys.exit(f"the module must be built for {TARGETS[0]} and {TARGETS[1]}")
    chosen = [usage for usage in usages if not words or any(word in usage.name for word in words)]
    if not chosen:
        sys.exit("there is no kernel so named")
    print(f"{'kernel':72s} {'target':7s} {'registers':>9s} {'stack':>5s} {'static shared':>13s}")
    titled = sorted((readable(usage.name), usage) for usage in chosen)
    for title, usage in titled:
        print(f"{title:72s} {usage.target:7s} {usage.registers:9d} {usage.stack:5d} {usage.shared:13d}")
    faults = [f"{title}, {usage.target}: {usage.faults}" for title, usage in titled if usage.faults]
    if not words and not faults:
        counts: guard.Counts = {}
        for title, usage in titled:
            counts |= guard.of_kernel(f"{title}, {usage.target}", usage.registers, usage.shared, usage.opcodes)
        faults = guard.check(version_of(nvcc), counts, record="--record" in arguments)
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main(sys.argv[1:])
