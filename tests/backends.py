"""The ways to run an op that a test goes through, and when two of them may draw different tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch

from diffusion_runtime import ops
from diffusion_runtime.ops import _attention_cpp, _decoder_layers, _head_cpp, _norm_backends, _products, _sample_tokens

KERNELS = ["cpp-avx512", "cpp-avx2", "cpp-portable", "triton", pytest.param("cuda", marks=pytest.mark.gpu)]
ALL = ["reference", *KERNELS]


def device_of(backend: str) -> torch.device:
    """Where a backend's inputs must be: on a GPU, Triton is compiled rather than interpreted."""
    on_gpu = backend == "cuda" or (backend == "triton" and torch.cuda.is_available())
    return torch.device("cuda" if on_gpu else "cpu")


@contextmanager
def instruction_set(wanted: str) -> Iterator[None]:
    """Every C++ kernel runs with this one; with the default one if the name is empty."""
    usable = pytest.importorskip("diffusion_runtime._C").instruction_sets()
    if wanted and wanted not in usable:
        pytest.skip(f"this CPU has {', '.join(usable)}")
    with ExitStack() as patches:
        runs = [
            (module, "run_cpp") for module in (_attention_cpp, _decoder_layers, _head_cpp, _products, _sample_tokens)
        ]
        norms = [(_norm_backends, name) for name in ("run_rms_norm_cpp", "run_qk_norm_rope_cpp")]
        for module, name in (*runs, *norms, (_head_cpp, "weigh_cpp"), (_head_cpp, "run_with_embedding_cpp")):
            run = getattr(module, name)
            patches.enter_context(
                patch.object(module, name, lambda *rest, run=run: run(*rest[:-1], wanted or rest[-1]))
            )
        yield


def run_op(op: str, *tensors: Any, backend: str, **settings: Any) -> Any:
    """An op on the device of a backend; skips where the backend is not available. Results come back to the CPU."""
    name, _, wanted = backend.partition("-")
    device = device_of(backend)
    if name not in ops.available_backends(op, device.type, tensors[0].dtype):
        pytest.skip(ops.explain(op, device.type, tensors[0].dtype).replace("\n", "; "))
    moved = [x.to(device) if isinstance(x, torch.Tensor) else x for x in tensors]
    settings = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in settings.items()}
    with instruction_set(wanted) if name == "cpp" else nullcontext():
        result = getattr(ops, op)(*moved, backend=name, **settings)
    return _on_cpu(result)


def _on_cpu(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return result.cpu()
    found = [_on_cpu(x) for x in result]
    return ops.TokenSamples(*found) if isinstance(result, ops.TokenSamples) else tuple(found)


def sample_tokens(logits: torch.Tensor, *, backend: str, **settings: Any) -> ops.TokenSamples:
    return run_op("sample_tokens", logits, backend=backend, **settings)


def sample_from_hidden(hidden: torch.Tensor, weight: torch.Tensor, *, backend: str, **settings: Any):
    return run_op("sample_from_hidden", hidden, weight, backend=backend, **settings)


def is_rounding_boundary(logits: torch.Tensor, temperature: float, uniforms: tuple[float, float], tokens: set[int]):
    """Whether rounding can send this draw to each of ``tokens``: their intervals all touch the uniforms."""
    weight = (logits.double() / temperature).softmax(-1)
    tiles = torch.nn.functional.pad(weight, (0, -len(weight) % 128)).unflatten(0, (-1, 128))
    masses = tiles.sum(1)
    for token in tokens:
        tile, lane = divmod(token, 128)
        for mass, at, uniform in ((masses, tile, uniforms[0]), (tiles[tile], lane, uniforms[1])):
            end = mass.cumsum(0)[at] / mass.sum()
            begin = end - mass[at] / mass.sum()
            if not begin - 1e-5 <= uniform <= end + 1e-5:
                return False
    return True


def assert_same_tokens(got: torch.Tensor, expected: torch.Tensor, logits: torch.Tensor, temperature: float, seed: int):
    """Equal, except where the two backends' roundings of a mass straddle the uniform; returns how many do."""
    rows = logits.reshape(-1, logits.shape[-1])
    differ = (got.flatten() != expected.flatten()).nonzero()[:, 0].tolist()
    for r in differ:
        u = ops.philox_uniforms(seed, r % logits.shape[-2], 0, ops.DRAW_TOKEN)
        tokens = {int(got.flatten()[r]), int(expected.flatten()[r])}
        assert is_rounding_boundary(rows[r], temperature, (float(u[0]), float(u[1])), tokens), f"row {r}: {tokens}"
    assert len(differ) <= 2 + len(rows) // 1000
    return len(differ)
