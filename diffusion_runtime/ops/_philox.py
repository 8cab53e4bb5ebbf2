"""Philox4x32-10 (Salmon et al., SC 2011) in torch integers: the random numbers that every backend shares.

A draw is keyed by its logical place alone: key = the 64-bit seed of the request, counter = (position in the
sequence, denoising step, kind of draw, 0). The same definition in C++ is ``csrc/include/philox.h``.
"""

from __future__ import annotations

import torch
from torch import Tensor

DRAW_TOKEN = 0
DRAW_ORDER = 1
DRAW_NOISE = 2

_LOW = 0xFFFFFFFF


def philox_uniforms(seed: Tensor | int, position: Tensor | int, step: Tensor | int, kind: int) -> tuple[Tensor, Tensor]:
    """Two independent numbers in [0, 1) for each place, multiples of ``2 ** -53``.

    Args:
        seed: int64, read as 64 unsigned bits.
        position: int64; its low 32 bits count.
        step: int64; its low 32 bits count.
        kind: what the draw is for: ``DRAW_TOKEN``, ``DRAW_ORDER``, ``DRAW_NOISE``. Kinds are independent of each other.

    Returns:
        two float64 tensors of the broadcast shape of the arguments.
    """
    device = next((x.device for x in (seed, position, step) if isinstance(x, Tensor)), None)
    key, c0, c1 = torch.broadcast_tensors(
        *(torch.as_tensor(x, dtype=torch.int64, device=device) for x in (seed, position, step))
    )
    zero = torch.zeros_like(c0)
    words = philox_words((c0 & _LOW, c1 & _LOW, zero + kind, zero), (key & _LOW, key >> 32 & _LOW))
    return _uniform(*words[:2]), _uniform(*words[2:])


def philox_words(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds on four 32-bit counter words and two key words, all int64 tensors in [0, 2^32) of one shape."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        # the product of two 32-bit words wraps in int64, but its 64 bits are right; >> 32 needs the mask for the sign
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & _LOW) ^ c1 ^ k0, b & _LOW, (a >> 32 & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    return c0, c1, c2, c3


def _uniform(low: Tensor, high: Tensor) -> Tensor:
    return (high << 21 | low >> 11).double() * 2.0**-53
