"""``attention`` as a ``torch.library`` operator: compiled graphs, exports and gradients go through it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusion_runtime.ops._attention_backends import resolve, run_backward
from diffusion_runtime.ops._attention_problem import AttentionProblem

# the fields of AttentionProblem, in the order of its to_operator
_PROBLEM = (
    "Tensor query, Tensor key, Tensor value, Tensor? prefix_key, Tensor? prefix_value, Tensor? prefix_lengths, "
    "Tensor? page_table, Tensor? dense_mask, Tensor? key_starts, Tensor? key_ends, Tensor? cu_seqlens, "
    "Tensor? cu_seqlens_k, Tensor? chosen, int left, int right, int block, int prefix_window, int offset, "
    "SymInt max_length, float scale, float softcap, str backend"
)
_DIFFERENTIABLE = (0, 1, 2, 3, 4, 7)  # of the arguments, in the order of AttentionGradients


def _attention_operator(*arguments: Any) -> tuple[Tensor, Tensor]:
    *values, backend = arguments
    problem = AttentionProblem.from_operator(tuple(values))
    out, logsumexp = resolve(problem, backend)(problem)
    return out, logsumexp


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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    if inputs[6] is not None and (ctx.needs_input_grad[3] or ctx.needs_input_grad[4]):
        raise ValueError("the pool of a PagedPrefix takes no gradients: detach it")
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors, *output)
    ctx.rest = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]


def _backward(ctx: Any, grad_out: Tensor | None, grad_logsumexp: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, out, logsumexp = ctx.saved_tensors
    inputs = list(ctx.rest)
    for place, tensor in zip(ctx.places, tensors, strict=True):
        inputs[place] = tensor
    mask = inputs[7]
    mask_gradient = mask is not None and mask.dtype != torch.bool and ctx.needs_input_grad[7]
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    found = torch.ops.diffusion_runtime.attention_backward(
        out, logsumexp, grad_out, grad_logsumexp, mask_gradient, *inputs
    )
    gradients: list[Tensor | None] = [None] * len(inputs)
    for place, gradient in zip(_DIFFERENTIABLE, found, strict=True):
        if ctx.needs_input_grad[place]:
            gradients[place] = gradient
    if mask_gradient:
        gradients[7] = found[5].to(mask.dtype)
    return tuple(gradients)


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
torch.library.register_autograd("diffusion_runtime::attention", _backward, setup_context=_setup_context)
