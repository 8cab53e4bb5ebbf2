"""How attention and its gradients can run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from diffusion_runtime.ops import _attention_cuda, _attention_triton
from diffusion_runtime.ops._attention_autocast import outside_autocast
from diffusion_runtime.ops._attention_backward import AttentionGradients, attention_backward_reference
from diffusion_runtime.ops._attention_cpp import load_cpp
from diffusion_runtime.ops._attention_problem import AttentionProblem
from diffusion_runtime.ops._attention_reference import attention_reference
from diffusion_runtime.ops._registry import Implementation, OpSpec, triton_devices
from diffusion_runtime.ops._sample_tokens import FLOATS

Run = Callable[[AttentionProblem], tuple[Tensor, Tensor]]  # out, logsumexp, laid out as outputs() has them


def run_backend(problem: AttentionProblem, backend: str | None) -> tuple[Tensor, Tensor]:
    """``out`` and ``logsumexp`` of a named backend, or of the first that can run this call."""
    query = problem.query
    run: Run = SPEC.resolve_call(query.device.type, query.dtype, backend, problem)
    return outside_autocast(query.device, run, problem)


def run_backward(problem: AttentionProblem, backend: str | None, *tensors: Any) -> AttentionGradients:
    """The arguments of :func:`attention_backward_reference`, on a GPU through a kernel if one takes the call."""
    query = problem.query
    kernel = backend == "triton" or (backend != "reference" and query.device.type != "cpu")
    usable = "auto" if kernel else "reference"
    run = SPEC_BACKWARD.resolve_call(query.device.type, query.dtype, usable, problem)
    gradients: AttentionGradients = outside_autocast(query.device, run, problem, *tensors)
    return gradients


SPEC = OpSpec(
    name="attention",
    reference=attention_reference,
    validate=lambda *_: None,
    implementations=(
        Implementation("cuda", frozenset({"cuda"}), FLOATS, _attention_cuda.load_cuda, _attention_cuda.refuses),
        Implementation("cpp", frozenset({"cpu"}), FLOATS, load_cpp),
        Implementation("triton", triton_devices(), FLOATS, _attention_triton.load_triton, _attention_triton.refuses),
    ),
)
SPEC_BACKWARD = OpSpec(
    name="attention_backward",
    reference=attention_backward_reference,
    validate=lambda *_: None,
    implementations=(
        Implementation(
            "triton",
            triton_devices(),
            FLOATS,
            _attention_triton.load_triton_backward,
            _attention_triton.refuses_gradients,
        ),
    ),
)
