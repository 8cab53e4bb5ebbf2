"""The published rules on plain lists: one row, one step, no tensors. Nothing here is shared with the package.

Each takes what is known of a row's positions, a list for each statistic, and gives the set of positions that change.
Positions are ordered by a score, the best first; ties go to the left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Positions = set[int]


def even_share(count: int, steps: int, index: int) -> int:
    """LLaDA's and SDAR's ``get_num_transfer_tokens``, one entry."""
    shares = [count // steps] * steps
    for i in range(count % steps):
        shares[i] += 1
    return shares[index] if index < steps else 0


def best(score: Sequence[float], masked: Iterable[int], count: int) -> Positions:
    return set(sorted(masked, key=lambda i: (-score[i], i))[: max(0, count)])


def above(score: Sequence[float], masked: list[int], bound: float, least: int, *, inclusive: bool) -> Positions:
    """Fast-dLLM's, SDAR's and LLaDA2's thresholds."""
    passing = {i for i in masked if score[i] > bound or (inclusive and score[i] == bound)}
    return passing if len(passing) >= least else best(score, masked, least)


def factor(score: Sequence[float], masked: list[int], f: float) -> Positions:
    """The largest ``n`` with ``(n + 1)(1 - c_n) < f``, as the paper has it."""
    order = sorted(masked, key=lambda i: (-score[i], i))
    n = max((n for n in range(1, len(order) + 1) if (n + 1) * (1 - score[order[n - 1]]) < f), default=1)
    return set(order[:n])


def entropy_bounded(score: Sequence[float], entropy: Sequence[float], masked: list[int], bound: float) -> Positions:
    """The longest start ``U`` of the order with ``sum(H) - max(H) <= bound``; at least one."""
    order = sorted(masked, key=lambda i: (-score[i], i))
    chosen = order[:1]
    for n in range(2, len(order) + 1):
        entropies = [entropy[i] for i in order[:n]]
        if math.fsum(entropies) - max(entropies) <= bound:
            chosen = order[:n]
    return set(chosen)


def times(steps: int, last: float) -> list[float]:
    return [1 + (last - 1) * i / steps for i in range(steps + 1)]


def dream_count(masked: int, steps: int, index: int, last: float = 1e-3) -> float:
    """Before it is rounded down, so that a caller can tell a tie of roundings."""
    t = times(steps, last)
    return masked if index == steps - 1 else masked * (1 - t[index + 1] / t[index])


def remask_chances(
    kind: str, index: int, steps: int, eta: float, decided: dict[int, float], *, last: float = 1e-5,
    on: float = 0.55, off: float = 0.05, plateau: float = 0.9,
) -> tuple[float, dict[int, float]]:  # fmt: skip
    """Of ReMDM: the chance of an undecided position to be decided, and of each decided one to be masked again.

    ``decided`` holds the confidence of each; ``steps`` counts the times, without the last step.
    """
    t = times(steps, last)
    now, then = t[index], t[index + 1]
    if kind == "loop" and off < now <= on:
        return (plateau - (1 - eta) * plateau) / (1 - plateau), dict.fromkeys(decided, eta)
    if kind == "loop":
        if now > on:
            left, left_then = (1 - (1 - x) * plateau / (1 - on) for x in (now, then))
        else:
            left, left_then = (x * (1 - plateau) / off for x in (now, then))
        return (left - left_then) / left, dict.fromkeys(decided, 0.0)
    alpha, alpha_then = 1 - now, 1 - then
    most = min(1.0, (1 - alpha_then) / alpha) if alpha > 0 else 1.0
    if kind == "conf":
        total = sum(math.exp(-c) for c in decided.values())
        shares = {i: eta * most * math.exp(-c) / total for i, c in decided.items()}
        return (alpha_then - alpha) / (1 - alpha), shares
    sigma = min(eta, most) if kind == "cap" else eta * most
    return (alpha_then - (1 - sigma) * alpha) / (1 - alpha), dict.fromkeys(decided, sigma)
