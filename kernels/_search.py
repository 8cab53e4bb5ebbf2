"""The search for the smallest logit that a row may draw, apart from how its logits are read.

The largest value is sought at which enough tokens, or enough of the mass, are as large. A step measures what reaches
the middle of an interval and ends the interval at values of the row, so that gaps between them cost no steps and equal
logits are one value.
"""

from __future__ import annotations

import triton
import triton.language as tl
from diffusion_runtime.kernels._common import INF, exponent, softcapped

LOWEST = tl.constexpr(-3.4028234663852886e38)  # of the finite numbers


@triton.jit
def middle_of(low, high, reach):
    """A value above ``low`` and at most ``high``; where there is no ``low`` yet, ``reach`` below ``high``."""
    wide = high.to(tl.float64)
    value = tl.where(low == -INF, wide - reach, 0.5 * (low.to(tl.float64) + wide))
    value = tl.maximum(value, LOWEST).to(tl.float32)
    return tl.where(value > low, value, high)


@triton.jit
def above_in_block(x, weight, middle, rest_count, rest_mass):
    """What there is in x [rows, n], whose tokens have the mass ``weight``, and in a rest that is larger than all of it.

    Returns how many logits reach ``middle`` [rows], their mass, the smallest of them in x, the largest of the others.
    """
    above = x >= middle[:, None]
    count = rest_count + tl.sum(above.to(tl.int32), 1)
    mass = rest_mass + tl.sum(tl.where(above, weight, 0.0), 1).to(tl.float64)
    return count, mass, tl.min(tl.where(above, x, INF), 1), tl.max(tl.where(above, -INF, x), 1)


@triton.jit
def narrowed(low, high, count, mass, over_count, over_mass, goal, by_count, by_mass, searching, limits, found):
    """One step of the rows ``searching``: ``found`` is what reaches a middle between ``low`` and ``high``.

    low, high: values of the row between which the sought one lies. ``count`` tokens reach ``low``, which are enough,
    with ``mass``; ``over_count`` lie over ``high``, which are not, with ``over_mass``. A row that looks ``by_count``
    and is there goes on ``by_mass``, for ``goal``, a share of what is left.
    """
    largest, top_k, top_p = limits
    found_count, found_mass, smallest, below = found
    enough = searching & tl.where(by_count, found_count >= top_k, found_mass >= goal)
    short = searching & ~enough
    low, high = tl.where(enough, smallest, low), tl.where(short, below, high)
    count, mass = tl.where(enough, found_count, count), tl.where(enough, found_mass, mass)
    over_count, over_mass = tl.where(short, found_count, over_count), tl.where(short, found_mass, over_mass)
    counted = searching & by_count & ((low >= high) | (count == top_k))
    goal = tl.where(counted, mass * top_p, goal)
    high = tl.where(counted, tl.where(by_mass, largest, low), high)
    over_count, over_mass = tl.where(counted, 0, over_count), tl.where(counted, 0.0, over_mass)
    return low, high, count, mass, over_count, over_mass, goal, by_count & ~counted


@triton.jit
def _value_of(key):
    """The float32 at a place in the order of all of them, int64; that of +0 is 0."""
    bits = key.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _key_of(value):
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def least_of_share(largest, top, softcap, inverse, share):
    """The smallest number whose weight is ``share`` [rows], above 0, of that of ``largest``; reads no logits.

    A search also under a softcap, whose inverse would take equal y apart.
    """
    low, high = _key_of(tl.full(largest.shape, -INF, tl.float32)), _key_of(largest)
    for _ in range(5):  # 128 numbers in each, 2^35 in all
        key = low[:, None] + (((high - low)[:, None] * tl.arange(0, 128)[None, :]) >> 7)
        weight = tl.exp2(exponent(softcapped(_value_of(key), softcap), top, inverse))
        large = weight >= share[:, None]
        low = tl.maximum(low, tl.max(tl.where(large, low[:, None], key), 1))
        high = tl.minimum(high, tl.min(tl.where(large, key, high[:, None]), 1))
    return _value_of(high)
