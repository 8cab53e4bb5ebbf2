"""Where and with what a record was made."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import diffusion_runtime

ROOT = Path(__file__).resolve().parents[1]


def describe(device: torch.device) -> dict[str, str]:
    facts = {
        "CPU": f"{_cpu_name()}, {_cores()} cores ({', '.join(_instruction_sets()) or 'no C++ backend'})",
        "load before": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "diffusion-runtime": f"{diffusion_runtime.__version__}, commit {_commit()}",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device.type == "cuda":
        facts = {"GPU": f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"} | facts
    return facts


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _instruction_sets() -> list[str]:
    try:
        from diffusion_runtime import _C
    except ImportError:
        return []
    return list(_C.instruction_sets())


def _commit() -> str:
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        return commit + (" with changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
