"""``commit_step`` beside the sort and the sums that it replaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from bench.check import WrongAnswerError
from bench.comparison import Comparison
from bench.inputs import backends
from bench.scope import Scope
from diffusion_runtime import ops

CANVASES = ((1, 64), (16, 256))  # batch, length


def commit_step(scope: Scope) -> Iterator[Comparison]:
    """``commit_step`` by each rule, beside the sort and the sums that it replaces."""
    for batch, length in scope.some(CANVASES):
        generator = torch.Generator(scope.device).manual_seed(length)
        score = torch.rand(batch, length, generator=generator, device=scope.device)
        masked = torch.rand(batch, length, generator=generator, device=scope.device) < 0.8
        tokens = torch.zeros(batch, length, dtype=torch.int64, device=scope.device)
        for rule, bound in (("quota", 8), ("threshold", 0.9), ("entropy_bound", 0.5)):
            step = partial(ops.commit_step, tokens, tokens + 1, score, masked, rule=rule, bound=bound)
            calls = {name: partial(step, backend=name) for name in backends("commit_step", scope.device, torch.float32)}
            yield Comparison(
                f"A commit of [{batch}, {length}]",
                rule,
                calls,
                {"eager torch": partial(_eager_commit, tokens, tokens + 1, score, masked, rule, bound)},
                partial(_check_commit, calls, partial(step, backend="reference")),
            )


def _eager_commit(tokens: Tensor, candidates: Tensor, score: Tensor, masked: Tensor, rule: str, bound: float) -> Tensor:
    if rule == "threshold":
        ordered = score.masked_fill(~masked, -torch.inf)
        chosen = (ordered >= bound) | (torch.arange(score.shape[1], device=score.device) == ordered.argmax(1)[:, None])
    else:
        last = -torch.inf if rule == "quota" else torch.inf
        ordered, places = score.masked_fill(~masked, last).sort(dim=1, descending=rule == "quota", stable=True)
        if rule == "quota":
            kept = torch.arange(score.shape[1], device=score.device).expand_as(places) < bound
        else:
            kept = ordered.cumsum(1) - ordered <= bound
        chosen = torch.zeros_like(masked).scatter(1, places, kept)
    return torch.where(chosen & masked, candidates, tokens)


def _check_commit(calls: Mapping[str, Callable[[], ops.CommitStep]], truth: Callable[[], ops.CommitStep]) -> None:
    for name, call in calls.items():
        if not torch.equal(call().tokens, truth().tokens):
            raise WrongAnswerError(f"{name} is not timed, it commits other tokens than the reference")
