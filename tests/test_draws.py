"""The random numbers, and that draws follow the distribution they claim to follow."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from backends import assert_same_tokens, sample_tokens

from diffusion_runtime import ops
from diffusion_runtime.ops._philox import philox_words


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers published with Random123 (Salmon et al.)
        ("00000000" * 4, "00000000" * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff" * 4, "ffffffff" * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a8885a308d313198a2e03707344", "a4093822299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, words):
    def split(text: str) -> tuple[torch.Tensor, ...]:
        return tuple(torch.tensor(int(text[i : i + 8], 16)) for i in range(0, len(text), 8))

    got = philox_words(split(counter), split(key))
    assert [f"{int(word):08x}" for word in got] == words.split()


def test_uniforms_are_uniform_and_independent():
    first, second = ops.philox_uniforms(11, torch.arange(1_000_000), 5, ops.DRAW_TOKEN)
    other, _ = ops.philox_uniforms(11, torch.arange(1_000_000), 5, ops.DRAW_ORDER)
    for u in (first, second, other):
        assert u.min() >= 0
        assert u.max() < 1
        counts = np.histogram(u.numpy(), bins=256, range=(0, 1))[0]
        assert abs(z_score(counts, np.full(256, 1_000_000 / 256))) < 4
    for a, b in ((first, second), (first, other), (first[1:], first[:-1])):
        assert abs(float(np.corrcoef(a, b)[0, 1])) < 4e-3


def z_score(counts: np.ndarray, expected: np.ndarray) -> float:
    """Of the chi-square statistic; cells are merged, rarest first, until each expects at least 10."""
    order = np.argsort(expected)
    counts, expected = counts[order].astype(np.float64), expected[order]
    cell = np.minimum(np.floor(np.cumsum(expected) / 10), np.arange(len(expected)))
    cell = np.unique(cell, return_inverse=True)[1]
    counts, expected = np.bincount(cell, counts), np.bincount(cell, expected)
    freedom = len(counts) - 1
    return ((counts - expected) ** 2 / expected).sum().item() / math.sqrt(2 * freedom) - math.sqrt(freedom / 2)


@pytest.mark.parametrize(
    ("backend", "vocab", "draws", "temperature"),
    [
        ("cpp", 512, 1_000_000, 1.0),
        ("cpp", 4096, 300_000, 0.7),
        ("cpp", 50_000, 200_000, 1.0),
        ("cpp-avx2", 4096, 200_000, 1.0),
        ("cpp-portable", 512, 200_000, 1.0),
        ("reference", 512, 20_000, 1.0),
        ("triton", 200, 4_000, 1.0),
        pytest.param("triton", 50_000, 200_000, 1.0, marks=pytest.mark.gpu),
        pytest.param("cuda", 512, 1_000_000, 1.0, marks=pytest.mark.gpu),
        pytest.param("cuda", 50_000, 200_000, 0.7, marks=pytest.mark.gpu),
    ],
)
def test_draws_follow_the_softmax(backend, vocab, draws, temperature):
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    logits[vocab // 4 : vocab // 3] = -math.inf
    # one row, repeated without being copied: only the position differs
    samples = sample_tokens(logits.expand(draws, vocab), temperature=temperature, seed=99, backend=backend)
    counts = torch.bincount(samples.token, minlength=vocab).numpy()
    probability = (logits.double() / temperature).softmax(-1).numpy()
    assert counts[probability == 0].sum() == 0
    z = z_score(counts[probability > 0], probability[probability > 0] * draws)
    assert abs(z) < 4, f"chi-square z {z:.2f}"


def test_cpp_and_triton_draw_the_same_tokens():
    logits = torch.randn(2_000, 300) * 3
    settings = {"temperature": 0.9, "seed": 2024}
    cpp = sample_tokens(logits, backend="cpp", **settings)
    triton = sample_tokens(logits, backend="triton", **settings)
    assert torch.equal(cpp.argmax, triton.argmax)
    assert_same_tokens(triton.token, cpp.token, logits, 0.9, 2024)


def test_a_draw_by_hand():
    """Ten lines of numpy reproduce a draw, from the key to the token."""
    logits, seed, position, step, temperature = np.linspace(-4, 4, 1000), 77, 12, 3, 0.8
    c, k = [position, step, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    u, v = ((c[1] << 32 | c[0]) >> 11) * 2.0**-53, ((c[3] << 32 | c[2]) >> 11) * 2.0**-53
    weight = np.pad(np.exp((logits - logits.max()) / temperature), (0, 24)).reshape(-1, 128)
    mass = weight.sum(1).cumsum()
    tile = int((mass > u * mass[-1]).argmax())
    inside = weight[tile].cumsum()
    token = 128 * tile + int((inside > v * inside[-1]).argmax())

    settings = {"temperature": temperature, "seed": seed, "position": torch.tensor(position), "step": step}
    for backend in ("reference", "cpp"):
        assert sample_tokens(torch.tensor(logits).float(), backend=backend, **settings).token.item() == token
