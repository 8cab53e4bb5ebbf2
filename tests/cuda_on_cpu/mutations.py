"""Breaks sample_tokens in one place at a time; shows which build of its test notices: mutations.py [--all] [words]

Builds are tried up to the first that notices, with --all in any case. Fails if none does. Words: only mutations whose
name has one of them.
"""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILDS = {"plain": "-O1", "address": "-O1 -DQUICK -fsanitize=address", "thread": "-O1 -DQUICK -fsanitize=thread"}
KERNEL, CHUNK = "csrc/cuda/sample_tokens.cu", "csrc/cuda/row_chunk.cuh"
STATISTICS, PHILOX = "csrc/include/row_statistics.h", "csrc/include/philox.h"

# file, what is broken, the text, what stands there instead
MUTATIONS = [
    (KERNEL, "nothing", "", ""),
    (
        CHUNK,
        "no barrier after the chunk is loaded",
        "shared);\n  __syncthreads();\n  const float warp_max",
        "shared);\n  const float warp_max",
    ),
    (CHUNK, "no barrier before the warps' largest are read", "= warp_max;\n  __syncthreads();\n", "= warp_max;\n"),
    (CHUNK, "no barrier before the warps' sums are read", "= found;\n  __syncthreads();\n", "= found;\n"),
    (
        KERNEL,
        "no barrier before the tiles' masses are read",
        "  }\n  __syncthreads();\n  const int tile =",
        "  }\n  const int tile =",
    ),
    (KERNEL, "no barrier before the weights are read", "  __syncthreads();\n  double total", "  double total"),
    (KERNEL, "no barrier between groups of chunks", "    if (first > 0) __syncthreads();", "    "),
    (KERNEL, "no fence before the ticket", "    __threadfence();\n    shared.is_last =", "    shared.is_last ="),
    (KERNEL, "no fence after the ticket", "    __threadfence();\n    if (shared.is_last)", "    if (shared.is_last)"),
    (KERNEL, "the last but one merges", "== gridDim.y - 1", "== gridDim.y - 2"),
    (KERNEL, "the ticket is not handed back", "    if (shared.is_last) *ticket = 0;\n", ""),
    (
        KERNEL,
        "one thread leaves before a barrier",
        "  __syncthreads();\n  return shared.is_last;",
        "  if (threadIdx.x == 5) return false;\n  __syncthreads();\n  return shared.is_last;",
    ),
    (KERNEL, "chunks past the first blocks are skipped", "chunk += gridDim.y", "chunk += num_chunks"),
    (KERNEL, "the mask is ignored", "op.masked != nullptr && !op.masked[r]", "false"),
    (
        KERNEL,
        "a row that is not masked is not stored",
        "if (blockIdx.y == 0 && threadIdx.x == 0) store",
        "if (threadIdx.x == kThreads) store",
    ),
    (KERNEL, "the argmax is not stored", "  op.ids[op.rows + r] = sample.argmax;\n", ""),
    (CHUNK, "a tie of chunks or warps goes to the later", "other.argmax < into.argmax", "other.argmax > into.argmax"),
    (
        CHUNK,
        "a tie of threads goes to the later",
        "__reduce_min_sync(~0u, first)",
        "__reduce_max_sync(~0u, first == kNone ? -1 : first)",
    ),
    (CHUNK, "a tie of threads is not the second", "tie ? max : second", "second"),
    (CHUNK, "a thread's second is the largest of all", "if (x == max && first == kNone)", "if (x == max)"),
    (
        CHUNK,
        "second of merged parts forgets the smaller largest",
        "fmaxf(fminf(a.max, b.max), fmaxf(a.second, b.second))",
        "fmaxf(a.second, b.second)",
    ),
    (CHUNK, "a vector past the end is read", "length / kSize : 0;", "(length + kSize - 1) / kSize : 0;"),
    (CHUNK, "rows are taken as aligned", "reinterpret_cast<uintptr_t>(logits) % 16 == 0", "true"),
    (CHUNK, "the last element is not read", "length - num_vectors * kSize);", "length - num_vectors * kSize - 1);"),
    (CHUNK, "the last vector is not filled up", "shared.logits[behind] = minus_infinity<T>();", ";"),
    (CHUNK, "the product before the difference", "return (y - top) * scale;", "return y * scale - top * scale;"),
    (CHUNK, "the moment of -inf is not clamped", "fmaxf(z, kLowestExponent) * weight", "z * weight"),
    (CHUNK, "-inf is softcapped", "scales.softcap > 0 && x != -INFINITY", "scales.softcap > 0"),
    (
        CHUNK,
        "the draw at the statistics' temperature",
        "exponent(y[i], top, row.scales.draw)",
        "exponent(y[i], top, row.scales.statistics)",
    ),
    (
        KERNEL,
        "no second mass at all",
        "row.two_masses = row.scales.draw > 0 && row.scales.draw != row.scales.statistics",
        "row.two_masses = false",
    ),
    (KERNEL, "the uniforms are swapped", "uniforms.first * draw_mass", "uniforms.second * draw_mass"),
    (KERNEL, "one uniform for both", "uniforms.second * total", "uniforms.first * total"),
    (KERNEL, "the target is not rescaled to the chunk", "  target *= part.draw_mass / chunk_mass(chunk);\n", ""),
    (KERNEL, "chunk masses from the last group only", "num_chunks <= kThreads ?", "true ?"),
    (KERNEL, "the position counts all rows", ": inner_index;", ": r;"),
    (KERNEL, "the step is 0", "static_cast<uint32_t>(at(op.step, r))", "0"),
    (KERNEL, "the outer stride is not used", "outer_index * op.outer_stride", "outer_index * op.inner_stride"),
    (KERNEL, "a stride is cut to 32 bits", "inner_index * op.inner_stride", "inner_index * int(op.inner_stride)"),
    (STATISTICS, "the moment is not shifted", "(part.moment + part.mass * shift)", "part.moment"),
    (STATISTICS, "parts are not rescaled", "weight = exp2(shift)", "weight = 1"),
    (STATISTICS, "a token without mass can be drawn", "if (m > target) return i;", "if (m >= target) return i;"),
    (STATISTICS, "rows with NaN have a distribution", "max - max == 0 && mass == mass", "max - max == 0"),
    (STATISTICS, "rows with inf have a distribution", "max - max == 0 && mass == mass", "mass == mass"),
    (PHILOX, "nine rounds", "round < 10", "round < 9"),
    (PHILOX, "half the seed", "static_cast<uint32_t>(seed >> 32)", "0"),
]

SIGNS = (
    ("deadlock", "deadlock"),
    ("of the mask is at", "diverged"),
    ("no multiple", "misaligned"),
    ("data race", "race"),
    ("AddressSanitizer", "bad address"),
    ("FAILED", "wrong result"),
)


def verdict(file: str, old: str, new: str, build: str) -> str:
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
        command = f"g++ -std=c++17 -w {BUILDS[build]} {includes} tests/cuda_on_cpu/test_sample_tokens.cpp -o test"
        subprocess.run(command.split(), cwd=folder, check=True)
        try:
            run = subprocess.run(["./test"], cwd=folder, capture_output=True, text=True, errors="replace", timeout=300)
        except subprocess.TimeoutExpired:
            return "hangs"
    if run.returncode == 0:
        return "-"
    output = run.stdout + run.stderr
    return next((word for sign, word in SIGNS if sign in output), f"exit {run.returncode}")


def verdicts(file: str, old: str, new: str, every_build: bool) -> list[str]:
    """Of each build in turn, up to the first that notices: the others may do without."""
    found: list[str] = []
    for build in BUILDS:
        noticed = bool(old) and not every_build and any(v != "-" for v in found)
        found.append("" if noticed else verdict(file, old, new, build))
    return found


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--all"]
    chosen = [m for m in MUTATIONS if not words or any(word in m[1] for word in words)]
    unexpected = 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = [pool.submit(verdicts, file, old, new, "--all" in sys.argv) for file, _, old, new in chosen]
        print(f"{'file':18}{'broken':54}" + "".join(f"{build:14}" for build in BUILDS))
        for (file, what, old, _), run in zip(chosen, runs, strict=True):
            row = run.result()
            unexpected += bool(old) == all(v in ("-", "") for v in row)
            print(f"{Path(file).name:18}{what:54}{''.join(f'{v:14}' for v in row)}".rstrip(), flush=True)
    sys.exit(f"{unexpected} unexpected" if unexpected else 0)


if __name__ == "__main__":
    main()
