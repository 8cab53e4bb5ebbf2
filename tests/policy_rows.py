"""One row of a canvas as plain lists, at random or fixed, and as what a rule takes."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from diffusion_runtime import ops
from diffusion_runtime.decoding import Canvas, Decision

# scores that tie often, and lie on both sides of every default threshold and at some of them
PROBABILITIES = [0.0078125, 0.25, 0.5, 0.75, 0.84, 0.85, 0.9, 0.95, 0.96, 0.99, 1.0]
ENTROPIES = [0.0, 0.03125, 0.0625, 0.25, 0.5, 2.0]


class Row:
    """What is known of one row: masked positions and a list for each statistic."""

    def __init__(self, draw) -> None:
        length = draw(st.integers(1, 9))
        self.length = length
        kinds = draw(st.lists(st.sampled_from(["masked", "decided", "given"]), min_size=length, max_size=length))
        self.masked = [i for i, kind in enumerate(kinds) if kind == "masked"]
        self.decided = [i for i, kind in enumerate(kinds) if kind == "decided"]

        def numbers(values) -> list[float]:
            return draw(st.lists(st.sampled_from(values), min_size=length, max_size=length))

        self.probability = [float(np.float32(x)) for x in numbers(PROBABILITIES)]
        self.confidence = numbers(PROBABILITIES)
        self.margin = numbers(PROBABILITIES)
        self.entropy = numbers(ENTROPIES)
        self.committed_at = numbers(PROBABILITIES)
        self.tokens = draw(st.lists(st.integers(0, 2), min_size=length, max_size=length))
        self.candidates = draw(st.lists(st.integers(0, 2), min_size=length, max_size=length))
        self.num_steps = draw(st.integers(1, 12))
        self.index = draw(st.integers(0, self.num_steps - 1))
        self.num_masked = draw(st.integers(len(self.masked), length))
        self.num_mask_free = draw(st.integers(0, 16))


@st.composite
def rows(draw) -> Row:
    return Row(draw)


def canvas_of(row: Row, *, seed: int = 3, step: int = 0) -> Canvas:
    def mask(positions) -> torch.Tensor:
        return torch.tensor([[i in positions for i in range(row.length)]])

    return Canvas(
        tokens=torch.tensor([row.tokens]),
        masked=mask(row.masked),
        editable=mask(row.masked + row.decided),
        position=torch.arange(row.length),
        seed=torch.tensor([[seed]]),
        step=torch.tensor([[step]]),
        index=torch.tensor([row.index]),
        num_steps=torch.tensor([row.num_steps]),
        num_positions=torch.tensor([row.length]),
        num_masked=torch.tensor([row.num_masked]),
        num_mask_free=torch.tensor([row.num_mask_free]),
        confidence=torch.tensor([row.committed_at]),
    )


def samples_of(row: Row) -> ops.TokenSamples:
    token = torch.tensor([row.candidates])
    fields = {
        # as the nearest float32 whose exponential is that probability
        "logprob": torch.tensor([row.probability]).double().log().float(),
        "confidence": torch.tensor([row.confidence]),
        "margin": torch.tensor([row.margin]),
        "entropy": torch.tensor([row.entropy]),
        "token": token,
        "argmax": (token + 1) % 3,
        "logsumexp": torch.zeros(1, row.length),
    }
    row.probability = fields["logprob"].exp()[0].tolist()
    return ops.TokenSamples(**fields)


def chosen(row: Row, rule) -> set[int]:
    decided = rule(samples_of(row), canvas_of(row))
    mask = decided.commit_mask if isinstance(decided, Decision) else decided
    return set(mask[0].nonzero()[:, 0].tolist())


def fixed_row(length: int = 4, **fields) -> Row:
    row = object.__new__(Row)
    row.length = length
    row.masked, row.decided = list(range(length)), []
    row.probability = row.confidence = row.margin = row.committed_at = [0.5] * length
    row.entropy = [0.5] * length
    row.tokens = row.candidates = [0] * length
    row.num_steps, row.index, row.num_masked, row.num_mask_free = length, 0, length, 0
    vars(row).update(fields)
    return row
