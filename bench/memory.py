"""Peak memory of a call.

On a CPU, the high-water mark of the resident set, as the kernel of Linux keeps it: it sees the buffers of C++ as well
as those of torch. Freed memory that the allocator keeps would hide an allocation, so it is handed back first. On a
GPU, the peak of torch's allocator, from which all of our backends take their memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")

_KNOWN_BYTES = 4_000_000
GAUGE_ERROR_MB = 0.5


def peak_extra_mb(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """The result of a call, and the memory it used beyond what was in use before, its result included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
    before = _kilobytes("/proc/self/status", "VmHWM")
    result = call()
    return result, (_kilobytes("/proc/self/status", "VmHWM") - before) * 1024 / 1e6


def unmeasurable(device: torch.device) -> str | None:
    """Why :func:`peak_extra_mb` cannot be believed here, or None: it is tried on an allocation of known size."""
    freed = torch.ones(30_000_000, dtype=torch.uint8)  # glibc keeps blocks up to this size from now on
    del freed
    try:
        _, mb = peak_extra_mb(lambda: torch.ones(_KNOWN_BYTES, dtype=torch.uint8, device=device), device)
    except (OSError, AttributeError) as error:
        return f"no high-water mark of memory on this system: {error}"
    if abs(mb - _KNOWN_BYTES / 1e6) > GAUGE_ERROR_MB:
        return f"an allocation of {_KNOWN_BYTES / 1e6} MB was measured as {mb:.2f} MB"
    return None


def available_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e6
    try:
        return _kilobytes("/proc/meminfo", "MemAvailable") * 1024 / 1e6
    except OSError:
        return float("inf")


def _kilobytes(path: str, name: str) -> int:
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1])
