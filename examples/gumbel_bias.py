"""How often each sampler draws from a heavy tail: the table of docs/randomness.md. Takes some minutes on a CPU.

One token has probability 0.99; 262,143 others share the rest, 3.8e-8 each. A sampler that is exact draws one of them in
one draw of a hundred.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_runtime import ops

VOCAB, TOP, TAIL = 262_144, 1000, 0.01


def gumbel(logits: Tensor, draws: int, dtype: torch.dtype) -> Tensor:
    noise = -(-torch.rand(draws, VOCAB, dtype=dtype).log()).log()
    return (logits.to(dtype) + noise).argmax(-1)


def exponential_race(logits: Tensor, draws: int) -> Tensor:
    return (logits.softmax(-1) / torch.empty(draws, VOCAB).exponential_()).argmax(-1)


def tail_share(sample: Callable[[int], Tensor], draws: int, at_once: int) -> tuple[float, float]:
    """The share of draws that fall into the tail, and its standard error were it exact."""
    hits = sum(int((sample(at_once) != TOP).sum()) for _ in range(draws // at_once))
    return hits / draws, math.sqrt(TAIL * (1 - TAIL) / draws)


def main() -> None:
    torch.manual_seed(0)
    logits = torch.full((VOCAB,), math.log(TAIL / (VOCAB - 1)))
    logits[TOP] = math.log1p(-TAIL)

    def ours(draws: int) -> Tensor:
        return ops.sample_tokens(logits.expand(draws, VOCAB), temperature=1.0, seed=1).token

    samplers: dict[str, tuple[Callable[[int], Tensor], int, int]] = {
        "sample_tokens": (ours, 1_000_000, 1_000_000),
        "Gumbel noise in float32": (lambda n: gumbel(logits, n, torch.float32), 40_000, 50),
        "Gumbel noise in float64": (lambda n: gumbel(logits, n, torch.float64), 20_000, 25),
        "an exponential race in float32": (lambda n: exponential_race(logits, n), 40_000, 50),
    }
    print(f"{'sampler':34} {'draws':>9}  in the tail (exact: {TAIL:.2%})")
    for name, (sample, draws, at_once) in samplers.items():
        share, error = tail_share(sample, draws, at_once)
        print(f"{name:34} {draws:9,}  {share:.3%} +- {error:.3%}", flush=True)


if __name__ == "__main__":
    main()
