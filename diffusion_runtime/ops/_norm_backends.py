"""The kernels of ``rms_norm`` and ``qk_norm_rope``: what happens around them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffusion_runtime.ops._instruction_set import instruction_set

if TYPE_CHECKING:
    from diffusion_runtime.ops._qk_norm_rope_problem import QKNormRope
    from diffusion_runtime.ops._qk_norm_rope_problem import Run as RunQKNormRope
    from diffusion_runtime.ops._rms_norm import Norm
    from diffusion_runtime.ops._rms_norm import Run as RunRmsNorm


def rows_of(x: Tensor) -> Tensor:
    """``[..., size]`` with at most three leading dimensions and stride 1 along the last: itself wherever it is that."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    return x.reshape(-1, *x.shape[-3:]) if x.ndim > 4 else x


def weight_of(weight: Tensor | None, beside: Tensor) -> Tensor | None:
    """Contiguous, and of the dtype of ``beside`` or float32, which are what kernels read."""
    if weight is None:
        return None
    kept = weight.dtype in (beside.dtype, torch.float32)
    return (weight if kept else weight.float()).contiguous()


def load_rms_norm_cpp() -> RunRmsNorm:
    wanted = instruction_set()
    return lambda x, weight, norm: run_rms_norm_cpp(x, weight, norm, wanted)


def run_rms_norm_cpp(x: Tensor, weight: Tensor | None, norm: Norm, instruction_set: str) -> Tensor:
    from diffusion_runtime import _C

    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _C.rms_norm(rows_of(x), weight_of(weight, x), *norm, out, instruction_set)
    return out


def load_rms_norm_triton() -> RunRmsNorm:
    from diffusion_runtime.kernels.rms_norm import rms_norm

    def run(x: Tensor, weight: Tensor | None, norm: Norm) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        rms_norm(rows_of(x), weight_of(weight, x), *norm, out)
        return out

    return run


def load_rms_norm_cuda() -> RunRmsNorm:
    from diffusion_runtime import _C_cuda

    def run(x: Tensor, weight: Tensor | None, norm: Norm) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        with torch.cuda.device(x.device):
            stream = torch.cuda.current_stream().cuda_stream
            _C_cuda.rms_norm(rows_of(x), weight_of(weight, x), *norm, out, stream)
        return out

    return run


def load_qk_norm_rope_cpp() -> RunQKNormRope:
    wanted = instruction_set()
    return lambda problem: run_qk_norm_rope_cpp(problem, wanted)


def run_qk_norm_rope_cpp(problem: QKNormRope, instruction_set: str) -> tuple[Tensor, Tensor | None]:
    from diffusion_runtime import _C

    problem = problem.for_kernels()
    query, key = problem.outputs()
    _C.qk_norm_rope(*problem, query, key, instruction_set)
    return query, key


def load_qk_norm_rope_triton() -> RunQKNormRope:
    from diffusion_runtime.kernels.qk_norm_rope import qk_norm_rope

    def run(problem: QKNormRope) -> tuple[Tensor, Tensor | None]:
        problem.check_places()
        problem = problem.for_kernels()
        query, key = problem.outputs()
        qk_norm_rope(*problem, query, key)
        return query, key

    return run


def load_qk_norm_rope_cuda() -> RunQKNormRope:
    from diffusion_runtime import _C_cuda

    def run(problem: QKNormRope) -> tuple[Tensor, Tensor | None]:
        problem = problem.for_kernels()
        query, key = problem.outputs()
        with torch.cuda.device(query.device):
            _C_cuda.qk_norm_rope(*problem, query, key, torch.cuda.current_stream().cuda_stream)
        return query, key

    return run
