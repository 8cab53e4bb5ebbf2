"""How attention and its gradients can run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusion_runtime.ops._attention_backward import AttentionGradients, attention_backward_reference
from diffusion_runtime.ops._attention_cpp import load_cpp
from diffusion_runtime.ops._attention_problem import AttentionProblem
from diffusion_runtime.ops._attention_reference import attention_reference
from diffusion_runtime.ops._registry import Implementation, OpSpec
from diffusion_runtime.ops._sample_tokens import FLOATS

Run = Callable[[AttentionProblem], tuple[Tensor, Tensor]]  # out, logsumexp, laid out as outputs() has them


def run_attention(problem: AttentionProblem, backend: str | None) -> tuple[Tensor, Tensor]:
    """Directly, or through the operator of ``_attention_library.py`` where torch must know what was done."""
    if _torch_is_watching(problem):
        arguments = (*problem.to_operator(), backend or "auto")
        out, logsumexp = torch.ops.diffusion_runtime.attention(*arguments)
        return out, logsumexp
    return resolve(problem, backend)(problem)


def resolve(problem: AttentionProblem, backend: str | None) -> Run:
    query = problem.query
    run: Run = SPEC.resolve_call(query.device.type, query.dtype, backend, problem)
    return run


def run_backward(problem: AttentionProblem, backend: str | None, *tensors: Any) -> AttentionGradients:
    """The arguments of :func:`attention_backward_reference`, through the backend that ran the forward if it can."""
    query = problem.query
    usable = backend if backend in (None, "auto", *(i.backend for i in SPEC_BACKWARD.implementations)) else "reference"
    run = SPEC_BACKWARD.resolve_call(query.device.type, query.dtype, usable, problem)
    gradients: AttentionGradients = run(problem, *tensors)
    return gradients


def _torch_is_watching(problem: AttentionProblem) -> bool:
    """Whether a graph is traced, a transform is active, or gradients are wanted: eager calls need no operator."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    floats = (problem.query, problem.key, problem.value, problem.prefix_key, problem.prefix_value, problem.dense_mask)
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in floats)
    return wanted or type(problem.query) is not Tensor


SPEC = OpSpec(
    name="attention",
    reference=attention_reference,
    validate=lambda *_: None,
    implementations=(Implementation("cpp", frozenset({"cpu"}), FLOATS, load_cpp),),
)
SPEC_BACKWARD = OpSpec(name="attention_backward", reference=attention_backward_reference, validate=lambda *_: None)
