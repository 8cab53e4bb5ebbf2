"""One comparison: ours beside its peers on one input, checked, measured for memory, then timed in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.memory import peak_extra_mb, unmeasurable
from bench.record import Result, Timed
from bench.scope import Scope
from bench.timing import Call, CudaTimer, cold_ms, cpu_ms, interleave, launch_us, warm_ms


@dataclass(frozen=True)
class Comparison:
    """What is timed together, in one process, in one round after the other.

    Args:
        group: comparisons of one group share a table.
        case: the first column.
        ours: calls of ours by name.
        peers: calls that do the same work.
        check: raises WrongAnswerError where an answer of ours is wrong; called before anything is timed.
        limits: calls that do a part of it which nobody can be faster than: a read of the input, a product alone.
        flop: floating-point operations of one call, where they are what it is about.
        num_bytes: that one call must read and write at least, where they are what it is about.
        tokens: that one call decides, in so many ``forwards``: of whole answers.
        at: where on the curve of its group, of which ``case`` names the unit; 0: the group is no curve.
    """

    group: str
    case: str
    ours: Mapping[str, Call]
    peers: Mapping[str, Call]
    check: Callable[[], None]
    limits: Mapping[str, Call] = field(default_factory=dict)
    flop: float = 0.0  # 0: not what matters
    num_bytes: float = 0.0
    tokens: int = 0
    forwards: int = 0
    at: float = 0.0


class Answer:
    """A call for a whole answer, which also keeps how long it took from its first forward on.

    Args:
        loop: yields the tokens after each forward.
        device: where.
    """

    def __init__(self, loop: Callable[[], Iterator[Tensor]], device: torch.device) -> None:
        self.loop, self.device = loop, device
        self.decode_ms: list[float] = []

    def __call__(self) -> Tensor:
        forwards = self.loop()
        tokens = next(forwards)
        began = self._now()
        for later in forwards:
            tokens = later
        self.decode_ms.append((self._now() - began) * 1e3)
        return tokens

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


LONG_S, FEW_ROUNDS = 10.0, 3  # a round of everyone that takes longer, and how often it is then taken
SHORT_MS = 1.0  # what is shorter works on little, which in a model has just been computed
Suite = Callable[[Scope], Iterator[Comparison]]


def measure(op: str, suite: Suite, scope: Scope, say: Callable[[str], None]) -> Iterator[Result]:
    """Check, then measure, each comparison of a suite; they may be made while this runs.

    Raises:
        WrongAnswerError: an answer of ours is wrong. Nothing of that comparison is timed.
    """
    on_gpu = CudaTimer(scope.device) if scope.device.type == "cuda" else None
    blind = unmeasurable(scope.device) is not None
    for comparison in suite(scope):
        say(f"{op}: {comparison.group}, {comparison.case}")
        kinds = {
            "ours": comparison.ours,
            "peer": {name: call for name, call in comparison.peers.items() if scope.wants(name)},
            "limit": comparison.limits,
        }
        calls = {name: call for several in kinds.values() for name, call in several.items()}
        with torch.no_grad():
            for call in calls.values():
                call()  # the first call loads code or compiles it, which would count as memory
            comparison.check()
            start = time.perf_counter()
            peak = {name: None if blind else peak_extra_mb(call, scope.device)[1] for name, call in calls.items()}
            rounds = scope.rounds if time.perf_counter() - start < LONG_S else FEW_ROUNDS
            cold = on_gpu is not None or min(map(cpu_ms, comparison.ours.values())) > SHORT_MS
            ms = interleave(calls, on_gpu or (cold_ms if cold else warm_ms), rounds, scope.seconds)
            decode = {
                name: call.decode_ms[-len(ms[name]) :] for name, call in calls.items() if isinstance(call, Answer)
            }
            launch = {name: launch_us(call) for name, call in comparison.ours.items() if scope.device.type == "cuda"}
        yield Result(
            op,
            comparison.group,
            comparison.case,
            torch.get_num_threads() if scope.device.type == "cpu" else 0,
            cold,
            [
                Timed(name, kind, _rounded(ms[name]), peak[name], launch.get(name), _rounded(decode.get(name)))
                for kind, several in kinds.items()
                for name in several
            ],
            comparison.flop,
            comparison.num_bytes,
            comparison.tokens,
            comparison.forwards,
            comparison.at,
        )


def _rounded(samples: list[float] | None) -> Any:
    return None if samples is None else [round(sample, 5) for sample in samples]


def merged(*suites: Suite) -> Suite:
    """One after the other."""

    def run(scope: Scope) -> Iterator[Comparison]:
        for suite in suites:
            yield from suite(scope)

    return run
