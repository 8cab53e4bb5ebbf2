"""How attention and its gradients can run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffusion_runtime.ops._attention_autocast import outside_autocast
from diffusion_runtime.ops._attention_backward import AttentionGradients, attention_backward_reference
from diffusion_runtime.ops._attention_derivatives import call_attention
from diffusion_runtime.ops._attention_problem import AttentionProblem
from diffusion_runtime.ops._attention_reference import attention_reference
from diffusion_runtime.ops._registry import BackendUnavailableError, OpSpec

Run = Callable[[AttentionProblem], tuple[Tensor, Tensor]]  # out, logsumexp, laid out as outputs() has them


def run_attention(problem: AttentionProblem, backend: str | None) -> tuple[Tensor, Tensor]:
    """Directly, or through the operator of ``_attention_library.py`` where torch must know what was done."""
    if _torch_takes_it_apart():
        if backend not in (None, "auto", "reference"):
            raise BackendUnavailableError(
                f"attention: backend {backend!r} cannot run this call:\n"
                "  forward-mode derivatives and compiled torch.func transforms are of the reference only"
            )
        return outside_autocast(problem.query.device, attention_reference, problem)
    if _torch_is_watching(problem):
        return call_attention(*problem.to_operator(), backend or "auto")
    return run_backend(problem, backend)


def run_backend(problem: AttentionProblem, backend: str | None) -> tuple[Tensor, Tensor]:
    query = problem.query
    run: Run = SPEC.resolve_call(query.device.type, query.dtype, backend, problem)
    return outside_autocast(query.device, run, problem)


def run_backward(problem: AttentionProblem, backend: str | None, *tensors: Any) -> AttentionGradients:
    """The arguments of :func:`attention_backward_reference`, through the backend that ran the forward if it can."""
    query = problem.query
    usable = backend if backend in (None, "auto", *(i.backend for i in SPEC_BACKWARD.implementations)) else "reference"
    run = SPEC_BACKWARD.resolve_call(query.device.type, query.dtype, usable, problem)
    gradients: AttentionGradients = outside_autocast(query.device, run, problem, *tensors)
    return gradients


def _torch_takes_it_apart() -> bool:
    """Whether torch has no formula for the operator here, but one for each line of the reference."""
    if forward_ad._current_level >= 0:  # dual numbers
        return True
    return torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _torch_is_watching(problem: AttentionProblem) -> bool:
    """Whether a graph is traced, a transform is active, or gradients are wanted: eager calls need no operator."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    floats = (problem.query, problem.key, problem.value, problem.prefix_key, problem.prefix_value, problem.dense_mask)
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in floats)
    return wanted or type(problem.query) is not Tensor


SPEC = OpSpec(name="attention", reference=attention_reference, validate=lambda *_: None)
SPEC_BACKWARD = OpSpec(name="attention_backward", reference=attention_backward_reference, validate=lambda *_: None)
