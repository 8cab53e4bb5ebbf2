"""Interleaved timing, and what may be concluded from it."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """The median of some samples, and their 20th and 80th percentiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        if len(samples) < 2:
            return cls(samples[0], samples[0], samples[0])
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(statistics.median(samples), deciles[1], deciles[7])

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """The spread of the quotients, round by round: what slows a whole round down cancels."""
    return Spread.of([n / d for n, d in zip(numerator, denominator, strict=True)])


def cpu_ms(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


class CudaTimer:
    """Device time between two events, from a cold L2."""

    HEAD_START_CYCLES = 1_000_000  # the GPU waits about 0.5 ms, so that the host has enqueued all of the call

    def __init__(self, device: torch.device) -> None:
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(4 * l2_bytes, dtype=torch.int8, device=device)

    def __call__(self, call: Call) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        torch.cuda._sleep(self.HEAD_START_CYCLES)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))


def launch_us(call: Call, calls: int = 20) -> float:
    """Time the host takes to enqueue a call, the queue being far from full."""
    samples = []
    for _ in range(calls):
        torch.cuda.synchronize()
        samples.append(cpu_ms(call) * 1e3)
    return statistics.median(samples)


def interleave(
    calls: dict[str, Callable[[int], object]], timer: Callable[[Call], float], rounds: int
) -> dict[str, list[float]]:
    """Time each call once a round, in an order shuffled anew, after one round that does not count.

    A call is given the number of its round.
    """
    names = list(calls)
    order = random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        order.shuffle(names)
        for name in names:
            ms = timer(lambda name=name, number=number: calls[name](number))  # type: ignore[misc]
            if number > 0:
                samples[name].append(ms)
    return samples
