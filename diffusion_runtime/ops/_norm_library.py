"""``rms_norm`` and ``qk_norm_rope`` as ``torch.library`` operators: compiled graphs and gradients go through them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusion_runtime.ops._qk_norm_rope_problem import QKNormRope, backward, run_qk_norm_rope
from diffusion_runtime.ops._rms_norm import Norm, rms_norm_backward, run_rms_norm

_NORM = "float eps, float weight_offset, bool round_before_weight"


def _rms_norm_operator(x: Tensor, weight: Tensor | None, *settings: Any) -> Tensor:
    *norm, backend = settings
    return run_rms_norm(x, weight, Norm(*norm), backend)


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *norm, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.norm = Norm(*norm)


def _rms_norm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    found = rms_norm_backward(grad, x, weight, ctx.norm, for_weight=ctx.needs_input_grad[1])
    return (*found, *[None] * 4)


torch.library.define("diffusion_runtime::rms_norm", f"(Tensor x, Tensor? weight, {_NORM}, str backend) -> Tensor")
torch.library.impl("diffusion_runtime::rms_norm", "CompositeExplicitAutograd", _rms_norm_operator)
torch.library.register_fake("diffusion_runtime::rms_norm", lambda x, *_: x.new_empty(x.shape))
torch.library.register_autograd("diffusion_runtime::rms_norm", _rms_norm_backward, setup_context=_keep_norm)


# the fields of QKNormRope, in their order; the caches are written by one of the operators only
_TENSORS = (
    "Tensor query, Tensor key, Tensor? value, Tensor cos, Tensor sin, Tensor? query_weight, Tensor? key_weight, "
    "Tensor? positions"
)
_REST = f"Tensor? cache_positions, bool normalized, {_NORM}, int style, str backend"


def _qk_norm_rope_operator(*arguments: Any) -> tuple[Tensor, Tensor]:
    *fields, backend = arguments
    query, key = run_qk_norm_rope(QKNormRope(*fields), backend)
    assert key is not None
    return query, key


def _into_cache_operator(*arguments: Any) -> Tensor:
    *fields, backend = arguments
    return run_qk_norm_rope(QKNormRope(*fields), backend)[0]


def _keep_problem(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    fields = inputs[:-1]
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in fields))
    ctx.rest = [None if isinstance(x, Tensor) else x for x in fields]


def _qk_norm_rope_backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
    problem = QKNormRope(*(x if x is not None else y for x, y in zip(ctx.saved_tensors, ctx.rest, strict=True)))
    place = {name: i for i, name in enumerate(QKNormRope._fields)}
    weights = ctx.needs_input_grad[place["query_weight"]], ctx.needs_input_grad[place["key_weight"]]
    found = backward(problem, grad_query, grad_key, weights)
    gradients: list[Tensor | None] = [None] * (len(place) + 1)
    for name, gradient in zip(("query", "key", "query_weight", "key_weight"), found, strict=True):
        gradients[place[name]] = gradient
    return tuple(gradients)


torch.library.define(
    "diffusion_runtime::qk_norm_rope",
    f"({_TENSORS}, Tensor? cache_key, Tensor? cache_value, {_REST}) -> (Tensor, Tensor)",
)
torch.library.impl("diffusion_runtime::qk_norm_rope", "CompositeExplicitAutograd", _qk_norm_rope_operator)
torch.library.register_fake("diffusion_runtime::qk_norm_rope", lambda *arguments: QKNormRope(*arguments[:-1]).outputs())
torch.library.register_autograd("diffusion_runtime::qk_norm_rope", _qk_norm_rope_backward, setup_context=_keep_problem)
torch.library.define(
    "diffusion_runtime::qk_norm_rope_into_cache",
    f"({_TENSORS}, Tensor(a!) cache_key, Tensor(b!) cache_value, {_REST}) -> Tensor",
)
torch.library.impl("diffusion_runtime::qk_norm_rope_into_cache", "CompositeExplicitAutograd", _into_cache_operator)
torch.library.register_fake(
    "diffusion_runtime::qk_norm_rope_into_cache", lambda *arguments: QKNormRope(*arguments[:-1]).outputs()[0]
)
