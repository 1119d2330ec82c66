"""Static shapes: XLA compiles one program per shape, so every batch is padded to one of a few.

Lengths double from 32 up to the scorer's own; for each there are two row counts, a full batch and a quarter of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cappy.scoring.encoding import Encoded
from cappy.training.feed import Group, micro_batches

SHORTEST = 32


class Tokens(NamedTuple):
    """Right-padded pairs: ids and types (rows, length), and how many tokens of each row count (rows,), at least 1."""

    ids: Any
    types: Any
    lengths: Any


class Rows(NamedTuple):
    """Pairs of whole instances to train on.

    labels (rows,); groups (rows,), the instance's number in this batch, padding rows having the last number of all;
    numbers (rows,), the pair's number in the whole update, which its dropout depends on.
    """

    tokens: Tokens
    labels: Any
    groups: Any
    numbers: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """The shapes that batches are padded to.

    `tokens` bounds a full batch's padded tokens, all devices together, unless one instance alone is longer. No batch
    has more than `largest` rows for one instance and `most` for one update.
    """

    max_length: int
    tokens: int
    largest: int
    most: int
    devices: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """Ascending; the last is the longest pair that the scorer reads."""
        doubled = [SHORTEST]
        while doubled[-1] * 2 < self.max_length:
            doubled.append(doubled[-1] * 2)
        return (*(length for length in doubled if length < self.max_length), self.max_length)

    def length_of(self, tokens: int) -> int:
        """The length that a pair of so many tokens is padded to."""
        return next(length for length in self.lengths if length >= tokens)

    def full(self, length: int) -> int:
        """Rows of a full batch: a multiple of the devices, so that each has as many."""
        return self._shared(min(max(self.tokens // length, self.largest), self.most))

    def rows_of(self, pairs: int, length: int) -> int:
        """The row count that so many pairs of this length are padded to."""
        quarter = self._shared(-(-self.full(length) // 4))
        return quarter if pairs <= quarter else self.full(length)

    @property
    def all(self) -> frozenset[tuple[int, int]]:
        """Every (rows, length) that can occur: the bound on what XLA compiles for one function."""
        return frozenset(
            (self.rows_of(pairs, length), length) for length in self.lengths for pairs in (1, self.full(length))
        )

    def _shared(self, rows: int) -> int:
        return -(-rows // self.devices) * self.devices


def update_batches(
    batch: Sequence[Group], encoded: Sequence[Sequence[Encoded]], shapes: Shapes, *, pad: int, most_groups: int
) -> Iterator[Rows]:
    """The instances of one update as batches of whole instances, which hold each once; `encoded` are their pairs.

    `most_groups` is the number of padding rows' group, at least the instances of an update.
    """
    padded = [[shapes.length_of(len(pair.ids)) for pair in pairs] for pairs in encoded]
    first = np.cumsum([0, *(len(pairs) for pairs in encoded)])
    for micro in micro_batches(batch, padded, shapes.tokens):
        pairs = [pair for index in micro for pair in encoded[index]]
        length = max(max(padded[index]) for index in micro)
        rows = shapes.rows_of(len(pairs), length)
        yield Rows(
            tokens=collate(pairs, rows, length, pad=pad),
            labels=_filled([label for index in micro for label in batch[index].labels], rows, 0.0, np.float32),
            groups=_filled(
                [place for place, index in enumerate(micro) for _ in encoded[index]], rows, most_groups, np.int32
            ),
            numbers=_filled(
                [first[index] + i for index in micro for i in range(len(encoded[index]))], rows, first[-1], np.int32
            ),
        )


def score_batches(encoded: Sequence[Encoded], shapes: Shapes, *, pad: int) -> Iterator[tuple[list[int], Tokens]]:
    """Each pair once, longest first, with the indices of the pairs that the first rows of each batch hold."""
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index].ids))
    while order:
        length = shapes.length_of(len(encoded[order[0]].ids))
        chosen, order = order[: shapes.full(length)], order[shapes.full(length) :]
        rows = shapes.rows_of(len(chosen), length)
        yield chosen, collate([encoded[index] for index in chosen], rows, length, pad=pad)


def collate(pairs: Sequence[Encoded], rows: int, length: int, *, pad: int) -> Tokens:
    """The pairs in the first rows; a padding row is one padding token, so that its softmax has something to see."""
    ids = np.full((rows, length), pad, np.int32)
    types = np.zeros((rows, length), np.int32)
    lengths = np.ones(rows, np.int32)
    for row, pair in enumerate(pairs):
        size = len(pair.ids)
        ids[row, :size], types[row, :size], lengths[row] = pair.ids, pair.types, size
    return Tokens(ids, types, lengths)


def _filled(values: Sequence[Any], rows: int, filler: float, dtype: Any) -> NDArray[Any]:
    array = np.full(rows, filler, dtype)
    array[: len(values)] = values
    return array
