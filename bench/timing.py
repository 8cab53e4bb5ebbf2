"""Interleaved timing, and what may be concluded from it."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

Call = Callable[[], object]
MOST = 5  # times as many rounds of short calls
NONE = "no verdict"
NEAR = 0.1  # of two runs on a machine that others share, one ratio in four differs by more


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


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """The spread of the quotients, round by round: what slows a whole round down cancels."""
    return Spread.of([n / d for n, d in zip(numerator, denominator, strict=True)])


def verdict(times: Spread) -> str:
    """Of a peer's time over ours: whether ours is faster or slower; within a tenth there is nothing to go by."""
    if times.low > 1 + NEAR:
        return "faster"
    return "slower" if times.high < 1 / (1 + NEAR) else NONE


def cpu_ms(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def cold_ms(call: Call) -> float:
    """From caches that hold nothing of the inputs: as much else was written before as they can hold, twice."""
    _other_memory().add_(1)
    return cpu_ms(call)


def warm_ms(call: Call) -> float:
    """The mean of as many calls as a millisecond takes, the inputs where the last one left them."""
    count = min(1000, max(1, round(1 / max(cpu_ms(call), 1e-3))))

    def several() -> None:
        for _ in range(count):
            call()

    return cpu_ms(several) / count


@cache
def _other_memory() -> torch.Tensor:
    return torch.zeros(2 * last_cache_bytes(), dtype=torch.uint8)


def last_cache_bytes() -> int:
    """The size of the last cache as Linux tells it; elsewhere 32 MiB."""
    found = [
        int(file.read_text().strip().removesuffix("K")) * 1024
        for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if file.read_text().strip().endswith("K")
    ]
    return max(found, default=32 << 20)


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
    calls: Mapping[str, Call], timer: Callable[[Call], float], rounds: int, seconds: float = 0.0
) -> dict[str, list[float]]:
    """Time each call once a round, in an order shuffled anew, after one round that does not count.

    There are as many rounds as are asked for, and up to MOST times as many while they take less than ``seconds``.
    """
    start, names = time.perf_counter(), list(calls)
    order = random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(MOST * rounds + 1):
        if number > rounds and time.perf_counter() - start >= seconds:
            break
        order.shuffle(names)
        for name in names:
            ms = timer(calls[name])
            if number > 0:
                samples[name].append(ms)
    return samples
