"""Running totals by name, in whole numbers of any size: their order and their batches do not matter."""

from collections import defaultdict
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np

from cappy.annotation.report.columns import Candidates, Flags, Floats, Ints
from cappy.annotation.report.pools import fixed, ratio
from cappy.annotation.report.record import NUM_BINS, Labels

K = TypeVar("K", str, tuple[str, str], tuple[str, str, str])
Key = tuple[str, str, str]
CELLS = NUM_BINS + 2

NO_LABELS = Labels(zero=0, bins=(0,) * NUM_BINS, one=0, mean=None)


class Totals(Generic[K]):
    """Sums of rows of `width` whole numbers, by name."""

    def __init__(self, width: int) -> None:
        self._sums: defaultdict[K, list[int]] = defaultdict(lambda: [0] * width)

    def add(self, names: list[K], index: Ints, rows: Ints) -> None:
        """Adds each row to the name that `index` says."""
        if not len(rows):
            return
        order = np.argsort(index, kind="stable")
        begins = np.flatnonzero(np.append(True, np.diff(index[order]) != 0))
        for name, sums in zip(
            index[order][begins].tolist(), np.add.reduceat(rows[order], begins).tolist(), strict=True
        ):
            self.include(names[name], sums)

    def include(self, name: K, sums: list[int]) -> None:
        """Adds one row to a name."""
        held = self._sums[name]
        held[:] = map(int.__add__, held, sums)

    def items(self) -> list[tuple[K, list[int]]]:
        """Names with their sums, in order of the names."""
        return sorted(self._sums.items())


class LabelTotals:
    """Labels and blank responses by (source, generator, decoding)."""

    def __init__(self) -> None:
        self._totals: Totals[Key] = Totals(CELLS + 2)

    def add(self, candidates: Candidates, blank: Flags) -> None:
        """Counts the candidates; `blank` says which responses are without a word."""
        columns = (candidates.source, candidates.generator, candidates.decoding)
        shape = tuple(max(len(column.values), 1) for column in columns)
        combined = np.ravel_multi_index(tuple(column.index for column in columns), shape)
        found, index = np.unique(combined, return_inverse=True)
        names = [column.names() for column in columns]
        keys = [
            (names[0][source], names[1][generator], names[2][decoding])
            for source, generator, decoding in zip(*np.unravel_index(found, shape), strict=True)
        ]
        cells = np.bincount(index * CELLS + cell(candidates.labels), minlength=len(keys) * CELLS)
        sums = np.zeros((len(keys), 2), dtype=np.int64)
        np.add.at(sums[:, 0], index, fixed(candidates.labels))
        np.add.at(sums[:, 1], index, blank)
        self._totals.add(keys, np.arange(len(keys)), np.hstack([cells.reshape(-1, CELLS), sums]))

    def grouped(self, group: Callable[[Key], K]) -> dict[K, tuple[Labels, int]]:
        """By what `group` makes of their keys: the labels of the candidates, and how many of them are blank."""
        sums: Totals[K] = Totals(CELLS + 2)
        for key, held in self._totals.items():
            sums.include(group(key), held)
        return {name: (_labels(held), held[-1]) for name, held in sums.items()}


def _labels(sums: list[int]) -> Labels:
    zero, *bins, one = sums[:CELLS]
    return Labels(zero=zero, bins=tuple(bins), one=one, mean=ratio(sums[-2], sum(sums[:CELLS])))


def cell(labels: Floats) -> Ints:
    """Where each label is counted: 0 for exact 0, CELLS - 1 for exact 1, else 1 + its bin."""
    inside = 1 + np.minimum((labels * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    return np.where(labels == 0, 0, np.where(labels == 1, CELLS - 1, inside))
