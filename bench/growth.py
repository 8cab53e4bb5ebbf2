"""How the time of ``sample_tokens`` grows with rows and vocabulary: linearly, or where it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from bench.text import significant, table
from bench.timing import CudaTimer, Spread, cpu_ms, interleave
from diffusion_runtime import ops

ROWS = (1, 4, 16, 64, 256, 1024)
VOCAB = (1_000, 4_000, 16_000, 64_000, 126_464, 262_144)
MOST_LOGITS = 1 << 28  # 1 GB of float32


@dataclass(frozen=True)
class Point:
    rows: int
    vocab: int
    ms: float

    @property
    def logits(self) -> int:
        return self.rows * self.vocab


def measure(device: torch.device, rounds: int) -> Iterator[Point]:
    timer = CudaTimer(device) if device.type == "cuda" else cpu_ms
    for vocab in VOCAB:
        logits = torch.randn(max(ROWS), vocab, device=device).mul_(2.5)
        calls = {str(rows): _call(logits[:rows]) for rows in ROWS if rows * vocab <= MOST_LOGITS}
        for name, samples in interleave(calls, timer, rounds).items():
            yield Point(int(name), vocab, Spread.of(samples).median)


def _call(logits: torch.Tensor) -> Callable[[int], object]:
    return lambda _: ops.sample_tokens(logits, temperature=1.0, seed=0)


def fit(points: list[Point]) -> tuple[float, float]:
    """``fixed + per_logit * logits`` in ms: least squares of the relative error, so that small shapes count as well."""
    weight = torch.tensor([1 / p.ms for p in points], dtype=torch.float64)
    size = torch.tensor([float(p.logits) for p in points], dtype=torch.float64)
    columns = torch.stack((weight, weight * size / 1e6), 1)
    fixed, per_million = torch.linalg.lstsq(columns, torch.ones(len(points), 1, dtype=torch.float64)).solution[:, 0]
    return float(fixed), float(per_million) / 1e6


def markdown(points: list[Point]) -> str:
    """Times, and each over the fit; the worst of them is named."""
    fixed, per_logit = fit(points)
    over = {(p.rows, p.vocab): p.ms / (fixed + per_logit * p.logits) for p in points}
    (rows, vocab), worst = max(over.items(), key=lambda item: item[1])
    times = {(p.rows, p.vocab): p.ms for p in points}
    lines = (
        {"vocab": str(v)}
        | {f"{r} rows": f"{significant(times[r, v])} ({over[r, v]:.2f})" for r in ROWS if (r, v) in times}
        for v in VOCAB
    )
    return "\n\n".join(
        (
            "### Growth of sample_tokens, sampled, float32: ms (over the fit)",
            f"Fit: {fixed * 1e3:.1f} us + {per_logit * 1e6:.3f} ns a logit. "
            f"Farthest above it: {worst:.2f} times, at [{rows}, {vocab}].",
            table(lines),
        )
    )
