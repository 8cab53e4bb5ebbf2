"""The Triton backend of ``attention``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_runtime.ops._attention_backward import AttentionGradients
from diffusion_runtime.ops._attention_problem import AttentionProblem


def load_triton() -> Callable[[AttentionProblem], tuple[Tensor, Tensor]]:
    from diffusion_runtime.kernels import attention as kernel

    def run(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
        out, logsumexp = problem.outputs()
        kernel.attention(problem.for_kernel(), out, logsumexp)
        return out, logsumexp

    return run


def load_triton_backward() -> Callable[..., AttentionGradients]:
    from diffusion_runtime.kernels.attention_key_gradient import key_gradient
    from diffusion_runtime.kernels.attention_query_gradient import query_gradient

    def run(
        problem: AttentionProblem,
        out: Tensor,
        logsumexp: Tensor,
        grad_out: Tensor,
        grad_logsumexp: Tensor | None,
        mask_gradient: bool,
    ) -> AttentionGradients:
        kernel = problem.for_kernel()
        out, grad_out = (x if x.stride(3) == 1 else x.contiguous() for x in (out, grad_out))
        logsumexp = logsumexp.contiguous()
        grad_logsumexp = None if grad_logsumexp is None else grad_logsumexp.contiguous()
        # where a sequence has no row or key, nothing is written
        grad_query = torch.zeros_like(kernel.query if kernel.query.stride(3) == 1 else kernel.query.contiguous())
        grad_key, grad_value = (x.new_zeros(x.shape) for x in (problem.key, problem.value))
        prefix = (problem.prefix_key, problem.prefix_value) if problem.page_table is None else (None, None)
        grad_prefix_key, grad_prefix_value = (None if x is None else x.new_zeros(x.shape) for x in prefix)
        mask = problem.dense_mask if mask_gradient else None
        grad_mask = None if mask is None else logsumexp.new_zeros(mask.shape)
        delta = torch.empty_like(logsumexp)
        query_gradient(kernel, out, logsumexp, grad_out, grad_logsumexp, delta, grad_query, grad_mask)
        key_gradient(kernel, logsumexp, grad_out, delta, grad_key, grad_value, grad_prefix_key, grad_prefix_value)
        if problem.query.stride(3) != 1:
            grad_query = torch.empty_like(problem.query).copy_(grad_query)
        return AttentionGradients(grad_query, grad_key, grad_value, grad_prefix_key, grad_prefix_value, grad_mask)

    return run


def refuses(problem: AttentionProblem) -> str | None:
    widest = max(problem.query.shape[3], problem.value.shape[3])
    return f"takes heads of up to 512, got {widest}" if widest > 512 else None


def refuses_gradients(problem: AttentionProblem) -> str | None:
    widest = max(problem.query.shape[3], problem.value.shape[3])
    if problem.query.dtype == torch.float32 and widest > 128:
        return f"takes heads of up to 128 in float32, got {widest}"
    return refuses(problem)
