"""What is installed, and what importing it costs."""

import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# neither of these may be needed, or even touched, to import the package
OPTIONAL = ("triton", "transformers", "rich", "huggingface_hub", "tokenizers", "safetensors")

IMPORT_WITHOUT_ANYTHING = f"""
import sys, time
import torch
for name in ("triton", "diffusion_runtime._C", "diffusion_runtime._C_cuda"):
    sys.modules[name] = None  # importing it now raises ImportError
before = set(sys.modules)
start = time.process_time()
from diffusion_runtime import Denoiser, Step, load, ops  # names are resolved on first use: use them all
seconds = time.process_time() - start
touched = {{name.split(".")[0] for name in set(sys.modules) - before}} & set({OPTIONAL})
assert not touched, f"import diffusion_runtime imports {{sorted(touched)}}"
print(seconds)
"""


def _python(*arguments: str, cwd: Path, **environment: str) -> str:
    """Standard output of a Python process, which must succeed."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel of this tree, without the compiled modules: compiling them is the installation's part."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "setup.cfg").write_text(f"[build]\nbuild_base = {folder}/build\n")
    arguments = ["egg_info", "--egg-base", str(folder), "build_py"]
    arguments += ["bdist_wheel", "--skip-build", "--bdist-dir", str(folder / "bdist"), "--dist-dir", str(folder)]
    environment = {"DIST_EXTRA_CONFIG": str(folder / "setup.cfg"), "DIFFUSION_RUNTIME_CUDA": "0"}
    _python("-W", "ignore", "setup.py", "--quiet", *arguments, cwd=ROOT, **environment)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_wheel_has_one_top_level_package(wheel: zipfile.ZipFile):
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"diffusion_runtime"}


def test_wheel_holds_every_file_of_the_package(wheel: zipfile.ZipFile):
    def present(folder: str, pattern: str) -> set[str]:
        return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob(pattern) if path.is_file()}

    expected = present("diffusion_runtime", "**/*.py") | present("diffusion_runtime", "*.pyi")
    expected |= present("diffusion_runtime", "checkpoints/*/*") | {"diffusion_runtime/py.typed"}
    expected |= {f"diffusion_runtime/{name}" for name in present("kernels", "*.py")}
    assert not expected - set(wheel.namelist())
    assert any(name.endswith(".safetensors") for name in wheel.namelist())
    assert {"diffusion_runtime/_C.pyi", "diffusion_runtime/_C_cuda.pyi", "diffusion_runtime/tracing/page.html"} <= set(
        wheel.namelist()
    )


def test_wheel_is_imported_from_where_it_lies(wheel: zipfile.ZipFile, tmp_path: Path):
    wheel.extractall(tmp_path / "site")
    script = "import diffusion_runtime.kernels as k; from importlib.util import find_spec as f; print(k.__file__)"
    script += "; assert f('kernels') is None or 'site-packages' in f('kernels').origin"
    where = _python("-c", script, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert where.strip() == str(tmp_path / "site" / "diffusion_runtime" / "kernels" / "__init__.py")


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_works_beside_a_folder_named_kernels():
    # run in the root, where transformers' probe for Hugging Face's package `kernels` finds our folder
    script = "import kernels, transformers; transformers.AutoModelForMaskedLM; print(kernels.__file__)"
    assert _python("-c", script, cwd=ROOT).strip() == str(ROOT / "kernels" / "__init__.py")


def test_import_needs_nothing_optional_and_is_quick(tmp_path: Path):
    seconds = [float(_python("-c", IMPORT_WITHOUT_ANYTHING, cwd=tmp_path, PATH="")) for _ in range(5)]
    assert min(seconds) < 0.2, seconds  # of the processor; company only adds to it


def _pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {_normalized(line.split("==")[0]): line.split("==")[1] for line in lines}


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_pin_all_that_is_asked_for():
    names = {_normalized(re.split(r"[^\w.-]", line)[0]) for line in requires("diffusion-runtime") or []}
    assert not names - {"diffusion-runtime"} - set(_pins())


def test_constraints_bring_no_cuda():
    pins = _pins()
    assert pins["torch"] == "2.13.0"
    assert not [name for name in pins if re.match("nvidia|cuda|cupy", name)]


def test_no_registry_is_named():
    for name in ("constraints.txt", "pyproject.toml", "setup.py", "Makefile", ".ci/run"):
        assert not re.search(r"index-url|find-links|://", (ROOT / name).read_text()), name
