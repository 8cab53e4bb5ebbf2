"""How much memory a batch will take, known before it is tried."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusion_runtime.cache import check_cache, page_size_of
from diffusion_runtime.models import LanguageModel

_HEAD = 8_000_000  # logits that exist at once, and the buffers of products


@dataclass(frozen=True)
class Plan:
    """What a batch takes, in bytes."""

    batch: int
    length: int
    weights: int
    keys: int  # of the cache
    step: int  # the most that is alive within a step, beside these

    @property
    def total(self) -> int:
        """At the peak."""
        return self.weights + self.keys + self.step


def plan(model: LanguageModel, *, batch: int, length: int, cache: str = "none", guidance: bool = False) -> Plan:
    """The peak of denoising a batch with a :class:`diffusion_runtime.Denoiser`.

    The model is run on tensors without memory, and what would be alive is counted; so nothing is allocated, and a model
    on the meta device will do.

    Args:
        model: native.
        batch: sequences that are denoised together.
        length: of the longest, prompt and answer.
        cache: as for :class:`diffusion_runtime.Denoiser`.
        guidance: whether each sequence is run a second time, for classifier-free guidance.

    Raises:
        ValueError: counts below 1, or a cache that does not fit the model.
    """
    for name, value in (("batch", batch), ("length", length)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_cache(cache, model.block_length, None, has_keys=model.key_shape is not None)
    rows = batch * (2 if guidance else 1)
    tensors = {id(x): x for x in (*model.parameters(), *model.buffers())}
    weights = sum(x.nbytes for x in tensors.values())
    keys = 0
    if model.key_shape is not None and cache != "none":
        layers, heads, dim = model.key_shape
        size = page_size_of(model.block_length)
        positions = (rows * -(-length // size) + 1) * size
        keys = 2 * layers * heads * dim * positions * next(model.parameters()).element_size()
    return Plan(batch, length, weights, keys, _alive(model, rows, length) + _HEAD)


def require(
    model: LanguageModel,
    *,
    batch: int,
    length: int,
    cache: str = "none",
    guidance: bool = False,
    available: int | None = None,
) -> Plan:
    """As :func:`plan`, or an error where there is not enough.

    Args:
        available: bytes, the weights' own counted if they lie on their device already. None: what the device says is
            free, and what the weights there take.

    Raises:
        MemoryError: it would not fit; the message says what would.
    """
    wanted = plan(model, batch=batch, length=length, cache=cache, guidance=guidance)
    room = _room(model, wanted) if available is None else available
    if wanted.total <= room:
        return wanted

    def fits(batch: int, length: int) -> bool:
        return plan(model, batch=batch, length=length, cache=cache, guidance=guidance).total <= room

    sequences = _most(batch, lambda n: fits(n, length))
    longest = _most(length, lambda n: fits(1, n))
    would = [f"{sequences} of that length"] * (sequences > 0) + [f"one of {longest} positions"] * (longest > 0)
    raise MemoryError(
        f"{batch} sequences of {length} positions take {_gb(wanted.total)} ({_gb(wanted.weights)} of weights, "
        f"{_gb(wanted.keys)} of keys, {_gb(wanted.step)} in a step), and there are {_gb(room)}; what would fit: "
        f"{' or '.join(would) or 'nothing, not even the weights with one position'}"
    )


def _most(limit: int, fits: Any) -> int:
    """The largest number below ``limit`` that fits, or 0."""
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _room(model: LanguageModel, wanted: Plan) -> int:
    device = next(model.parameters()).device
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held + wanted.weights
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError as error:
        raise ValueError("this system does not say how much memory is free: give available=") from error
    free: int = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    return free + (0 if device.type == "meta" else wanted.weights)


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


@torch.no_grad()
def _alive(model: LanguageModel, rows: int, length: int) -> int:
    from torch._subclasses.fake_tensor import FakeTensorMode

    device = next(model.parameters()).device
    with FakeTensorMode(allow_non_fake_inputs=True), _Alive() as alive:
        tokens = torch.zeros(rows, length, dtype=torch.int64, device=device)
        states = model.hidden(tokens)
        states.gather(1, torch.zeros_like(tokens)[..., None].expand_as(states))
    peak: int = alive.peak
    return peak


class _Alive(TorchDispatchMode):
    """Counts the bytes of every storage that is made, until it goes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: int = 0
        self.peak: int = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, count = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.bytes += count
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._gone, key, count)

    def _gone(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.bytes -= count
