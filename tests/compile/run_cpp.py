"""Calls every C++ kernel once for each of its cases, for ``count_cpp.py`` to count the instructions of.

    python tests/compile/run_cpp.py MODULE.so INSTRUCTION_SET      # prints the cases, in the order of the calls

Torch would take minutes to import under a simulator, so that numpy's arrays stand in for its tensors here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from types import ModuleType
from typing import Any

import numpy as np

F32, I64 = np.float32, np.int64
UNBOUNDED = -1  # of what a query sees
Case = tuple[str, Callable[[], None]]


def load(path: str) -> Any:
    """The extension module, without its package, which would import torch."""
    torch, torch_c = ModuleType("torch"), ModuleType("torch._C")
    torch.Tensor, torch_c._to_dlpack = np.ndarray, np.ndarray.__dlpack__  # type: ignore[attr-defined]
    sys.modules.update({"torch": torch, "torch._C": torch_c})
    spec = spec_from_loader("_C", ExtensionFileLoader("_C", path))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def noise(*shape: int) -> Any:
    """Normal, the same each time."""
    return np.random.default_rng(sum(shape)).standard_normal(shape, F32)


def sampling(c: Any, wanted: str) -> Iterator[Case]:
    logits = noise(1, 4, 32_000) * F32(2.5)
    for name, temperature, cuts in (
        ("statistics", 0.0, (0, 1.0, 0.0)),
        ("at 1", 1.0, (0, 1.0, 0.0)),
        ("at 0.7", 0.7, (0, 1.0, 0.0)),
        ("top-k 50 and top-p 0.9", 1.0, (50, 0.9, 0.0)),
        ("min-p 0.05", 1.0, (0, 1.0, 0.05)),
    ):
        answers = np.empty((2, 4), I64), np.empty((5, 4), F32)
        settings = (None, temperature, 1, None, 0, 1.0, 0.0, None, *cuts, cuts != (0, 1.0, 0.0))
        yield f"sample_tokens, {name}", partial(c.sample_tokens, logits, *settings, *answers, wanted)


def attention(c: Any, wanted: str) -> Iterator[Case]:
    for name, length, before, heads, dim in (("square", 128, 0, 2, 64), ("canvas", 32, 256, 4, 128)):
        query, key, value = noise(1, heads, length, dim), noise(1, 2, length, dim), noise(1, 2, length, dim)
        prefix = [noise(1, 2, before, dim), noise(1, 2, before, dim)] if before else [None, None]
        answers = np.empty((1, heads, length, dim), F32), np.empty((1, heads, length), F32)
        visible = (UNBOUNDED, UNBOUNDED, 1, UNBOUNDED, 0)
        settings = (*prefix, *[None] * 8, *visible, length, dim**-0.5, 0.0)
        yield f"attention, {name}", partial(c.attention, query, key, value, *settings, *answers, wanted)


def norms(c: Any, wanted: str) -> Iterator[Case]:
    x, size, weight = noise(32, 4096), noise(4096), noise(128)
    yield "rms_norm", partial(c.rms_norm, x, size, 1e-6, 0.0, True, np.empty_like(x), wanted)
    query, key, angle = noise(1, 8, 32, 128), noise(1, 2, 32, 128), noise(1, 32, 64)
    given = (query, key, None, np.cos(angle), np.sin(angle), weight, weight, *[None] * 4, True, 1e-6, 0.0, True, 0)
    yield "qk_norm_rope", partial(c.qk_norm_rope, *given, np.empty_like(query), np.empty_like(key), wanted)


def heads(c: Any, wanted: str) -> Iterator[Case]:
    rows, vocab = 8, 8192
    logits, workspace = noise(rows, vocab), np.empty(c.head_workspace(rows, vocab, 1.0), np.uint8)
    given = (logits, 0, vocab, 1.0, 1.0, 0.0, None, workspace)
    yield "read_head_tile", partial(c.read_head_tile, *given, wanted)
    answers = np.empty((2, rows), I64), np.empty((5, rows), F32)
    hidden, weight = noise(rows, 64), noise(vocab, 64)
    settings = (None, 1.0, 1, np.arange(rows), 0, 1.0, 0.0, None, workspace)
    yield "sample_head", partial(c.sample_head, hidden, weight, *settings, *answers, wanted)
    embedded = (logits[None], 0.7, 0.0, None, noise(rows) + F32(9), np.empty((rows, vocab), F32))
    yield "weigh", partial(c.weigh, *embedded, wanted)


def decoders(c: Any, wanted: str) -> Iterator[Case]:
    rows, hidden, width, dim, ffn = 12, 192, 128, 64, 256
    x, logits = noise(rows, hidden), np.empty((rows, 1000), F32)
    yield "product", partial(c.product, x, noise(1000, hidden), None, logits, wanted)
    matrices = {
        "q": (width, hidden),
        "k": (width, hidden),
        "o": (hidden, width),
        "up": (ffn, hidden),
        "down": (hidden, ffn),
    }
    q, k, o, up, down = (noise(*shape) / F32(hidden**0.5) for shape in matrices.values())
    layer = [noise(hidden), q, k, k, None, None, None, noise(dim), noise(dim), o, noise(hidden), up, up, down]
    angle = noise(rows, dim // 2)
    settings = (1e-6, dim, np.cos(angle), np.sin(angle), None, None, None, None, True, None, None)
    visible = (UNBOUNDED, UNBOUNDED, 1, UNBOUNDED, 0)
    call = partial(c.decoder_layers, x[None].copy(), [layer], noise(hidden), *settings, *visible, wanted)
    # the call of attention inside ends the one count and begins the other
    yield "decoder_layers, before attention", call
    yield "decoder_layers, attention and what follows", lambda: None


def commits(c: Any, wanted: str) -> Iterator[Case]:
    del wanted  # there is one code for all
    score, tokens = noise(8, 256), np.zeros((8, 256), I64)
    for rule, name, bound in ((0, "quota", 16.0), (1, "threshold", 0.5), (2, "factor", 4.0), (3, "entropy_bound", 4.0)):
        answers = np.empty((8, 256), bool), np.empty((8, 256), I64)
        settings = (rule, None, bound, tokens, tokens + 1, 1000, None, 0, None, None, 0)
        yield f"commit_step, {name}", partial(c.commit_step, score > -1, score, *settings, *answers)


if __name__ == "__main__":
    module = load(sys.argv[1])
    cases = [
        case for make in (sampling, attention, norms, heads, decoders, commits) for case in make(module, sys.argv[2])
    ]
    cases.append(("the end", cases[-1][1]))  # counts end where the next call begins
    for _, call in cases:
        call()
    print("\n".join(name for name, _ in cases[:-1]))
