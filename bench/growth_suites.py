"""How times grow: with the vocabulary, the rows, the prefix and the canvas. Each is a curve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from bench import attention_suites, sampling_suites
from bench.check import Truth
from bench.comparison import Comparison
from bench.inputs import backends, noise
from bench.peers import make_peer
from bench.scope import Scope

VOCABULARY = (1_000, 4_000, 16_000, 64_000, 126_464, 262_144)
ROWS = (1, 4, 16, 64, 256)
PREFIX = (256, 1024, 4096, 16_384)
CANVAS = (8, 32, 128, 512)
LAYER = attention_suites.LAYERS[2]


def growth(scope: Scope) -> Iterator[Comparison]:
    """Float32 on a CPU, bfloat16 on a GPU."""
    dtype = torch.bfloat16 if scope.device.type == "cuda" else torch.float32
    for vocab in _points(scope, VOCABULARY):
        yield _sampling(scope, dtype, 64, vocab, "64 rows, by vocabulary", f"{vocab} tokens", vocab)
    for rows in _points(scope, ROWS):
        yield _sampling(scope, dtype, rows, 126_464, "a vocabulary of 126,464, by rows", f"{rows} rows", rows)
    for before in _points(scope, PREFIX):
        yield _attention(scope, dtype, 32, before, "32 queries, by prefix", f"{before} keys", before)
    for length in _points(scope, CANVAS):
        yield _attention(scope, dtype, length, 1024, "behind 1,024 keys, by canvas", f"{length} queries", length)


def _points(scope: Scope, points: Sequence[int]) -> Sequence[int]:
    return points[::2] if scope.level == "quick" else points


def _sampling(scope: Scope, dtype: torch.dtype, rows: int, vocab: int, curve: str, case: str, at: float) -> Comparison:
    logits = noise(rows, vocab, scope.device, dtype, scale=2.5)
    ours = {
        name: partial(sampling_suites.ours, logits, 1.0, name)
        for name in backends("sample_tokens", scope.device, dtype)[:1]
    }
    peers = {"eager torch": partial(make_peer("eager torch", 1.0, scope.device), logits)}
    check = partial(sampling_suites.check, ours, peers, Truth(logits, 1.0))
    return Comparison(f"Growth of sample_tokens: {curve}", case, ours, peers, check, at=at)


def _attention(
    scope: Scope, dtype: torch.dtype, length: int, before: int, curve: str, case: str, at: float
) -> Comparison:
    found = attention_suites.behind_prefix(scope.device, dtype, LAYER, length, before)
    ours = dict(list(found.ours.items())[:1])
    peers = {"cat + SDPA": found.peers["cat + SDPA"]}
    return Comparison(f"Growth of attention, {LAYER.name}: {curve}", case, ours, peers, found.check, at=at)
