"""What kernels on rows of logits share: the mathematics of ``csrc/include/row_statistics.h`` and the inverse CDF.

A row is cut into parts. With y = softcap(x), a part is known by its largest x and by sums of 2^z and z 2^z, where
z = (y - largest y of the part) * log2(e) / temperature. Parts lie in memory as [4, rows, num_parts] float32: largest
x, sum of 2^z, sum of z 2^z, sum of 2^z at the temperature of the draw; ``part_ptr`` [rows] points at the largest x of
each row's first part, and ``size`` = rows * num_parts steps to the next kind. They are put together in float64, in the
order of their tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE = tl.constexpr(128)  # tokens: a draw picks a tile by its mass, then a token inside it
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def rows_of_block(block, masked_ptr, num_rows, BLOCK_ROWS: tl.constexpr):
    """Row numbers [BLOCK_ROWS] int64, which of them exist, and which of those are to be read."""
    rows = block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exist = rows < num_rows
    live = exist
    if masked_ptr is not None:
        live = exist & tl.load(masked_ptr + rows, mask=exist, other=0).to(tl.int1)
    return rows, exist, live


@triton.jit
def load_logits(row_ptr, first, vocab, live, WIDTH: tl.constexpr, allowed_ptr=None, cutoff=None):
    """Logits [rows, WIDTH] float32 from column ``first`` [rows] int64 on; -inf past the end.

    Also -inf: tokens that are not among ``allowed_ptr`` [rows], pointers at packed words of which ``first`` begins
    one; and logits below ``cutoff`` [rows], NaN stays.
    """
    lane = tl.arange(0, WIDTH)[None, :]
    # vocab - first cannot overflow an int32, first + lane could
    left = (vocab - first)[:, None]
    inside = live[:, None] & (lane < left)
    x = tl.load((row_ptr + first)[:, None] + lane, mask=inside, other=-INF).to(tl.float32)
    if allowed_ptr is not None:
        word = tl.arange(0, WIDTH // 32)[None, :]
        words = tl.load((allowed_ptr + first // 32)[:, None] + word, mask=live[:, None] & (word * 32 < left), other=0)
        bits = tl.broadcast_to(words[:, :, None], [first.shape[0], WIDTH // 32, 32]) >> tl.arange(0, 32)[None, None, :]
        x = tl.where(tl.reshape(bits & 1, x.shape) != 0, x, -INF)
    if cutoff is not None:
        x = tl.where(x < cutoff[:, None], -INF, x)
    return x


@triton.jit
def row_pointers(logits_ptr, rows, inner, stride_outer, stride_inner):
    return logits_ptr + rows // inner * stride_outer + rows % inner * stride_inner


@triton.jit
def row_setting(setting_ptr, setting, rows, live, DTYPE: tl.constexpr):
    """[rows]: the values at ``setting_ptr``, or ``setting`` for every row where that is None."""
    if setting_ptr is None:
        value = tl.full(rows.shape, setting, DTYPE)
    else:
        value = tl.load(setting_ptr + rows, mask=live, other=1)
    return value


@triton.jit
def inverse_temperature(temperature):
    """1 / temperature in float64, for ``temperature`` above 0 and kept where powers of two stay finite.

    A tiny temperature is then nearly greedy, not NaN, and a huge one still tells -inf from the other logits.
    """
    return tl.minimum(tl.maximum(1.0 / temperature.to(tl.float64), 1e-30), 2e38)


@triton.jit
def _tanh_quotient(x, softcap):
    """tanh(x / softcap) of finite or infinite x; NaN stays."""
    # Beyond 10 the result rounds to 1, and the division could overflow.
    size = tl.minimum(tl.abs(x), 10.0 * tl.minimum(softcap, 3e37), propagate_nan=tl.PropagateNan.ALL) / softcap
    # Near 0, where 1 - e^-2x would cancel, the polynomial of Cephes' tanhf (Moshier).
    square = size * size
    p = tl.fma(square, tl.full(x.shape, -5.70498873e-3, tl.float32), 2.06390888e-2)
    p = tl.fma(p, square, -5.37397156e-2)
    p = tl.fma(p, square, 1.33314422e-1)
    p = tl.fma(p, square, -3.33332819e-1)
    near_zero = tl.fma(p * square, size, size)
    power = tl.exp2(size * (-2 * LOG2E))
    result = tl.where(size < 0.625, near_zero, (1.0 - power) / (1.0 + power))
    return tl.where(x < 0, -result, result)


@triton.jit
def softcapped(x, softcap):
    """y = softcap * tanh(x / softcap), or x where ``softcap`` is None; -inf stays."""
    y = x
    if softcap is not None:
        y = tl.where(x == -INF, x, softcap * _tanh_quotient(x, softcap))
    return y


@triton.jit
def top_value(largest, softcap):
    """The y of a part's largest x; finite also where x is not: a part without any token has 0."""
    return tl.where(largest == -INF, 0.0, tl.minimum(softcapped(largest, softcap), _LARGEST))


@triton.jit
def exponent(y, top, inverse):
    """z = (y - top) * log2(e) / temperature, where -inf becomes a number whose power of two is 0; NaN stays.

    y [rows, n] float32, top [rows] float32, inverse [rows] float64.
    """
    scale = (inverse * LOG2E).to(tl.float32)[:, None]
    # 2^-200 is 0, with and without subnormal numbers. The bound comes before the scale, which could let finfo.min, a
    # popular stand-in for -inf, overflow.
    return tl.maximum(y - top[:, None], -200.0 / scale, propagate_nan=tl.PropagateNan.ALL) * scale


@triton.jit
def largest_of_parts(part_ptr, live, num_parts, BLOCK_PARTS: tl.constexpr):
    """Of each row: the largest logit, the first part that holds it, and the largest of the other parts."""
    largest = tl.full(live.shape, -INF, tl.float32)
    second = largest
    winner = tl.full(live.shape, 0, tl.int32)
    for first in range(0, num_parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)[None, :]
        x = tl.load(part_ptr[:, None] + part, mask=live[:, None] & (part < num_parts), other=-INF)
        best = tl.max(x, 1)
        best_part = tl.min(tl.where(x == best[:, None], part, num_parts), 1)
        second = tl.maximum(second, tl.max(tl.where(part == best_part[:, None], -INF, x), 1))
        second = tl.maximum(second, tl.minimum(largest, best))
        winner = tl.where(best > largest, best_part, winner)
        largest = tl.maximum(largest, best)
    return largest, winner, second


@triton.jit
def _below_top(part_ptr, part, inside, top, softcap):
    """How far the top of each part [rows, n] lies below ``top`` of the row, float64; 0 for a part without a token."""
    largest = tl.load(part_ptr[:, None] + part, mask=inside, other=-INF)
    below = top_value(largest, softcap).to(tl.float64) - top[:, None].to(tl.float64)
    return tl.where(largest == -INF, 0.0, below)


@triton.jit
def _draw_masses(part_ptr, size, part, inside, below, inverse):
    """Masses of parts [rows, n] float64 at the temperature of the draw, relative to the top of the row."""
    mass = tl.load(part_ptr[:, None] + 3 * size + part, mask=inside, other=0.0).to(tl.float64)
    return mass * tl.exp2(below * (inverse * LOG2E)[:, None])


@triton.jit
def row_totals(part_ptr, size, live, num_parts, top, softcap, inverse, draw_inverse, BLOCK_PARTS: tl.constexpr):
    """A row's sums of 2^z, of z 2^z, and of 2^z for the draw [rows] float64, as if taken relative to ``top``."""
    mass = tl.full(live.shape, 0, tl.float64)
    moment, draw_mass = mass, mass
    for first in range(0, num_parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)[None, :]
        inside = live[:, None] & (part < num_parts)
        below = _below_top(part_ptr, part, inside, top, softcap)
        shift = below * (inverse * LOG2E)[:, None]
        weight = tl.exp2(shift)
        at = part_ptr[:, None] + part
        part_mass = tl.load(at + size, mask=inside, other=0.0).to(tl.float64)
        part_moment = tl.load(at + 2 * size, mask=inside, other=0.0).to(tl.float64)
        mass += tl.sum(weight * part_mass, 1)
        moment += tl.sum(weight * (part_moment + part_mass * shift), 1)
        draw_mass += tl.sum(_draw_masses(part_ptr, size, part, inside, below, draw_inverse), 1)
    return mass, moment, draw_mass


@triton.jit
def pick_by_mass(mass, target):
    """Inverse CDF along the columns of mass [rows, n] float64, for target [rows] float64.

    Returns the first column whose cumulative mass exceeds ``target``, what is left of ``target`` before it, and whether
    there is one. If there is none, the last column that has any mass, and what is left after all of them.
    """
    n: tl.constexpr = mass.shape[1]
    column = tl.arange(0, n)[None, :]
    cumulative = mass
    if n > 1:  # triton 3.6 fails to compile the scan of a single column
        cumulative = tl.cumsum(mass, 1)
    # A scan adds in an order of its own, and may seem to rise at a column of no mass.
    past = (cumulative > target[:, None]) & (mass > 0)
    first = tl.min(tl.where(past, column, n), 1)
    last = tl.max(tl.where(mass > 0, column, 0), 1)
    before = tl.sum(tl.where(column < first[:, None], mass, 0.0), 1)
    return tl.minimum(first, last), target - before, first < n


@triton.jit
def draw_part(part_ptr, size, drawn, num_parts, top, softcap, inverse, target, BLOCK_PARTS: tl.constexpr):
    """The part at ``target`` of the row's mass, and the target that is left in it, relative to the top of the part."""
    picked = tl.full(drawn.shape, 0, tl.int32)
    found = tl.full(drawn.shape, 0, tl.int1)
    for first in range(0, num_parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)[None, :]
        inside = drawn[:, None] & (part < num_parts)
        below = _below_top(part_ptr, part, inside, top, softcap)
        mass = _draw_masses(part_ptr, size, part, inside, below, inverse)
        index, left, here = pick_by_mass(mass, target)
        picked = tl.where(found | (tl.max(mass, 1) == 0), picked, first + index)
        target = tl.where(found, target, left)
        found = found | here
    below = tl.sum(_below_top(part_ptr, picked[:, None], drawn[:, None], top, softcap), 1)
    weight = tl.where(drawn, tl.exp2(below * (inverse * LOG2E)), 1.0)
    # Where rounding leaves no part that exceeds the target, it is the last one of any mass, and the last tile in it.
    return picked, tl.where(found, target / weight, INF)


@triton.jit
def store_statistics(statistics_ptr, num_rows, live, valid, top, second, candidate, mass, moment, inverse):
    """Write logprob, confidence, margin, entropy, logsumexp to [5, rows]: NaN where a live row is not valid.

    top, second, candidate: y of the best token, of the second best and of the one that was chosen.
    """
    mass, moment = tl.where(valid, mass, 1.0), tl.where(valid, moment, 0.0)
    top = top.to(tl.float64)
    log_mass, confidence = tl.log(mass), 1.0 / mass
    results = (
        (candidate.to(tl.float64) - top) * inverse - log_mass,
        confidence,
        # float64 makes up for the digits that 1 - exp loses near a tie
        confidence * (1.0 - tl.exp((second.to(tl.float64) - top) * inverse)),
        tl.maximum(log_mass - moment * confidence * LN2, 0.0),
        top * inverse + log_mass,
    )
    for i in tl.static_range(5):
        result = tl.where(valid, results[i], float("nan")).to(tl.float32)
        tl.store(statistics_ptr + i * num_rows, result, mask=live)
