"""Which instruction set the C++ kernels run with."""

from __future__ import annotations

import os
from functools import cache

from diffusion_runtime.ops import _registry


def instruction_set() -> str:
    """The fastest that can run here, or the one named in ``DIFFUSION_RUNTIME_INSTRUCTION_SET``."""
    from diffusion_runtime import _C

    usable = _C.instruction_sets()
    wanted = os.environ.get("DIFFUSION_RUNTIME_INSTRUCTION_SET") or usable[0]
    if wanted not in usable:
        raise ImportError(f"DIFFUSION_RUNTIME_INSTRUCTION_SET={wanted}, but this CPU has {', '.join(usable)}")
    return wanted


def cpp_instruction_set() -> str | None:
    """The same; None where the C++ kernels are not built, or ``DIFFUSION_RUNTIME_BACKEND`` names another backend."""
    return _built() if _registry.DEFAULT_BACKEND in ("auto", "cpp") else None


@cache
def _built() -> str | None:
    try:
        return instruction_set()
    except ImportError:
        return None
