"""How a commit can run. ``select_commits``, ``commit_step`` and ``renoise`` are one op, ``commit_step``, in parts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_runtime.ops._commit_reference import Problem, commit_reference, results
from diffusion_runtime.ops._registry import Implementation, OpSpec, triton_devices

Run = Callable[[Problem], tuple[Tensor, Tensor]]  # commit_mask, tokens, as results() says


def run(problem: Problem, backend: str | None) -> tuple[Tensor, Tensor]:
    """Through the operator of ``_library.py`` under ``torch.compile``, otherwise directly."""
    if torch.compiler.is_compiling():
        commit_mask, tokens = torch.ops.diffusion_runtime.commit_step(*problem.to_operator(), backend or "auto")
        return commit_mask, tokens
    return resolve(problem, backend)(problem)


def resolve(problem: Problem, backend: str | None) -> Run:
    dtype = torch.float32 if problem.score is None else problem.score.dtype
    chosen: Run = SPEC.resolve(problem.masked.device.type, dtype, backend)
    return chosen


def _load_cpp() -> Run:
    from diffusion_runtime import _C

    def run(problem: Problem) -> tuple[Tensor, Tensor]:
        found = results(problem)
        arguments = [*problem.to_operator(), *found]
        _C.commit_step(*arguments)
        return found

    return run


def _load_triton() -> Run:
    from diffusion_runtime.kernels import commit as kernel

    def run(problem: Problem) -> tuple[Tensor, Tensor]:
        found = results(problem)
        if problem.masked.numel():
            kernel.commit_step(*problem, *found)
        return found

    return run


def _load_cuda() -> Run:
    from diffusion_runtime import _C_cuda

    def run(problem: Problem) -> tuple[Tensor, Tensor]:
        found = results(problem)
        with torch.cuda.device(problem.masked.device):
            arguments = [*problem.to_operator(), *found, torch.cuda.current_stream().cuda_stream]
            _C_cuda.commit_step(*arguments)
        return found

    return run


_FLOAT = frozenset({torch.float32})
SPEC = OpSpec(
    name="commit_step",
    reference=commit_reference,
    validate=lambda *_: None,
    implementations=(
        Implementation("cuda", frozenset({"cuda"}), _FLOAT, _load_cuda),
        Implementation("cpp", frozenset({"cpu"}), _FLOAT, _load_cpp),
        Implementation("triton", triton_devices(), _FLOAT, _load_triton),
    ),
)
