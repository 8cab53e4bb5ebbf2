"""A run of the bench: every group of a plan, each checked, then timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from bench.check import Truth
from bench.machine import describe
from bench.memory import available_mb, peak_extra_mb, unmeasurable
from bench.peers import PEERS
from bench.record import MODES, Group, Measurement, Mode, Record
from bench.runners import (
    OP,
    Runner,
    default_backends,
    instruction_set_runners,
    limit_runners,
    our_runner,
    peer_runners,
)
from bench.timing import CudaTimer, cpu_ms, interleave, launch_us

_PROBED_ROWS = 8  # enough to foresee what a call on all rows takes


@dataclass(frozen=True)
class Plan:
    """What to time, and for how long."""

    rows: tuple[int, ...] = (64, 256)
    vocab: tuple[int, ...] = (126_464, 262_144)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    threads: tuple[int, ...] = (1, 2)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backends: tuple[str, ...] = ()  # none: all that can run
    modes: tuple[Mode, ...] = MODES
    peers: tuple[str, ...] = PEERS
    left_out: tuple[tuple[str, str], ...] = ()  # (peer, mode)
    rounds: int = 7
    rounds_where_large: int = 5
    large: int = 12_000_000  # logits
    longest_call_ms: float = 300.0  # a peer that takes longer on large logits is not run
    buffers: int = 1  # copies of the logits that take turns

    def rules(self) -> dict[str, str]:
        return {
            "rounds": f"{self.rounds}, and {self.rounds_where_large} above {self.large / 1e6:.0f} M logits",
            "spread": "20th to 80th percentile; ratios are taken round by round",
            "longest call of a peer on those": f"{self.longest_call_ms:.0f} ms",
            "buffers": str(self.buffers),
        }


class Session:
    def __init__(self, plan: Plan, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._say = say
        self._timer = CudaTimer(plan.device) if plan.device.type == "cuda" else cpu_ms
        self._blind = unmeasurable(plan.device)
        if self._blind:
            say(f"peak memory is not measured: {self._blind}")

    def run(self) -> Record:
        """Time everything. Raises WrongAnswerError at the first answer that is wrong."""
        plan = self._plan
        machine = describe(plan.device)
        measurements: list[Measurement] = []
        for vocab in plan.vocab:
            generator = torch.Generator(plan.device).manual_seed(vocab)
            full = torch.randn(max(plan.rows), vocab, generator=generator, device=plan.device).mul_(2.5)
            for dtype, threads in product(plan.dtypes, plan.threads):
                logits = full.to(getattr(torch, dtype))
                with _threads(threads):
                    for mode in plan.modes:
                        measurements += self._mode(logits, Group(0, vocab, dtype, threads, mode.name), mode)
        rules = plan.rules() | ({"peak memory": f"not measured: {self._blind}"} if self._blind else {})
        return Record(OP, plan.device.type, machine, rules, measurements)

    def _mode(self, logits: Tensor, group: Group, mode: Mode) -> Iterator[Measurement]:
        """Every number of rows; what is compiled is compiled once where the device allows it."""
        plan = self._plan
        torch._dynamo.reset()  # or it would count the variants of the chain, and give up on the ninth
        backends = plan.backends or default_backends(plan.device, logits.dtype)
        ours = [our_runner(backend, mode.temperature) for backend in backends]
        peers = peer_runners(mode.temperature, plan.device)
        limits = limit_runners(plan.device)
        for rows in sorted(plan.rows):
            first = rows == min(plan.rows) and group.vocab == min(plan.vocab) and plan.device.type == "cpu"
            sets = instruction_set_runners(mode.temperature) if first and not plan.backends else []
            self._say(f"{rows} x {group.vocab} {group.dtype}, {group.threads} threads, {mode.name}")
            yield from self._group(logits[:rows], replace(group, rows=rows), mode, [*ours, *sets, *peers, *limits])

    def _group(self, logits: Tensor, group: Group, mode: Mode, runners: list[Runner]) -> Iterator[Measurement]:
        plan = self._plan
        buffers = [logits] + [logits.clone() for _ in range(plan.buffers - 1)]
        truth = Truth(logits, mode.temperature)
        size = logits.numel() * logits.element_size()
        peak: dict[str, float | None] = {}
        ready: list[Runner] = []
        for runner in runners:
            reason = self._obstacle(runner, logits, mode)
            if reason:
                yield Measurement(group, runner.name, runner.kind, [], size, not_run=reason)
                continue
            peak[runner.name] = self._check(runner, logits, truth)
            ready.append(runner)

        def call(number: int, runner: Runner) -> object:
            return runner.call(buffers[number % len(buffers)])

        rounds = plan.rounds if logits.numel() <= plan.large else plan.rounds_where_large
        with torch.no_grad():
            samples = interleave({r.name: partial(call, runner=r) for r in ready}, self._timer, rounds)
            for runner in ready:
                launch = None
                if plan.device.type == "cuda" and runner.kind == "ours":
                    launch = launch_us(partial(runner.call, logits))
                moved = 2 * size if runner.kind == "copy" else size
                ms = [round(sample, 5) for sample in samples[runner.name]]
                yield Measurement(group, runner.name, runner.kind, ms, moved, peak[runner.name], launch)

    def _obstacle(self, runner: Runner, logits: Tensor, mode: Mode) -> str | None:
        """Why a peer is not run on these logits, or None."""
        if runner.kind != "peer":
            return None
        plan = self._plan
        if runner.name not in plan.peers:
            return "not asked for"
        if (runner.name, mode.name) in plan.left_out:
            return "left out of a quick run"
        if runner.name == "compiled" and not self._compile(runner, logits):
            return None
        probe = logits[:_PROBED_ROWS]
        scale = len(logits) / len(probe)
        with torch.no_grad():
            runner.call(probe)
            mb = 0.0 if self._blind else peak_extra_mb(partial(runner.call, probe), plan.device)[1] * scale
            ms = self._timer(partial(runner.call, probe)) * scale
        if ms > plan.longest_call_ms and logits.numel() > plan.large:
            return f"about {ms / 1e3:.1f} s a call"
        if mb > 0.8 * available_mb(plan.device):
            return f"needs about {mb / 1e3:.0f} GB"
        return None

    def _compile(self, runner: Runner, logits: Tensor) -> bool:
        """Whether the code now serves any number of rows: on a GPU a probe would compile once more."""
        general = self._plan.device.type == "cpu"
        with torch.no_grad():
            if general:
                logits = logits[: min(self._plan.rows)]
                torch._dynamo.mark_dynamic(logits, 0)
            runner.call(logits)
        return general

    def _check(self, runner: Runner, logits: Tensor, truth: Truth) -> float | None:
        """The peak memory of a runner whose answer is right, in MB, or None where it cannot be measured."""
        with torch.no_grad():
            if runner.kind != "peer":  # a peer's first call was the probe
                runner.call(logits)  # the first call also loads code, which counts as memory
            if self._blind:
                answer, mb = runner.call(logits), None
            else:
                answer, mb = peak_extra_mb(partial(runner.call, logits), self._plan.device)
        if runner.kind not in ("read", "copy"):
            truth.check(runner.name, answer, ours=runner.kind != "peer")
        return mb


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
