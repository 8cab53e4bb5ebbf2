"""``diffusion-runtime doctor``: what is installed, what is built, and which backend would run each op."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from importlib import import_module, metadata
from itertools import groupby
from typing import Any

import torch

from diffusion_runtime import __version__
from diffusion_runtime.cli import backends
from diffusion_runtime.cli.errors import DONE
from diffusion_runtime.cli.output import announced, print_json
from diffusion_runtime.ops._registry import DEFAULT_BACKEND, REGISTRY

_EXTRAS = {"cli": ("rich", "tokenizers"), "hub": ("huggingface_hub",), "transformers": ("transformers",)}
_EXTENSIONS = {"_C": "C++ kernels for the CPU", "_C_cuda": "CUDA kernels", "kernels": "Triton kernels"}
_DEVICES = ("cpu", "cuda")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    with announced("looking at torch and the backends"):
        report = _report()
    if args.json:
        print_json(report)
    else:
        print("\n".join(_lines(report)))
    return DONE


def _report() -> dict[str, Any]:
    versions = {name: _version(name) for name in ("torch", "triton", "numpy")}
    return {
        "versions": {"diffusion-runtime": __version__, "python": platform.python_version(), **versions},
        "extras": {extra: {name: _version(name) for name in names} for extra, names in _EXTRAS.items()},
        "devices": {"cpu": _cpu(), "cuda": _cuda()},
        "extensions": {name: _extension(name) for name in _EXTENSIONS},
        "default_backend": DEFAULT_BACKEND,
        "ops": {op: {device: _op(op, device) for device in _DEVICES} for op in sorted(REGISTRY)},
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    usable = backends.instruction_sets()
    return {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "instruction_sets": usable,
        "instruction_set_in_use": usable[0] if usable else None,
    }


def _cuda() -> dict[str, Any]:
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return {"devices": [torch.cuda.get_device_name(index) for index in range(count)], "reason": None}
    if torch.version.cuda is None:
        return {"devices": [], "reason": f"torch {torch.__version__} is built without CUDA"}
    return {"devices": [], "reason": f"torch is built for CUDA {torch.version.cuda}, but finds no driver or no device"}


def _extension(name: str) -> dict[str, Any]:
    try:
        import_module(f"diffusion_runtime.{name}")
    except (ImportError, OSError) as error:
        return {"available": False, "reason": str(error)}
    return {"available": True, "reason": None}


def _op(op: str, device: str) -> dict[str, Any]:
    return {
        str(dtype).removeprefix("torch."): {
            "backend": backends.chosen(op, device, dtype),
            "candidates": {name: reason or "ok" for name, reason in backends.candidates(op, device, dtype).items()},
        }
        for dtype in _DTYPES
    }


def _lines(report: dict[str, Any]) -> Iterator[str]:
    yield "versions"
    yield from (_row(name, version or "not installed") for name, version in report["versions"].items())
    yield "\nextras"
    for extra, names in report["extras"].items():
        found = ", ".join(f"{name} {version or 'not installed'}" for name, version in names.items())
        remedy = "" if all(names.values()) else f" -> pip install 'diffusion-runtime[{extra}]'"
        yield _row(extra, found + remedy)
    yield from _device_lines(report["devices"])
    yield "\nextensions"
    for name, state in report["extensions"].items():
        yield _row(
            name, f"{_EXTENSIONS[name]}: {'available' if state['available'] else 'not built: ' + state['reason']}"
        )
    yield from _op_lines(report)


def _device_lines(devices: dict[str, Any]) -> Iterator[str]:
    cpu, cuda = devices["cpu"], devices["cuda"]
    yield "\ndevices"
    sets = ", ".join(cpu["instruction_sets"])
    use = f"{cpu['instruction_set_in_use']} in use of {sets}" if sets else "C++ kernels are not built"
    yield _row("cpu", f"{cpu['machine']}, {cpu['threads']} threads, {use}")
    yield _row("cuda", ", ".join(cuda["devices"]) or f"none: {cuda['reason']}")


def _op_lines(report: dict[str, Any]) -> Iterator[str]:
    forced = report["default_backend"]
    yield "\nops" if forced == "auto" else f"\nops (DIFFUSION_RUNTIME_BACKEND={forced})"
    for op, by_device in report["ops"].items():
        yield f"  {op}"
        for device, by_dtype in by_device.items():
            absent = " (no such device here)" if device == "cuda" and not report["devices"]["cuda"]["devices"] else ""
            for outcome, group in groupby(by_dtype.items(), key=lambda item: item[1]):
                dtypes = "/".join(dtype for dtype, _ in group)
                yield f"    {device} {dtypes}: {outcome['backend'] or 'nothing can run'}{absent}"
                for name, reason in outcome["candidates"].items():
                    if reason != "ok":
                        yield f"      not {name}: {' '.join(reason.split())}"


def _row(name: str, value: str) -> str:
    return f"  {name:<18} {value}"
