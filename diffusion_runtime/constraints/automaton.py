"""A finite automaton whose letters are tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Numbers = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Automaton:
    """States and the tokens that lead from one to another; a text is a path from the start to an accepting state.

    An edge stands for all tokens between two states. Make one with :func:`diffusion_runtime.constraints.regex`,
    :func:`~diffusion_runtime.constraints.json_schema` or :meth:`of_bytes`.
    """

    vocab_size: int
    start: int
    accepting: Bools  # [states]
    source: Numbers  # [edges], a state
    target: Numbers  # [edges], a state
    edge_set: Numbers  # [edges], a row of sets
    sets: Numbers  # [sets, words] tokens, packed as ops.pack_allowed does

    @classmethod
    def of_bytes(cls, table: Numbers, start: int, accepting: Bools, vocabulary: Sequence[bytes | None]) -> Automaton:
        """From an automaton over bytes.

        Args:
            table: ``[states, 256]``, the state behind a state and a byte, or -1.
            start: where a text begins.
            accepting: ``[states]``, where it may end.
            vocabulary: the bytes of each token; None or empty for a token that is in no text.
        """
        walk = _Walk(table, vocabulary)
        sources, targets, edge_sets = [], [], []
        known: dict[bytes, int] = {}
        for state in range(len(table)):
            tokens, ends = walk.from_state(state)
            for target in np.unique(ends):
                packed = pack_tokens(tokens[ends == target], len(vocabulary))
                sources.append(state)
                targets.append(target)
                edge_sets.append(known.setdefault(packed.tobytes(), len(known)))
        sets = np.frombuffer(b"".join(known), np.int32).reshape(len(known), -(-len(vocabulary) // 32))
        source, target, edge_set = (np.array(column, np.int32) for column in (sources, targets, edge_sets))
        return cls(len(vocabulary), start, accepting, source, target, edge_set, sets)

    def with_end(self, tokens: Collection[int]) -> Automaton:
        """Texts that may be followed by one of these tokens, which then are all that follows."""
        inside = [token for token in tokens if token < self.vocab_size]
        if not inside:
            return self
        ended, new_set = len(self.accepting), len(self.sets)
        final = np.append(np.flatnonzero(self.accepting), ended).astype(np.int32)
        return replace(
            self,
            accepting=np.append(self.accepting, True),
            source=np.append(self.source, final),
            target=np.append(self.target, np.full_like(final, ended)),
            edge_set=np.append(self.edge_set, np.full_like(final, new_set)),
            sets=np.concatenate((self.sets, pack_tokens(np.array(inside), self.vocab_size)[None])),
        )

    def edges_of(self, token: int) -> Bools:
        """``[edges]``: those that it is on."""
        if not 0 <= token < self.vocab_size:
            return np.zeros(len(self.source), np.bool_)
        on: Bools = (self.sets[:, token // 32] >> (token % 32) & 1).astype(np.bool_)[self.edge_set]
        return on

    def edges_within(self, words: Numbers) -> Bools:
        """``[edges]``: those with a token of a packed set."""
        shared: Bools = np.logical_or.reduce(self.sets & words, axis=1)
        return shared[self.edge_set]


class _Walk:
    """All tokens of a vocabulary, walked through an automaton at once."""

    def __init__(self, table: Numbers, vocabulary: Sequence[bytes | None]) -> None:
        self.table = table
        self.tokens = np.array([i for i, text in enumerate(vocabulary) if text], np.int64)
        texts = [text for text in vocabulary if text]
        self.lengths = np.array([len(text) for text in texts], np.int64)
        longest = int(self.lengths.max(initial=1))
        self.bytes = np.frombuffer(b"".join(t.ljust(longest, b"\0") for t in texts), np.uint8).reshape(-1, longest)

    def from_state(self, state: int) -> tuple[NDArray[np.int64], Numbers]:
        """The tokens that do not fail, and where each leads."""
        alive = np.arange(len(self.tokens))
        at = np.full(len(alive), state, np.int32)
        done, ends = [], []
        for place in range(self.bytes.shape[1]):
            at = self.table[at, self.bytes[alive, place]]
            alive, at = alive[at >= 0], at[at >= 0]
            over = self.lengths[alive] == place + 1
            done.append(self.tokens[alive[over]])
            ends.append(at[over])
            alive, at = alive[~over], at[~over]
            if not len(alive):
                break
        return np.concatenate(done), np.concatenate(ends)


def pack_tokens(tokens: NDArray[np.int64], vocab_size: int) -> Numbers:
    """A set of tokens: ``[ceil(vocab_size / 32)]`` int32, where token ``t`` is bit ``t % 32`` of word ``t // 32``."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.bool_)
    bits[tokens] = True
    words: Numbers = np.packbits(bits, bitorder="little").view(np.dtype("<i4")).astype(np.int32)
    return words
