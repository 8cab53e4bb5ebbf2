"""The baseline of the table: an n-gram model of the same tokens, read from both sides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Row = np.ndarray


class NGram:
    """Interpolated n-grams with absolute discounting (Ney, Essen and Kneser, 1994).

    Args:
        stream: the training tokens.
        vocab: at most 4,096, so that five tokens fit a number of 64 bits.
        order: tokens of the longest n-gram, at most 5.
    """

    def __init__(self, stream: Row, vocab: int, order: int = 5, discount: float = 0.75) -> None:
        self.vocab, self.order, self.discount = vocab, order, discount
        self._grams: list[tuple[Row, Row]] = []  # of each size: sorted n-grams as numbers, and their counts
        number = np.zeros(len(stream), np.int64)
        for size in range(1, order + 1):
            number = number[: len(stream) - size + 1] * vocab + stream[size - 1 :]
            self._grams.append(np.unique(number, return_counts=True))
        self.unigram = np.full(vocab, 1.0)
        self.unigram[self._grams[0][0]] += self._grams[0][1]
        self.unigram /= self.unigram.sum()

    def probabilities(self, context: Sequence[int]) -> Row:
        """Of each token behind ``context``, of which the last ``order - 1`` tokens count: ``[vocab]``."""
        mixed = self.unigram
        context = list(context)[max(0, len(context) - self.order + 1) :]
        for size in range(1, len(context) + 1):
            number = 0
            for token in context[-size:]:
                number = number * self.vocab + token
            grams, counts = self._grams[size]
            first, last = np.searchsorted(grams, (number * self.vocab, (number + 1) * self.vocab))
            if first == last:
                break
            seen, times = grams[first:last] - number * self.vocab, counts[first:last]
            total = times.sum()
            mixed = mixed * (self.discount * len(seen) / total)
            mixed[seen] += (times - self.discount) / total
        return mixed


class TwoSided:
    """Tokens between others: ``p(token | left) p(token | right) / p(token)``."""

    def __init__(self, stream: Row, vocab: int) -> None:
        self.forward, self.backward = NGram(stream, vocab), NGram(stream[::-1], vocab)

    def fill(self, tokens: Sequence[int], hidden: Sequence[bool]) -> list[int]:
        """Each hidden token by what is known beside it, from the left; what was filled in counts as known."""
        out, n = list(tokens), self.forward.order - 1
        for i in range(len(out)):
            if hidden[i]:
                stop = next((j for j in range(i + 1, min(len(out), i + 1 + n)) if hidden[j]), min(len(out), i + 1 + n))
                right = out[i + 1 : stop][::-1]
                score = self.forward.probabilities(out[max(0, i - n) : i]) * self.backward.probabilities(right)
                out[i] = int((score / self.forward.unigram).argmax())
        return out

    def between(self, left: Sequence[int], count: int, right: Sequence[int], beam: int = 16) -> list[int]:
        """The most probable ``count`` tokens between two texts, by a beam search from the left."""
        n = self.forward.order - 1
        beams: list[tuple[float, list[int]]] = [(0.0, list(left[-n:]))]
        for _ in range(count):
            grown = []
            for score, tokens in beams:
                logs = np.log(self.forward.probabilities(tokens[-n:]))
                best = np.argpartition(-logs, beam)[:beam]
                grown += [(score + float(logs[token]), [*tokens, int(token)]) for token in best]
            beams = sorted(grown, reverse=True)[:beam]

        def with_right(item: tuple[float, list[int]]) -> float:
            score, tokens = item
            for token in right[:n]:
                score += float(np.log(self.forward.probabilities(tokens[-n:])[token]))
                tokens = [*tokens, token]
            return score

        return max(beams, key=with_right)[1][-count:]
