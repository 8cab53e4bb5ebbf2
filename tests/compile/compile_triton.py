"""Compiles every Triton kernel for GPUs that need not be here, and reads what the assembler made of it.

    python tests/compile/compile_triton.py [name ...]     # only the kernel files so named
    python tests/compile/compile_triton.py --record       # keep the counts, which may not grow by over 5 % from then on

Fails on a stack frame, a spill, too much shared memory, a missing instruction, or a count that grew (``guard.py``).
Cannot run under TRITON_INTERPRET: the interpreter replaces the compiler in the whole process.

**The convention.** Every file of ``kernels/`` that has a kernel, which is a name that ends in ``_kernel``, also has a
function that lists its compilations as the op really launches them::

    def ahead_of_time() -> list[tuple[Any, ...]]:
        signature = {"logits_ptr": "*bf16:16", "token_ptr": "*i64:16", "stride_row": "i32:16", "vocab": "i32"}
        config = _launch_config(vocab=126_464)
        return [("greedy bf16", _sample_tokens_kernel, signature, {"BLOCK": config["BLOCK"]}, {"num_warps": 8})]

Each tuple holds, in this order (see ``Compilation``):

* ``name``: what the table calls it; the file's name is put before it.
* ``kernel``: the ``@triton.jit`` function.
* ``signature``: the type of every run-time argument as Triton spells it (``*bf16``, ``*i1``, ``i32``, ``fp32``), with
  ``:16`` behind it to promise a multiple of 16, which is what a launch finds for torch's pointers and for most strides.
  Without that there are no wide loads.
* ``constexprs``: the value of every other argument: the ``tl.constexpr`` ones, pointers that are ``None``, strides that
  are 1.
* ``options``: ``num_warps``, ``num_stages``.
* optionally ``targets``: compute capabilities, ``(80, 90)`` when left out, where the launch rule differs by card.
* optionally ``opcodes``: SASS instructions that must appear, such as ``("HGMMA",)``.

List each dtype and branch that makes different code, not every shape: a compilation takes about a second.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import guard

ROOT = Path(__file__).resolve().parents[2]
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one block may use


class Compilation(NamedTuple):
    """One entry of a kernel file's ``ahead_of_time()``."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int]
    targets: tuple[int, ...] = (80, 90)
    opcodes: tuple[str, ...] = ()


class Usage(NamedTuple):
    """What the assembled kernel takes."""

    registers: int
    stack: int  # bytes a thread
    spills: int  # STL and LDL instructions
    shared: int  # bytes a block
    opcodes: Counter[str]


def kernel_files(names: list[str]) -> list[str]:
    """The kernel files asked for, or all: every ``kernels/*.py`` that is not private."""
    found = sorted(path.stem for path in (ROOT / "kernels").glob("*.py") if not path.stem.startswith("_"))
    unknown = set(names) - set(found)
    if unknown:
        sys.exit(f"no such kernel files: {sorted(unknown)}; there are {found}")
    return names or found


def compilations(file: str) -> list[Compilation]:
    """What a kernel file lists; nothing for a file of functions that kernels share."""
    module = importlib.import_module(f"diffusion_runtime.kernels.{file}")
    if not any(name.endswith("_kernel") for name in vars(module)):
        return []
    if not hasattr(module, "ahead_of_time"):
        sys.exit(
            f"kernels/{file}.py has no ahead_of_time(): say what to compile, as described in {Path(__file__).name}"
        )
    return [Compilation(*entry) for entry in module.ahead_of_time()]


def compile_for(case: Compilation, capability: int) -> Any:
    """Triton's compiled kernel, cubin included."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = case.kernel.arg_names
    described = {*case.signature, *case.constexprs}
    if described != set(arguments):
        raise ValueError(
            f"{case.name}: signature and constexprs differ from the kernel in {described ^ set(arguments)}"
        )
    source = ASTSource(
        case.kernel,
        signature={name: case.signature.get(name, "constexpr").removesuffix(":16") for name in arguments},
        constexprs={(arguments.index(name),): value for name, value in case.constexprs.items()},
        attrs={
            (arguments.index(name),): [["tt.divisibility", 16]]
            for name, kind in case.signature.items()
            if kind.endswith(":16")
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=case.options)


def usage_of(compiled: Any) -> Usage:
    """Registers and stack from the cubin's resource table, instructions from its disassembly."""
    import triton.backends.nvidia

    cuobjdump = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])

        def dump(what: str) -> str:
            return subprocess.run([cuobjdump, what, cubin], capture_output=True, text=True, check=True).stdout

        resources, sass = dump("-res-usage"), dump("-sass")
    instructions = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
    opcodes = Counter(instructions)
    return Usage(
        registers=_field("REG", resources),
        stack=_field("STACK", resources),
        spills=sum(count for name, count in opcodes.items() if name.split(".")[0] in ("STL", "LDL")),
        shared=compiled.metadata.shared,
        opcodes=opcodes,
    )


def _field(name: str, resources: str) -> int:
    match = re.search(rf"\b{name}:(\d+)", resources)
    if match is None:
        raise ValueError(f"no {name} in what cuobjdump says: {resources}")
    return int(match.group(1))


def widest_load(opcodes: Counter[str]) -> str:
    """The widest read of global memory and how often it stands in the code: ``LDG.128 x4``, ``TMA x2``."""
    widths: Counter[tuple[int, str]] = Counter()
    for opcode, count in opcodes.items():
        base, *modifiers = opcode.split(".")
        if base == "UTMALDG":
            return f"TMA x{count}"
        if base in ("LDG", "LDGSTS"):
            bits = next((int(m) for m in modifiers if m in ("64", "128")), 32)
            narrow = next((int(m[1:]) for m in modifiers if m in ("U8", "S8", "U16", "S16")), bits)
            widths[narrow, base] += count
    if not widths:
        return "-"
    bits, base = max(widths)
    return f"{base}.{bits} x{widths[bits, base]}"


def faults_of(case: Compilation, capability: int, usage: Usage) -> list[str]:
    """Why the kernel is not fit for the card, in words."""
    faults = []
    if usage.stack:
        faults.append(f"a stack frame of {usage.stack} bytes")
    if usage.spills:
        faults.append(f"{usage.spills} instructions that spill")
    if usage.shared > SHARED_LIMIT[capability]:
        faults.append(f"{usage.shared} bytes of shared memory, of {SHARED_LIMIT[capability]}")
    present = {name.split(".")[0] for name in usage.opcodes}
    faults += [f"no {opcode}" for opcode in case.opcodes if opcode not in present]
    return faults


def counts_of(title: str, usage: Usage) -> guard.Counts:
    """What may not grow."""
    return guard.of_kernel(title, usage.registers, usage.shared, list(usage.opcodes.elements()))


def main(words: list[str]) -> None:
    names = [word for word in words if word != "--record"]
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("unset TRITON_INTERPRET: interpreting and compiling cannot share a process")
    try:
        import triton
    except ImportError as error:
        print(f"skipped: no Triton kernel was compiled, because triton is not installed ({error})")
        return
    print(f"triton {triton.__version__}")
    print(f"{'kernel':52s} {'target':6s} {'registers':>9s} {'stack':>5s} {'spills':>6s} {'shared':>6s}  widest load")
    faults: list[str] = []
    counts: guard.Counts = {}
    for file in kernel_files(names):
        for case in compilations(file):
            for capability in case.targets:
                title, target = f"{file}: {case.name}", f"sm_{capability}"
                usage = usage_of(compile_for(case, capability))
                numbers = f"{usage.registers:9d} {usage.stack:5d} {usage.spills:6d} {usage.shared:6d}"
                print(f"{title:52s} {target:6s} {numbers}  {widest_load(usage.opcodes)}", flush=True)
                faults += [f"{title}, {target}: {fault}" for fault in faults_of(case, capability, usage)]
                counts |= counts_of(f"{title}, {target}", usage)
    if not names and not faults:
        faults = guard.check(f"triton {triton.__version__}", counts, record="--record" in words)
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main(sys.argv[1:])
