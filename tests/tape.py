"""A CUDA graph's meaning on the CPU: what was run is run again, on the same memory, with the same numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# on a GPU the host waits for their results
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select")


class Tape(TorchDispatchMode):
    """Every operation of torch that a function calls; memory is left as it was.

    Whatever Python decided or computed stays as it was, as in a CUDA graph: a number, a branch, which tensor is meant.
    Kernels that torch does not dispatch are not noted.
    """

    def __init__(self, run: Callable[[], None]) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.waiting: set[str] = set()  # files of the callers of WAITS
        self._overwritten: list[tuple[Tensor, Tensor]] = []  # and what was there
        with self:
            run()
        for tensor, before in reversed(self._overwritten):
            tensor.copy_(before)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        del types
        kwargs = kwargs or {}
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(given.get(argument.name), Tensor):
                self._overwritten.append((given[argument.name], given[argument.name].clone()))
        if func._schema.name in WAITS:
            frame = sys._getframe(1)
            while frame.f_back is not None and frame.f_globals["__name__"].startswith("torch."):
                frame = frame.f_back
            self.waiting.add(Path(frame.f_code.co_filename).name)
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, _tensors(out)))
        return out

    def replay(self) -> None:
        for func, args, kwargs, outputs in self.calls:
            for old, new in zip(outputs, _tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():  # not a view of its input, nor written in place
                    old.copy_(new)


def _tensors(out: object) -> list[Tensor]:
    return [x for x in tree_leaves(out) if isinstance(x, Tensor)]
