"""The rooms of docs/design.md, held by reading the imports: which part of the tree may use which."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "diffusion_runtime"
LINES = 300

BELOW_DENOISER = {"constraints", "denoising", "decoding", "cache", "models", "nn", "ops", "tracing", "loading"}

# a room, which is a file or a folder of the package: the other rooms that it may import
ROOMS: dict[str, set[str]] = {
    "__init__": {"denoiser", "integrations", *BELOW_DENOISER},
    "__main__": {"cli"},
    "cli": {"__version__", "denoiser", "parity", "sudoku", *BELOW_DENOISER},
    "denoiser": BELOW_DENOISER,
    "integrations": {"denoiser", *BELOW_DENOISER},
    "parity": {"denoiser", "denoising", "decoding", "ops"},
    "denoising": {"constraints", "decoding", "cache", "models", "nn", "ops"},
    "memory": {"cache", "models"},
    "decoding": {"ops"},
    "constraints": set(),
    "cache": {"nn", "ops"},
    "models": {"nn", "ops"},
    "loading": {"models", "nn"},
    "nn": {"ops"},
    "ops": set(),
    "tracing": set(),
    "sudoku": set(),
    "testing": {"ops"},
}
ONLY_INSIDE_FUNCTIONS = {"ops": {"kernels", "_C", "_C_cuda"}}  # may be absent, so an import must not need them

# a library that only some of our code may import; each file of integrations/ owns the library it is named after, with
# its _<library>_*.py
OWNERS = {
    "triton": ("kernels/", "diffusion_runtime/testing.py"),
    "rich": ("diffusion_runtime/cli",),
    "outlines_core": ("diffusion_runtime/constraints/languages.py",),
    "tokenizers": ("diffusion_runtime/cli",),
    "huggingface_hub": ("diffusion_runtime/cli", "diffusion_runtime/loading.py"),
    "safetensors": ("diffusion_runtime/loading.py",),
} | {
    path.stem: tuple(f"diffusion_runtime/integrations/{start}" for start in (path.name, f"_{path.stem}_"))
    for path in (PACKAGE / "integrations").glob("*.py")
    if not path.stem.startswith("_")
}


class Imported(NamedTuple):
    name: str
    inside_function: bool


def _imports(path: Path) -> Iterator[Imported]:
    def visit(node: ast.AST, inside_function: bool) -> Iterator[Imported]:
        if isinstance(node, ast.Import):
            yield from (Imported(alias.name, inside_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (Imported(f"{node.module}.{alias.name}", inside_function) for alias in node.names)
        type_checking = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        in_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside_function or in_function or type_checking)

    return visit(ast.parse(path.read_text()), False)


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def _sources(*folders: str) -> list[Path]:
    endings = (".h", ".inc", ".cpp", ".cu", ".cuh")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in endings)


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", _python_files("diffusion_runtime"), ids=_relative)
def test_a_room_imports_only_rooms_below_it(path: Path):
    room = _room(path)
    assert room in ROOMS, f"{room} is a new room: say in this table and in docs/design.md what it may import"
    for name, inside_function in _imports(path):
        parts = name.split(".")
        assert parts[0] not in ("kernels", "bench", "tests"), f"{name} is no part of the installed package"
        if parts[0] != "diffusion_runtime":
            continue
        assert len(parts) > 1, "import a room, not the whole package"
        allowed = ROOMS[room] | {room} | (ONLY_INSIDE_FUNCTIONS.get(room, set()) if inside_function else set())
        assert parts[1] in allowed, f"{room} may not import {name}{'' if inside_function else ' at module level'}"


@pytest.mark.parametrize("path", _python_files("kernels"), ids=_relative)
def test_kernels_import_torch_triton_and_each_other(path: Path):
    for name, _ in _imports(path):
        is_own = name.startswith("diffusion_runtime.kernels")
        assert is_own or name.split(".")[0] not in ("diffusion_runtime", "kernels", "bench", "tests"), name
        assert is_own or name.split(".")[0] in {"torch", "triton"} | sys.stdlib_module_names, name


@pytest.mark.parametrize("path", _python_files("diffusion_runtime", "kernels"), ids=_relative)
def test_a_library_is_imported_by_its_owner_only(path: Path):
    for name, _ in _imports(path):
        owners = OWNERS.get(name.split(".")[0])
        assert owners is None or _relative(path).startswith(owners), f"{name} belongs to {owners}"


@pytest.mark.parametrize("path", _python_files("bench", "examples"), ids=_relative)
def test_bench_and_examples_use_the_installed_package(path: Path):
    for name, _ in _imports(path):
        assert name.split(".")[0] not in ("kernels", "tests"), f"{name} is not importable once installed"


STANDARD = r"[a-z_]+|(math|stddef|stdint|string)\.h"
SYSTEM = {
    "csrc/include": rf"{STANDARD}|pybind11/.*",
    "csrc/cpu": rf"{STANDARD}|pybind11/.*|(immintrin|omp)\.h",
    "csrc/cuda": rf"{STANDARD}|pybind11/.*|cuda\w*\.h|cuda/.*|cooperative_groups\.h",
}


def _includes(path: Path) -> list[tuple[str, str]]:
    return re.findall(r'^\s*#\s*include\s+([<"])([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def _own_header(path: Path, name: str) -> Path | None:
    homes = [path.parent, ROOT / "csrc/include"]
    if path.name in ("gpu_ops.h", "hopper_ops.h"):  # the two files that say what an operation means on the CPU
        homes.append(ROOT / "tests/cuda_on_cpu/emulation")
    return next((home / name for home in homes if (home / name).exists()), None)


def _reaches_pybind11(path: Path) -> bool:
    for bracket, name in _includes(path):
        header = _own_header(path, name) if bracket == '"' else None
        if name.startswith("pybind11/") or (header is not None and _reaches_pybind11(header)):
            return True
    return False


@pytest.mark.parametrize("path", _sources("csrc"), ids=_relative)
def test_csrc_includes_its_own_headers_and_the_system(path: Path):
    folder = path.parent.relative_to(ROOT).as_posix()
    for bracket, name in _includes(path):
        if bracket == "<":
            assert re.fullmatch(SYSTEM[folder], name), f"{folder} may not include <{name}>"
        else:
            assert _own_header(path, name) is not None, f"{folder} may not include {name}"


def _is_binding(path: Path) -> bool:
    return path.suffix == ".cpp" or path.name == "bindings.h"


@pytest.mark.parametrize("path", [p for p in _sources("csrc/cuda") if not _is_binding(p)], ids=_relative)
def test_cuda_kernels_know_no_python(path: Path):
    assert not _reaches_pybind11(path), "kernels take pointers and a stream; module.cpp binds them"


@pytest.mark.parametrize("folder", ["diffusion_runtime", "kernels", "bench", "tests", "examples", "csrc"])
def test_no_file_is_long(folder: str):
    paths = [path for path in _python_files(folder) + _sources(folder) if "build" not in path.parts]
    lengths = {_relative(path): len(path.read_text().splitlines()) for path in paths}
    assert not {name: lines for name, lines in lengths.items() if lines > LINES}, f"over {LINES} lines"
