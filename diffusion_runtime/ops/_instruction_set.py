"""Which instruction set the C++ kernels run with."""

from __future__ import annotations

import os


def instruction_set() -> str:
    """The fastest that can run here, or the one named in ``DIFFUSION_RUNTIME_INSTRUCTION_SET``."""
    from diffusion_runtime import _C

    usable = _C.instruction_sets()
    wanted = os.environ.get("DIFFUSION_RUNTIME_INSTRUCTION_SET") or usable[0]
    if wanted not in usable:
        raise ImportError(f"DIFFUSION_RUNTIME_INSTRUCTION_SET={wanted}, but this CPU has {', '.join(usable)}")
    return wanted
