"""One op = one spec: its reference, its checks, and its implementations in order of preference."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

logger = logging.getLogger("diffusion_runtime")

BACKENDS = ("reference", "cpp", "triton", "cuda")
# read once: os.environ.get costs as much as the rest of the dispatch
DEFAULT_BACKEND = os.environ.get("DIFFUSION_RUNTIME_BACKEND") or "auto"


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for cannot run this call; the message says why."""


@dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    Args:
        backend: One of :data:`BACKENDS`.
        devices: Device types it accepts.
        dtypes: Dtypes of the op's main input it accepts.
        load: Imports and returns the callable. Raises ImportError or OSError where it is not built.
    """

    backend: str
    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    load: Callable[[], Callable[..., Any]]
    refuses: Callable[[Any], str | None] | None = None
    """The reason it cannot take this very call, or None; for :meth:`OpSpec.resolve_call`."""

    def rejects(self, device: str, dtype: torch.dtype) -> str | None:
        """The reason this implementation cannot take such an input, or None."""
        if device not in self.devices:
            return f"takes {_names(self.devices)} tensors, got {device}"
        if dtype not in self.dtypes:
            return f"takes {_names(self.dtypes)}, got {dtype}"
        try:
            self.load()
        except (ImportError, OSError) as error:
            return f"is not available: {error}"
        return None


@dataclass(frozen=True)
class OpSpec:
    """What an op is (``reference``, ``validate``) and how it can run (``implementations``)."""

    name: str
    reference: Callable[..., Any]
    validate: Callable[..., None]
    implementations: tuple[Implementation, ...] = field(default=())

    def __post_init__(self) -> None:
        REGISTRY[self.name] = self

    def resolve(self, device: str, dtype: torch.dtype, backend: str | None) -> Callable[..., Any]:
        """Pick the implementation for an input. A repeated call is one dict lookup."""
        key = (self.name, device, dtype, backend or DEFAULT_BACKEND)
        run = _RESOLVED.get(key)
        if run is None:
            run = _RESOLVED[key] = _resolve(*key)
        return run

    def resolve_call(self, device: str, dtype: torch.dtype, backend: str | None, call: Any) -> Callable[..., Any]:
        """:meth:`resolve`, where more than the device and the dtype of a call decides who can take it."""
        key = (self.name, device, dtype, backend or DEFAULT_BACKEND)
        usable = _USABLE.get(key)
        if usable is None:
            usable = _USABLE[key] = _usable(*key)
        reasons = []
        for implementation, run in usable:
            reason = None if implementation.refuses is None else implementation.refuses(call)
            if reason is None:
                return run
            reasons.append(f"  {implementation.backend} {reason}")
        if key[3] in ("auto", "reference"):
            return self.reference
        raise BackendUnavailableError(_cannot_run(self.name, key[3], reasons))


REGISTRY: dict[str, OpSpec] = {}
# a dict, not functools.cache, which torch.compile cannot trace
_RESOLVED: dict[tuple[str, str, torch.dtype, str], Callable[..., Any]] = {}
_USABLE: dict[tuple[str, str, torch.dtype, str], tuple[tuple[Implementation, Callable[..., Any]], ...]] = {}


def _resolve(name: str, device: str, dtype: torch.dtype, backend: str) -> Callable[..., Any]:
    spec = REGISTRY[name]
    if backend == "reference":
        return spec.reference
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"unknown backend {backend!r}; expected one of auto, {', '.join(BACKENDS)}")

    reasons = []
    for implementation in spec.implementations:
        if backend not in ("auto", implementation.backend):
            continue
        reason = implementation.rejects(device, dtype)
        if reason is None:
            logger.debug("%s(%s, %s) -> %s", name, device, dtype, implementation.backend)
            return implementation.load()
        reasons.append(f"  {implementation.backend} {reason}")

    if backend == "auto":
        # falling back is normal on a machine without a GPU, so it is said once and quietly; a log would break a graph
        if not torch.compiler.is_compiling():
            logger.info("%s(%s, %s) -> reference\n%s", name, device, dtype, "\n".join(reasons))
        return spec.reference
    raise BackendUnavailableError(_cannot_run(name, backend, reasons))


def _usable(
    name: str, device: str, dtype: torch.dtype, backend: str
) -> tuple[tuple[Implementation, Callable[..., Any]], ...]:
    """What may run such inputs, the preferred one first; raises where a named backend cannot run any."""
    _resolve(name, device, dtype, backend)
    return tuple(
        (implementation, implementation.load())
        for implementation in REGISTRY[name].implementations
        if backend in ("auto", implementation.backend) and implementation.rejects(device, dtype) is None
    )


def _cannot_run(name: str, backend: str, reasons: list[str]) -> str:
    detail = "\n".join(reasons) or f"  {name} has no {backend} implementation"
    return f"{name}: backend {backend!r} cannot run this call:\n{detail}"


def available_backends(name: str, device: str, dtype: torch.dtype) -> list[str]:
    """Backends that can run ``name`` on such an input, the preferred one first."""
    usable = [i.backend for i in REGISTRY[name].implementations if i.rejects(device, dtype) is None]
    return [*usable, "reference"]


def explain(name: str, device: str, dtype: torch.dtype) -> str:
    """One line per implementation: would it run, and if not, why not."""
    lines = []
    for implementation in REGISTRY[name].implementations:
        reason = implementation.rejects(device, dtype)
        lines.append(f"{implementation.backend:10s} {'ok' if reason is None else reason}")
    return "\n".join([f"{name}({device}, {dtype})", *lines, "reference  ok"])


def triton_devices() -> frozenset[str]:
    """Device types Triton can launch on; the CPU counts under its interpreter only."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return frozenset({"cuda", "cpu"} if interpreted else {"cuda"})


def _names(items: frozenset[Any]) -> str:
    return "/".join(sorted(str(item).removeprefix("torch.") for item in items))
