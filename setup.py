"""The part of the build that pyproject.toml cannot say: two extension modules, made from ``csrc/``.

* ``diffusion_runtime._C``       C++17 for CPUs, always. Files are compiled for the instruction set that their name ends
  in, and the module chooses among them when it runs: the build machine's processor does not matter.
* ``diffusion_runtime._C_cuda``  CUDA, where nvcc is found.

Neither includes a torch header, so torch is not needed to build and a built module works with any torch.

Environment:
    DIFFUSION_RUNTIME_CUDA        auto (default): build if nvcc is found, say so and go on if that fails.
                                  1: no nvcc, or a failed build, is an error. 0: never.
    DIFFUSION_RUNTIME_CUDA_ARCHS  compute capabilities, default "80;90a".
    DIFFUSION_RUNTIME_BUILD_JOBS  compilers at once, default one per processor.
    CUDA_HOME                     whose bin/nvcc to use; otherwise the nvcc on PATH.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
IS_X86_64 = platform.machine() in ("x86_64", "AMD64")
CUDA_MODE = os.environ.get("DIFFUSION_RUNTIME_CUDA", "auto")

# the ending of a file's name, without .cpp: what it is compiled for
INSTRUCTION_SETS = {
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512cd", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ],
}
# errno and traps stop loops from being vectorized; contraction is off so that all instruction sets round alike
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wall", "-Wextra"]
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler has none


def files(*patterns: str) -> list[str]:
    """Paths relative to the root, sorted so that builds are reproducible."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def instruction_set(path: str) -> list[str]:
    """The flags that a source file's name asks for."""
    stem = Path(path).stem
    return next((flags for ending, flags in INSTRUCTION_SETS.items() if stem.endswith(ending)), [])


class CudaExtension(Extension):
    """An extension that nvcc compiles and links: no guess about where CUDA keeps its files."""


class BuildExt(build_ext):
    """pybind11's build_ext, with flags per file, nvcc, and a CUDA build that may fail."""

    def build_extension(self, ext: Extension) -> None:
        if isinstance(ext, CudaExtension):
            self.build_cuda_or_go_on(ext)
            return
        compile_one = self.compiler._compile

        def compile_for_its_set(obj: str, src: str, suffix: str, cc: Any, flags: list[str], pp: Any) -> None:
            compile_one(obj, src, suffix, cc, [*flags, *instruction_set(src)], pp)

        self.compiler._compile = compile_for_its_set
        try:
            super().build_extension(ext)
        finally:
            self.compiler._compile = compile_one

    def build_cuda_or_go_on(self, ext: CudaExtension) -> None:
        try:
            self.build_with_nvcc(ext)
        except (OSError, subprocess.CalledProcessError) as error:
            if CUDA_MODE == "1":
                raise
            ext.optional = True  # build_ext then accepts that the file is missing
            announce_no_cuda(f"the build failed: {error}")

    def build_with_nvcc(self, ext: CudaExtension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        newest = max(os.path.getmtime(path) for path in [*ext.sources, *ext.depends])
        if not self.force and target.exists() and target.stat().st_mtime > newest:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        archs = os.environ.get("DIFFUSION_RUNTIME_CUDA_ARCHS", "80;90a").split(";")
        command = [str(find_nvcc()), "-shared", "-o", str(target), *ext.sources, "-cudart=static", "-std=c++17", "-O3"]
        command += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "0"]
        includes = [*ext.include_dirs, pybind11.get_include(), sysconfig.get_path("include")]
        command += [f"-I{path}" for path in includes]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None)


def announce_no_cuda(reason: str) -> None:
    print(f"*** diffusion_runtime is built without CUDA: {reason}", file=sys.stderr, flush=True)


def cpu_extension() -> Extension:
    sources = files("csrc/cpu/*.cpp")
    macros: list[tuple[str, str | None]] = []
    if not IS_X86_64:
        sources = [path for path in sources if not instruction_set(path)]
        macros = [("DIFFUSION_RUNTIME_PORTABLE_ONLY", None)]
    return Pybind11Extension(
        "diffusion_runtime._C",
        sources,
        include_dirs=["csrc/include", "csrc/cpu"],
        depends=files("csrc/include/*", "csrc/cpu/*.h", "csrc/cpu/*.inc"),
        define_macros=macros,
        cxx_std=17,
        extra_compile_args=FLAGS + OPENMP,
        extra_link_args=OPENMP,
    )


def cuda_extensions() -> list[Extension]:
    """The CUDA module, or nothing and a line that says why."""
    if CUDA_MODE not in ("auto", "0", "1"):
        sys.exit(f"DIFFUSION_RUNTIME_CUDA must be auto, 0 or 1, got {CUDA_MODE!r}")
    if CUDA_MODE == "0":
        announce_no_cuda("DIFFUSION_RUNTIME_CUDA=0")
        return []
    if find_nvcc() is None:
        if CUDA_MODE == "1":
            sys.exit("DIFFUSION_RUNTIME_CUDA=1, but there is no nvcc in CUDA_HOME/bin or on PATH")
        announce_no_cuda("no nvcc in CUDA_HOME/bin or on PATH")
        return []
    return [
        CudaExtension(
            "diffusion_runtime._C_cuda",
            files("csrc/cuda/*.cpp", "csrc/cuda/*.cu"),
            include_dirs=["csrc/include", "csrc/cuda"],
            depends=files("csrc/include/*", "csrc/cuda/*.h", "csrc/cuda/*.cuh"),
        )
    ]


def packages() -> list[str]:
    """Every package by name: an editable install does not find packages under a mapped folder."""
    return [*find_packages(include=["diffusion_runtime", "diffusion_runtime.*"]), "diffusion_runtime.kernels"]


with ParallelCompile("DIFFUSION_RUNTIME_BUILD_JOBS"):
    setup(
        packages=packages(),
        package_dir={"diffusion_runtime.kernels": "kernels"},
        package_data={"diffusion_runtime": ["py.typed", "*.pyi", "checkpoints/*/*", "tracing/page.html"]},
        ext_modules=[cpu_extension(), *cuda_extensions()],
        cmdclass={"build_ext": BuildExt},
    )
