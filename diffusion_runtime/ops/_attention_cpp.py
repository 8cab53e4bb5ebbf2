"""The C++ backend of ``attention``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from diffusion_runtime.ops._attention_problem import AttentionProblem
from diffusion_runtime.ops._instruction_set import instruction_set


def load_cpp() -> Callable[[AttentionProblem], tuple[Tensor, Tensor]]:
    wanted = instruction_set()
    return lambda problem: run_cpp(problem, wanted)


def run_cpp(problem: AttentionProblem, instruction_set: str) -> tuple[Tensor, Tensor]:
    from diffusion_runtime import _C

    found = problem.outputs()
    arguments = [*problem.for_kernel().to_operator(), *found, instruction_set]
    _C.attention(*arguments)
    return found
