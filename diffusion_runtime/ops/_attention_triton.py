"""The Triton backend of ``attention``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from diffusion_runtime.ops._attention_problem import AttentionProblem


def load_triton() -> Callable[[AttentionProblem], tuple[Tensor, Tensor]]:
    from diffusion_runtime.kernels import attention as kernel

    def run(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
        out, logsumexp = problem.outputs()
        kernel.attention(problem.for_kernel(), out, logsumexp)
        return out, logsumexp

    return run


def refuses(problem: AttentionProblem) -> str | None:
    widest = max(problem.query.shape[3], problem.value.shape[3])
    return f"takes heads of up to 512, got {widest}" if widest > 512 else None
