"""The formulas that make attention differentiable, once for ``torch.library`` and once for ``torch.func``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusion_runtime.ops._attention_autocast import outside_autocast
from diffusion_runtime.ops._attention_backward import attention_backward_reference
from diffusion_runtime.ops._attention_folding import fold, folded, row_axis, unfold
from diffusion_runtime.ops._attention_problem import AttentionProblem

_DIFFERENTIABLE = (0, 1, 2, 3, 4, 7)  # of the arguments, in the order of AttentionGradients
_MASK, _TABLE = 7, 6


def call_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The operator, in the form that torch accepts here: its transforms take no other than a Function."""
    transformed = torch._C._are_functorch_transforms_active()
    call: Callable[..., Any] = Attention.apply if transformed else torch.ops.diffusion_runtime.attention
    out, logsumexp = call(*arguments)
    return out, logsumexp


def _call_backward(*arguments: Any) -> Sequence[Tensor]:
    transformed = torch._C._are_functorch_transforms_active()
    operator = torch.ops.diffusion_runtime.attention_backward
    call: Callable[..., Any] = AttentionBackward.apply if transformed else operator
    gradients: Sequence[Tensor] = call(*arguments)
    return gradients


def _save(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor] = ()) -> None:
    ctx.set_materialize_grads(False)  # most calls use no logsumexp: None rather than zeros
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)), *output)
    ctx.rest = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]


def _saved(ctx: Any) -> tuple[list[Any], list[Tensor]]:
    """The inputs, and what else was saved."""
    tensors = list(ctx.saved_tensors)
    inputs = list(ctx.rest)
    for place, tensor in zip(ctx.places, tensors, strict=False):
        inputs[place] = tensor
    return inputs, tensors[len(ctx.places) :]


def attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep the inputs and both outputs."""
    if inputs[_TABLE] is not None and (ctx.needs_input_grad[3] or ctx.needs_input_grad[4]):
        raise ValueError("the pool of a PagedPrefix takes no gradients: detach it")
    _save(ctx, inputs, output)


def attention_backward(ctx: Any, grad_out: Tensor | None, grad_logsumexp: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of the operator's arguments."""
    inputs, (out, logsumexp) = _saved(ctx)
    mask = inputs[_MASK]
    mask_gradient = mask is not None and mask.dtype != torch.bool and ctx.needs_input_grad[_MASK]
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    found = _call_backward(out, logsumexp, grad_out, grad_logsumexp, mask_gradient, *inputs)
    gradients: list[Tensor | None] = [None] * len(inputs)
    for place, gradient in zip(_DIFFERENTIABLE, found, strict=True):
        if ctx.needs_input_grad[place]:
            gradients[place] = gradient
    if mask_gradient:
        gradients[_MASK] = found[5].to(mask.dtype)
    return tuple(gradients)


def attention_vmap(
    info: Any, in_dims: Sequence[int | None], *arguments: Any, call: Callable[..., Any] | None = None
) -> tuple[Any, Any]:
    """One call for all that ``torch.vmap`` maps; the operator itself where torch maps the operator."""
    axis = row_axis(arguments)
    call = torch.ops.diffusion_runtime.attention if call is None else call
    results = call(*folded(info.batch_size, in_dims, arguments))
    return tuple(unfold(info.batch_size, x, axis) for x in results), (axis, axis)


def backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    """Keep the inputs."""
    _save(ctx, inputs)


def backward_backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
    """Gradients of gradients: torch differentiates the reference, which keeps every score for it."""
    inputs, _ = _saved(ctx)
    given = gradients[0] if isinstance(gradients[0], list) else gradients  # a list from the operator
    places = [i for i in ctx.places if inputs[i].is_floating_point() and ctx.needs_input_grad[i]]
    present: list[int] = []

    def formula(*differentiable: Tensor) -> tuple[Tensor, ...]:
        values = list(inputs)
        for place, value in zip(places, differentiable, strict=True):
            values[place] = value
        problem = AttentionProblem.from_operator(tuple(values[5:-1]))
        found = outside_autocast(values[0].device, attention_backward_reference, problem, *values[:5])
        present[:] = [i for i, x in enumerate(found) if x is not None]
        return tuple(x for x in found if x is not None)

    results, pull = torch.func.vjp(formula, *(inputs[i] for i in places))[:2]
    cotangents = (given[i] for i in present)
    filled = tuple(
        torch.zeros_like(x) if g is None else g.to(x.dtype) for x, g in zip(results, cotangents, strict=True)
    )
    found: list[Tensor | None] = [None] * len(inputs)
    for place, gradient in zip(places, pull(filled), strict=True):
        found[place] = gradient
    return tuple(found)


def backward_vmap(
    info: Any, in_dims: Sequence[int | None], *arguments: Any, call: Callable[..., Any] | None = None
) -> tuple[Any, Any]:
    """As :func:`attention_vmap`."""
    size, problem = info.batch_size, arguments[5:]
    axis = row_axis(problem)
    results = [x if x is None else fold(size, dim, x, axis) for x, dim in zip(arguments[:4], in_dims, strict=False)]
    call = torch.ops.diffusion_runtime.attention_backward if call is None else call
    found = call(*results, arguments[4], *folded(size, in_dims[5:], problem))
    # one that is absent has one dimension
    axes = [None if x.ndim == 1 else axis if i < 3 else 0 for i, x in enumerate(found)]
    return tuple(x if a is None else unfold(size, x, a) for x, a in zip(found, axes, strict=True)), tuple(axes)


class Attention(torch.autograd.Function):
    """The operator for ``torch.func``."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        out, logsumexp = torch.ops.diffusion_runtime.attention(*arguments)
        return out, logsumexp

    setup_context = staticmethod(attention_setup)
    backward = staticmethod(attention_backward)
    vmap = staticmethod(partial(attention_vmap, call=call_attention))


class AttentionBackward(torch.autograd.Function):
    """The operator of its gradients for ``torch.func``."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(torch.ops.diffusion_runtime.attention_backward(*arguments))

    setup_context = staticmethod(backward_setup)
    backward = staticmethod(backward_backward)
    vmap = staticmethod(partial(backward_vmap, call=_call_backward))
