"""Root mean square normalisation over the last dimension (Zhang and Sennrich, 2019, equation 4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_runtime.ops import _norm_backends
from diffusion_runtime.ops._registry import Implementation, OpSpec, triton_devices
from diffusion_runtime.ops._sample_tokens import FLOATS
from diffusion_runtime.ops._torch_is_watching import torch_is_watching


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``x / sqrt(mean(x ** 2) + eps) * (weight_offset + weight)`` over the last dimension.

    Computed in float32 (float64 for float64 ``x``, reference only) whatever the dtypes are. How models use it:

    ============================================  ===================  =======================
    model                                         ``weight_offset``    ``round_before_weight``
    ============================================  ===================  =======================
    ``torch.nn.RMSNorm``, Gemma 4                 0                    False
    Llama, OLMo, LLaDA, Qwen3, Dream, SDAR        0                    True
    Gemma 1 to 3                                  1                    False
    DiffusionGemma's norms without a scale        no ``weight``
    ============================================  ===================  =======================

    A row's result depends on that row alone, to the bit. Differentiable in ``x`` and ``weight``, twice as well.

    Args:
        x: ``[..., size]`` floating point. Rows may have any strides: up to three leading dimensions are never copied if
            the last dimension is contiguous.
        weight: ``[size]`` of any floating dtype, as torch's ``rms_norm`` takes it, or None for 1.
        eps: added to the mean of squares; finite and at least 0. At 0 a row of zeros gives NaN, as in torch.
        weight_offset: added to the weight, in float32.
        round_before_weight: round to the dtype of ``x`` before the weight multiplies, and again after; otherwise once,
            at the end. It makes no difference in float32.
        backend: ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``; None picks the fastest that can run.

    Returns:
        the shape and dtype of ``x``, contiguous. Where a sum of squares overflows float32 the row is 0, as in torch.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; ``weight_offset`` or
            ``round_before_weight`` without a weight, which would do nothing.
        BackendUnavailableError: a named backend that cannot run this call.
    """
    _validate(x, weight)
    norm = read_norm(eps, weight_offset, round_before_weight, has_weight=weight is not None)
    if torch_is_watching(x, weight):
        result: Tensor = torch.ops.diffusion_runtime.rms_norm(x, weight, *norm, backend or "auto")
        return result
    return run_rms_norm(x, weight, norm, backend)


class Norm(NamedTuple):
    """How a row is normalised, as backends take it."""

    eps: float
    weight_offset: float
    round_before_weight: bool


Run = Callable[[Tensor, Tensor | None, Norm], Tensor]


def read_norm(eps: float, weight_offset: float, round_before_weight: bool, *, has_weight: bool) -> Norm:
    """The checked arguments that say how to normalise."""
    for name, value in (("eps", eps), ("weight_offset", weight_offset)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a float, got {type(value).__name__}")
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    if eps < 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    if not has_weight and (weight_offset != 0 or round_before_weight):
        raise ValueError(
            "weight_offset and round_before_weight say how a weight is applied, and there is none: "
            f"got {weight_offset} and {round_before_weight}"
        )
    return Norm(float(eps), float(weight_offset), bool(round_before_weight))


def run_rms_norm(x: Tensor, weight: Tensor | None, norm: Norm, backend: str | None) -> Tensor:
    run: Run = SPEC.resolve(x.device.type, x.dtype, backend)
    return run(x, weight, norm)


def rms_norm_reference(x: Tensor, weight: Tensor | None, norm: Norm) -> Tensor:
    return weighted(x, weight, norm)[0].to(x.dtype)


def weighted(x: Tensor, weight: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """In float32 or float64: the result before it is rounded, what the weight multiplied, and 1 / root mean square."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()  # torch sums by strides
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    unit = wide * inverse
    if norm.round_before_weight:
        unit = unit.to(x.dtype).to(wide.dtype)
    return (unit if weight is None else unit * (weight.to(wide.dtype) + norm.weight_offset)), unit, inverse


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, norm: Norm, *, for_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``x`` and of the weight, for every backend; a rounding has the derivative 1.

    Args:
        grad: ``[..., size]`` of the result; float32 or float64, where it was not rounded, or the dtype of ``x``.
        x, weight, norm: of the forward.
        for_weight: whether that of the weight is wanted; otherwise it is None.
    """
    _, unit, inverse = weighted(x, weight, norm)
    grad = grad.to(unit.dtype)
    grad_unit = grad if weight is None else grad * (weight.to(unit.dtype) + norm.weight_offset)
    exact = x.to(unit.dtype) * inverse
    grad_x = inverse * (grad_unit - exact * (grad_unit * exact).mean(-1, keepdim=True))
    grad_weight = (grad * unit).flatten(0, -2).sum(0) if for_weight and weight is not None else None
    return grad_x.to(x.dtype), None if grad_weight is None or weight is None else grad_weight.to(weight.dtype)


def _validate(x: Tensor, weight: Tensor | None) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.ndim == 0:
        raise ValueError("x must be [..., size], got a tensor without dimensions")
    if weight is not None:
        check_weight("weight", weight, x)


def check_weight(name: str, weight: Tensor, beside: Tensor) -> None:
    """A weight for the last dimension of a tensor, of any floating dtype."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {getattr(weight, 'dtype', type(weight))}")
    if weight.shape != beside.shape[-1:] or weight.device != beside.device:
        raise ValueError(
            f"{name} must be {tuple(beside.shape[-1:])} on {beside.device}, "
            f"got {tuple(weight.shape)} on {weight.device}"
        )


SPEC = OpSpec(
    name="rms_norm",
    reference=rms_norm_reference,
    validate=_validate,
    implementations=(
        Implementation("cuda", frozenset({"cuda"}), FLOATS, _norm_backends.load_rms_norm_cuda),
        Implementation("cpp", frozenset({"cpu"}), FLOATS, _norm_backends.load_rms_norm_cpp),
        Implementation("triton", triton_devices(), FLOATS, _norm_backends.load_rms_norm_triton),
    ),
)
