"""``attention`` as a ``torch.library`` operator: compiled graphs, exports and gradients go through it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffusion_runtime.ops import _attention_derivatives as derivatives
from diffusion_runtime.ops._attention_autocast import outside_autocast
from diffusion_runtime.ops._attention_backends import run_backend, run_backward
from diffusion_runtime.ops._attention_problem import AttentionProblem
from diffusion_runtime.ops._attention_reference import attention_reference
from diffusion_runtime.ops._registry import BackendUnavailableError
from diffusion_runtime.ops._torch_is_watching import torch_is_watching


def run_attention(problem: AttentionProblem, backend: str | None) -> tuple[Tensor, Tensor]:
    """Directly, or through the operator where torch must know what was done."""
    if _torch_takes_it_apart():
        if backend not in (None, "auto", "reference"):
            raise BackendUnavailableError(
                f"attention: backend {backend!r} cannot run this call:\n"
                "  forward-mode derivatives and compiled torch.func transforms are of the reference only"
            )
        return outside_autocast(problem.query.device, attention_reference, problem)
    if torch_is_watching(
        problem.query, problem.key, problem.value, problem.prefix_key, problem.prefix_value, problem.dense_mask
    ):
        return derivatives.call_attention(*problem.to_operator(), backend or "auto")
    return run_backend(problem, backend)


def _torch_takes_it_apart() -> bool:
    """Whether torch has no formula for the operator here, but one for each line of the reference."""
    if forward_ad._current_level >= 0:  # dual numbers
        return True
    return torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


# the fields of AttentionProblem, in the order of its to_operator
_PROBLEM = (
    "Tensor query, Tensor key, Tensor value, Tensor? prefix_key, Tensor? prefix_value, Tensor? prefix_lengths, "
    "Tensor? page_table, Tensor? dense_mask, Tensor? key_starts, Tensor? key_ends, Tensor? cu_seqlens, "
    "Tensor? cu_seqlens_k, Tensor? chosen, int left, int right, int block, int prefix_window, int offset, "
    "SymInt max_length, float scale, float softcap, str backend"
)


def _attention_operator(*arguments: Any) -> tuple[Tensor, Tensor]:
    *values, backend = arguments
    problem = AttentionProblem.from_operator(tuple(values))
    return run_backend(problem, backend)


def _attention_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    return AttentionProblem.from_operator(arguments[:-1]).outputs()


def _backward_operator(
    out: Tensor, logsumexp: Tensor, grad_out: Tensor, grad_logsumexp: Tensor | None, mask_gradient: bool, *rest: Any
) -> list[Tensor]:
    *values, backend = rest
    problem = AttentionProblem.from_operator(tuple(values))
    found = run_backward(problem, backend, out, logsumexp, grad_out, grad_logsumexp, mask_gradient)
    return [out.new_empty(0) if x is None else x for x in found]


def _backward_fake(
    out: Tensor, logsumexp: Tensor, grad_out: Tensor, grad_logsumexp: Tensor | None, mask_gradient: bool, *rest: Any
) -> list[Tensor]:
    problem = AttentionProblem.from_operator(rest[:-1])
    dense = problem.prefix_key is not None and problem.page_table is None
    like = [problem.query, problem.key, problem.value]
    like += [x if dense and x is not None else out.new_empty(0) for x in (problem.prefix_key, problem.prefix_value)]
    mask = problem.dense_mask if mask_gradient else None
    # a gradient is laid out densely in the order of its input's strides for the query, contiguously otherwise
    found = [torch.empty_like(like[0]), *(x.new_empty(x.shape) for x in like[1:])]
    return [*found, out.new_empty(0) if mask is None else logsumexp.new_empty(mask.shape)]


torch.library.define("diffusion_runtime::attention", f"({_PROBLEM}) -> (Tensor, Tensor)")
torch.library.impl("diffusion_runtime::attention", "CompositeExplicitAutograd", _attention_operator)
torch.library.register_fake("diffusion_runtime::attention", _attention_fake)
torch.library.define(
    "diffusion_runtime::attention_backward",
    f"(Tensor out, Tensor logsumexp, Tensor grad_out, Tensor? grad_logsumexp, bool mask_gradient, {_PROBLEM}) "
    "-> Tensor[]",
)
torch.library.impl("diffusion_runtime::attention_backward", "CompositeExplicitAutograd", _backward_operator)
torch.library.register_fake("diffusion_runtime::attention_backward", _backward_fake)
torch.library.register_autograd(
    "diffusion_runtime::attention", derivatives.attention_backward, setup_context=derivatives.attention_setup
)
torch.library.register_autograd(
    "diffusion_runtime::attention_backward", derivatives.backward_backward, setup_context=derivatives.backward_setup
)
torch.library.register_vmap("diffusion_runtime::attention", derivatives.attention_vmap)
torch.library.register_vmap("diffusion_runtime::attention_backward", derivatives.backward_vmap)
