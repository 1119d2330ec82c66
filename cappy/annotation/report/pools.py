"""What a selector finds in each instance of a batch: one row of whole numbers per instance, ready to be added up."""

from typing import Any

import numpy as np

from cappy.annotation.report.columns import Candidates, Flags, Floats, Ints
from cappy.annotation.report.record import Pools

SCALE = 2**40
"""Fractions are added as whole multiples of 1 / SCALE, so that sums do not depend on how rows came in batches."""
COUNTS = ("instances", "candidates", "selectable", "distinct", "pools", "comparable")
OVER_POOLS = ("random", "oracle", "no_signal", "best_shared", "effective")
NUM_COLUMNS = len(COUNTS) + len(OVER_POOLS) + 1


def fixed(values: Floats) -> Ints:
    """Values as whole multiples of 1 / SCALE; each is rounded by itself, by 5e-13 at most."""
    return np.rint(values * SCALE).astype(np.int64)


def measured(candidates: Candidates) -> Ints:
    """One row per instance: the fields of `Pools`, COUNTS, then OVER_POOLS, then ties, fractions as `fixed`."""
    chosen = candidates.selectable
    owner, labels, rows = candidates.owner[chosen], candidates.labels[chosen], candidates.rows
    first, times = _distinct(owner, candidates.response.index[chosen], len(candidates.response.values))
    size, distinct = _count(owner, rows), _count(owner[first], rows)
    some, comparable = size > 0, distinct >= 2
    mean = np.bincount(owner, weights=labels, minlength=rows) / np.maximum(size, 1)
    highest, lowest = _per_row(np.maximum, labels, size), _per_row(np.minimum, labels, size)
    tied = _tied_pairs(owner[first], labels[first], rows) / np.maximum(distinct * (distinct - 1) // 2, 1)
    return np.column_stack(
        [
            np.ones(rows, dtype=np.int64),
            _count(candidates.owner, rows),
            size,
            distinct,
            some,
            comparable,
            fixed(mean),
            fixed(highest),
            fixed((some & (highest == lowest)).astype(np.float64)),
            fixed(_best_shared(owner[first], labels[first], distinct).astype(np.float64)),
            fixed(_effective(owner[first], times, size)),
            fixed(np.where(comparable, tied, 0.0)),
        ]
    )


def pools(sums: list[int]) -> Pools:
    """The sums of many rows of `measured` as counts and means."""
    values: dict[str, Any] = dict(zip(COUNTS, sums, strict=False))
    for name, total in zip(OVER_POOLS, sums[len(COUNTS) :], strict=False):
        values[name] = ratio(total, values["pools"])
    return Pools(**values, ties=ratio(sums[-1], values["comparable"]))


def ratio(total: int, count: int) -> float | None:
    """The mean of `count` fractions that were added as `fixed`; None of none."""
    return total / (SCALE * count) if count else None


def _distinct(owner: Ints, text: Ints, num_texts: int) -> tuple[Ints, Ints]:
    """Where each text stands first in its instance, ascending, and how often it stands there."""
    _, first, times = np.unique(owner * num_texts + text, return_index=True, return_counts=True)
    order = np.argsort(first)
    return first[order], times[order]


def _count(owner: Ints, rows: int) -> Ints:
    return np.bincount(owner, minlength=rows)


def _per_row(extreme: np.ufunc, values: Floats, size: Ints) -> Floats:
    """The extreme of each instance's values; 0 where it has none."""
    result = np.zeros(len(size))
    some = size > 0
    if some.any():
        result[some] = extreme.reduceat(values, (np.cumsum(size) - size)[some])
    return result


def _best_shared(owner: Ints, labels: Floats, distinct: Ints) -> Flags:
    best = _per_row(np.maximum, labels, distinct)
    flags: Flags = _count(owner[labels == best[owner]], len(distinct)) >= 2
    return flags


def _tied_pairs(owner: Ints, labels: Floats, rows: int) -> Floats:
    """Pairs of an instance's distinct responses with equal labels."""
    order = np.lexsort((labels, owner))
    owner, labels = owner[order], labels[order]
    begins = np.flatnonzero(np.append(True, (owner[1:] != owner[:-1]) | (labels[1:] != labels[:-1]))[: len(owner)])
    run = np.diff(np.append(begins, len(owner)))
    pairs: Floats = np.bincount(owner[begins], weights=run * (run - 1) / 2, minlength=rows).astype(np.float64)
    return pairs


def _effective(owner: Ints, times: Ints, size: Ints) -> Floats:
    """exp of the entropy of an instance's responses: n / exp(mean of log c), c being how often each one stands.

    The sum goes in the order of the instance, so that its last bit does not depend on the batch.
    """
    known = np.bincount(owner, weights=times * np.log(times), minlength=len(size))
    effective: Floats = size / np.exp(known / np.maximum(size, 1))
    return effective
