"""The libraries that peers need: which are here, and which are not."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("torch", "triton", "transformers", "flash-attn", "flashinfer-python", "liger-kernel")


def found() -> dict[str, str]:
    """Versions, or that a library is not installed: its peers are then left out."""
    return {name: _version(name) for name in LIBRARIES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
