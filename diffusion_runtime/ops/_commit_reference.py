"""The definition of a commit in plain torch: which positions, and the tokens after it. Nothing here synchronises."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_runtime.ops._philox import DRAW_NOISE, philox_uniforms
from diffusion_runtime.ops._rows import Setting

RULES = ("quota", "threshold", "factor", "entropy_bound")


class Problem(NamedTuple):
    """The arguments as backends take them.

    Tensors of positions have stride 1 along the length and any along the batch; settings are numbers, or views with any
    strides, 0 included.
    """

    masked: Tensor  # [batch, length] bool
    score: Tensor | None  # [batch, length] float32 or float64; None: nothing is committed
    rule: int = 0  # index into RULES
    bound: Setting = 0  # [batch]: int64 for a quota, float32 otherwise
    tokens: Tensor | None = None  # [batch, length] int64; None: only the mask is asked for
    candidates: Tensor | None = None  # [batch, length] int64
    vocab: int = 0  # 0: positions that are not committed keep their token
    seed: Setting = 0  # [batch, length] int64
    position: Tensor | None = None  # [batch, length] int64; None: the index along the length
    step: Setting = 0  # [batch, length] int64

    def to_operator(self) -> list[Any]:
        """As the operator of ``_library.py`` takes it: a setting is a tensor or None, then a number."""
        arguments: list[Any] = []
        for name, value in zip(self._fields, self, strict=True):
            if name in _TENSOR_OR_NUMBER:
                arguments += [value, 0] if isinstance(value, Tensor) else [None, value]
            else:
                arguments.append(value)
        return arguments

    @staticmethod
    def from_operator(arguments: tuple[Any, ...]) -> Problem:
        """The inverse of :meth:`to_operator`."""
        values = iter(arguments)
        fields: dict[str, Any] = {}
        for name in Problem._fields:
            fields[name] = next(values)
            if name in _TENSOR_OR_NUMBER:
                number = next(values)
                fields[name] = number if fields[name] is None else fields[name]
        return Problem(**fields)


_TENSOR_OR_NUMBER = ("bound", "seed", "step")


def results(problem: Problem) -> tuple[Tensor, Tensor]:
    """Where a kernel writes commit_mask and tokens; without elements where they are not asked for."""
    shape, device = problem.masked.shape, problem.masked.device
    return (
        torch.empty(shape if problem.score is not None else (0,), dtype=torch.bool, device=device),
        torch.empty(shape if problem.tokens is not None else (0,), dtype=torch.int64, device=device),
    )


def commit_reference(problem: Problem) -> tuple[Tensor, Tensor]:
    """commit_mask and tokens, in the shapes of :func:`results`."""
    commit_mask, tokens = results(problem)
    chosen = torch.zeros_like(problem.masked)
    if problem.score is not None and problem.masked.numel():
        commit_mask = chosen = _select(problem)
    if problem.tokens is not None:
        tokens = problem.tokens.clone()
        if problem.candidates is not None:
            tokens = torch.where(chosen, problem.candidates, tokens)
        if problem.vocab:
            tokens = torch.where(problem.masked & ~chosen, _noise(problem), tokens)
    return commit_mask, tokens


def _select(problem: Problem) -> Tensor:
    score, masked, rule = problem.score, problem.masked, RULES[problem.rule]
    assert score is not None
    bound = _tensor(problem.bound, torch.int64 if rule == "quota" else score.dtype, masked.device)
    bound = bound.expand(len(masked))[:, None]
    # + 0 makes a 0 of -0, which a sort on a GPU may tell apart; NaN comes last in an ascending order
    order = ((score if rule == "entropy_bound" else -score) + 0.0).argsort(dim=-1, stable=True)
    counts = masked.gather(-1, order)
    ranked = score.gather(-1, order).double()
    number = counts.cumsum(-1)  # of masked positions up to this one
    if rule == "quota":
        holds = number <= bound
    elif rule == "threshold":
        holds = ranked >= bound.double()
    elif rule == "factor":
        holds = (number + 1) * (1 - ranked) < bound.double()
    else:
        sums = torch.where(counts, ranked, 0).cumsum(-1)
        holds = torch.nn.functional.pad(sums[:, :-1], (1, 0)) <= bound.double()
    last = torch.where(counts & holds, number, 0 if rule == "quota" else 1).amax(-1, keepdim=True)
    return torch.zeros_like(masked).scatter(-1, order, counts & (number <= last))


def _noise(problem: Problem) -> Tensor:
    device = problem.masked.device
    position = problem.position
    if position is None:
        position = torch.arange(problem.masked.shape[1], device=device)
    seed, step = (_tensor(value, torch.int64, device) for value in (problem.seed, problem.step))
    return (philox_uniforms(seed, position, step, DRAW_NOISE)[0] * problem.vocab).floor().long()


def _tensor(value: Setting, dtype: torch.dtype, device: torch.device) -> Tensor:
    # torch.as_tensor of a number would copy it to a GPU, and wait
    return value.to(dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=device)
