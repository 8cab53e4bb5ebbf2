"""A wrong answer has no speed: what is timed is held to the op's definition in float64 first."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.peers import Answer
from diffusion_runtime.ops import sample_tokens

SEED = 20_240_601
_ROWS = 4
# float32 sums over a quarter of a million terms; a wrong answer is far off
_RELATIVE, _ABSOLUTE = 1e-4, 1e-6


class WrongAnswerError(RuntimeError):
    """A runner's answer is not that of the definition."""


class Truth:
    """Some rows of ``[rows, vocab]`` logits, and their answers in float64."""

    def __init__(self, logits: Tensor, temperature: float) -> None:
        count = logits.shape[0]
        self._draws = temperature > 0
        self._rows = torch.linspace(0, count - 1, min(_ROWS, count)).long()
        self._logits = logits[self._rows.to(logits.device)].cpu().double()
        self._answer = sample_tokens(
            self._logits, temperature=temperature, seed=SEED, position=self._rows, backend="reference"
        )._asdict()

    def check(self, runner: str, answer: Answer, *, ours: bool) -> None:
        """Raise WrongAnswerError unless the answer is right.

        A draw of ours is keyed by its seed and has to be the very token. A peer may draw any token, and its argmax may
        be any of those at a tie.
        """
        got = {name: values.cpu()[self._rows] for name, values in answer.items()}
        want = dict(self._answer)
        for name in ("token", "argmax"):
            if name in got:
                self._require(runner, name, got[name], want[name], self._ids_pass(name, got[name], ours=ours))
        want["logprob"] = self._logits.log_softmax(-1).gather(-1, got["token"][:, None])[:, 0]
        for name in got.keys() - {"token", "argmax"}:
            error = (got[name].double() - want[name]).abs()
            self._require(runner, name, got[name], want[name], error <= _RELATIVE * want[name].abs() + _ABSOLUTE)

    def _ids_pass(self, name: str, ids: Tensor, *, ours: bool) -> Tensor:
        if ours:
            return ids.eq(self._answer[name])
        in_range = (ids >= 0) & (ids < self._logits.shape[1])
        if name == "token" and self._draws:
            return in_range
        score = self._logits.gather(-1, torch.where(in_range, ids, 0)[:, None])[:, 0]
        return in_range & (score == self._logits.amax(-1))

    def _require(self, runner: str, name: str, got: Tensor, want: Tensor, passed: Tensor) -> None:
        if not passed.all():
            first = int((~passed).nonzero()[0])
            raise WrongAnswerError(
                f"{runner} is not timed, its answer is wrong: {name} of row {int(self._rows[first])} "
                f"is {got[first].item():.8g}, in float64 it is {want[first].item():.8g}"
            )
