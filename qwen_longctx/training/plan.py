"""Which tokens make up which sequence: each at most once an epoch, any sequence found without those before it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

_EPOCHS = 2  # orders that are kept: that of now, and one before or after


def shuffled(count: int, *key: int | str) -> np.ndarray:
    """Numbers below `count` in an order that the key decides, the same with every version of every library.

    Returns
    -------
    numpy.ndarray
        Shape (count,), int64.
    """
    seed = hashlib.blake2b(" ".join(map(str, key)).encode(), digest_size=8).digest()
    with np.errstate(over="ignore"):  # splitmix64, whose arithmetic wraps around
        x = (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x += np.uint64(int.from_bytes(seed, "little"))
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return np.argsort(x, kind="stable")


@dataclass(frozen=True)
class Piece:
    """Tokens from `begin` to `end` of a stretch of text: `number` says which."""

    number: int
    begin: int
    end: int


class _Order:
    """An order of things that changes with the epoch: those of each count shuffled, one count after the other."""

    def __init__(self, counts: tuple[int, ...], *key: int | str) -> None:
        self.counts, self.key = counts, key
        self._kept: dict[int, np.ndarray] = {}

    def __getitem__(self, epoch: int) -> np.ndarray:
        if epoch not in self._kept:
            while len(self._kept) >= _EPOCHS:
                del self._kept[next(iter(self._kept))]
            parts, before = [], 0
            for number, count in enumerate(self.counts):
                parts.append(before + shuffled(count, *self.key, number, epoch))
                before += count
            self._kept[epoch] = np.concatenate(parts)
        return self._kept[epoch]


class TextPlan:
    """Sequences of text: stretches cut to whole sequences, and what is left of them packed.

    A stretch of at least `tokens` gives as many sequences as it fills, from its begin. What remains of it, and shorter
    stretches, follow each other in an order that changes with the epoch, and are cut wherever a sequence is full. So
    each sequence is full, at most one stretch is torn at either end of a packed one, and an epoch leaves out less than
    one sequence of text.

    Parameters
    ----------
    lengths : numpy.ndarray
        Shape (stretches,), int64.
    tokens : int
        Length of a sequence.
    long_first : bool
        In each epoch the sequences that one stretch fills come before the packed ones.
    key : int or str
        Decide the order.
    """

    def __init__(self, lengths: np.ndarray, tokens: int, long_first: bool, *key: int | str) -> None:
        self.tokens, self.lengths = tokens, lengths
        whole = lengths // tokens
        self._whole_ends = np.cumsum(whole)
        self._left = np.flatnonzero(lengths % tokens)
        self._left_lengths = (lengths % tokens)[self._left]
        self.filled = int(whole.sum())
        self.count = self.filled + int(self._left_lengths.sum()) // tokens
        sequences = (self.filled, self.count - self.filled) if long_first else (self.count,)
        self._sequences = _Order(sequences, *key, tokens, "sequences")
        self._remains = _Order((len(self._left),), *key, tokens, "remains")
        self._ends: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))

    def pieces(self, ordinal: int) -> list[Piece]:
        """The pieces of a sequence, `count` of which make an epoch; together they have `tokens`."""
        epoch, place = divmod(ordinal, self.count)
        number = int(self._sequences[epoch][place])
        return self._filled_by_one(number) if number < self.filled else self._packed(number - self.filled, epoch)

    def _filled_by_one(self, number: int) -> list[Piece]:
        stretch = int(np.searchsorted(self._whole_ends, number, side="right"))
        before = int(self._whole_ends[stretch - 1]) if stretch else 0
        begin = (number - before) * self.tokens
        return [Piece(stretch, begin, begin + self.tokens)]

    def _packed(self, number: int, epoch: int) -> list[Piece]:
        order = self._remains[epoch]
        if self._ends[0] != epoch:
            self._ends = (epoch, np.cumsum(self._left_lengths[order]))
        ends = self._ends[1]
        begin, end = number * self.tokens, (number + 1) * self.tokens
        found = []
        for place in range(int(np.searchsorted(ends, begin, side="right")), len(order)):
            left = int(order[place])
            first = int(ends[place]) - int(self._left_lengths[left])
            if first >= end:
                break
            stretch = int(self._left[left])
            base = int(self.lengths[stretch]) - int(self._left_lengths[left]) - first
            found.append(Piece(stretch, base + max(begin, first), base + min(end, int(ends[place]))))
        return found


class WholePlan:
    """Sequences of documents that are never cut: as many as fit, in an order drawn once; sequences then change places.

    Documents longer than a sequence are left out.

    Parameters
    ----------
    numbers : numpy.ndarray
        Shape (documents,), int64: which documents of a store.
    lengths : numpy.ndarray
        Shape (documents,), int64: their tokens.
    tokens : int
        Length of a sequence.
    key : int or str
        Decide the order.
    """

    def __init__(self, numbers: np.ndarray, lengths: np.ndarray, tokens: int, *key: int | str) -> None:
        order = shuffled(len(numbers), *key, tokens)
        order = order[lengths[order] <= tokens]
        self._order = numbers[order]
        self.left_out = len(numbers) - len(order)
        ends = np.cumsum(lengths[order])
        begins = [0]
        while begins[-1] < len(ends):
            used = int(ends[begins[-1] - 1]) if begins[-1] else 0
            begins.append(int(np.searchsorted(ends, used + tokens, side="right")))
        self._begins = begins
        self.count = len(begins) - 1
        self._sequences = _Order((self.count,), *key, tokens, "sequences")

    def documents(self, ordinal: int) -> list[int]:
        """Numbers of the documents of a sequence, `count` of which make an epoch."""
        epoch, place = divmod(ordinal, self.count)
        number = int(self._sequences[epoch][place])
        return self._order[self._begins[number] : self._begins[number + 1]].tolist()


class Stretches:
    """Documents of text, each by itself or related ones joined to one stretch.

    Parameters
    ----------
    numbers : numpy.ndarray
        Shape (documents,), int64: which documents of a store, in its order.
    lengths : numpy.ndarray
        Shape (documents,), int64: their tokens.
    related : numpy.ndarray
        Shape (documents,), int64: those of one number belong together; -1 for none.
    below : int
        Related documents of fewer tokens are joined; 1 joins none.
    """

    def __init__(self, numbers: np.ndarray, lengths: np.ndarray, related: np.ndarray, below: int) -> None:
        joined = (related >= 0) & (lengths < below)
        # by where a stretch begins: a document by itself at its own place, related ones at the first of them
        place = np.arange(len(numbers))
        if joined.any():
            groups, inverse = np.unique(related[joined], return_inverse=True)
            firsts = np.full(len(groups), len(numbers), dtype=np.int64)
            np.minimum.at(firsts, inverse, place[joined])
            place[joined] = firsts[inverse]
        order = np.argsort(place, kind="stable")
        begins = np.flatnonzero(np.diff(place[order], prepend=-1))
        self.documents = numbers[order]
        self.document_ends = np.cumsum(lengths[order])
        self.firsts = np.append(begins, len(order))  # of each stretch, its first document
        self.lengths = np.add.reduceat(lengths[order], begins) if len(order) else lengths

    def parts(self, piece: Piece) -> list[tuple[Piece, bool]]:
        """The parts of a piece, by document of the store, and whether the stretch goes on behind that document."""
        first, last = int(self.firsts[piece.number]), int(self.firsts[piece.number + 1])
        base = int(self.document_ends[first - 1]) if first else 0
        begin, end = base + piece.begin, base + piece.end
        found = []
        for at in range(int(np.searchsorted(self.document_ends, begin, side="right")), last):
            start = int(self.document_ends[at - 1]) if at else 0
            if start >= end:
                break
            stop = min(end, int(self.document_ends[at]))
            part = Piece(int(self.documents[at]), max(begin, start) - start, stop - start)
            found.append((part, at < last - 1))
        return found
