"""An answer on its way: which tokens may still be decided at each position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffusion_runtime.constraints.automaton import Automaton, Bools, Numbers


class Progress:
    """The positions that a constraint covers, and what is decided there.

    For every position it knows the states that what lies before can lead to, and those from which what lies behind can
    be accepted; a token may be decided where it leads from one of the former to one of the latter. Both are sets, so
    that tokens can be decided in any order.

    Args:
        automaton: with its end, if the answer may stop early.
        tokens: of the positions; the mask token where undecided.
        mask_token_id: that token.
        filters: ``[positions, words]`` int32: for each position a packed set of tokens that may be decided there.

    Raises:
        ValueError: there is no way to decide what is undecided.
    """

    def __init__(self, automaton: Automaton, tokens: Sequence[int], mask_token_id: int, filters: Numbers) -> None:
        self.automaton = automaton
        self.undecided = [token == mask_token_id for token in tokens]
        self._filters = filters
        kinds, kind = np.unique(filters, axis=0, return_inverse=True)  # most positions have the same
        within = [automaton.edges_within(words) for words in kinds]
        self._usable = [  # [edges] for each position
            within[k] if token == mask_token_id else automaton.edges_of(token)
            for token, k in zip(tokens, kind.tolist(), strict=True)
        ]
        shape = (len(tokens) + 1, len(automaton.accepting))
        self._before, self._behind = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
        self._before[0, automaton.start] = True
        self._behind[-1] = automaton.accepting
        self._forward(0)
        self._backward(len(tokens) - 1)
        if not self._behind[0, automaton.start]:
            decided = sum(token != mask_token_id for token in tokens)
            raise ValueError(
                f"no text of the constraint fits {len(tokens)} positions, of which {decided} are decided; an answer "
                "that may be shorter needs stop_token_ids"
            )

    def words(self, place: int) -> Numbers:
        """The tokens that may be decided at an undecided position: packed, ``[words]`` int32."""
        sets = np.unique(self.automaton.edge_set[self._live(place)])
        words: Numbers = np.bitwise_or.reduce(self.automaton.sets[sets], axis=0) & self._filters[place]
        return words

    def decide(self, place: int, token: int) -> bool:
        """Decide a position, if what is undecided can still be decided afterwards; whether it could."""
        on, words = self.automaton.edges_of(token), self._filters[place]
        if not (self._live(place) & on).any() or not words[token // 32] >> (token % 32) & 1:
            return False
        self._usable[place] = on
        self.undecided[place] = False
        self._forward(place)
        self._backward(place)
        return True

    def _live(self, place: int) -> Bools:
        """``[edges]``: those that a text can take here."""
        a = self.automaton
        live: Bools = self._usable[place] & self._before[place][a.source] & self._behind[place + 1][a.target]
        return live

    def _forward(self, place: int) -> None:
        """What lies behind a position that has changed can be reached from fewer states."""
        a = self.automaton
        for i in range(place, len(self._usable)):
            reached = np.zeros_like(self._before[i])
            reached[a.target[self._usable[i] & self._before[i][a.source]]] = True
            if (reached == self._before[i + 1]).all():
                return
            self._before[i + 1] = reached

    def _backward(self, place: int) -> None:
        a = self.automaton
        for i in range(place, -1, -1):
            leading = np.zeros_like(self._behind[i])
            leading[a.source[self._usable[i] & self._behind[i + 1][a.target]]] = True
            if (leading == self._behind[i]).all():
                return
            self._behind[i] = leading


def judge(progress: Progress, places: Sequence[int], tokens: Sequence[int], confidence: Sequence[float]) -> list[bool]:
    """Decide what a step wants to commit, the surest first, and leave out what no longer fits; ties go to the left.

    Args:
        progress: of the row; what is accepted is decided there.
        places: in the constraint's positions, from the left.
        tokens: their candidates.
        confidence: of each.

    Returns:
        what was accepted: at least one, if each candidate is one of :meth:`Progress.words`.
    """
    accepted = [False] * len(places)
    for i in sorted(range(len(places)), key=lambda i: (-confidence[i], i)):
        accepted[i] = progress.decide(places[i], tokens[i])
    return accepted
