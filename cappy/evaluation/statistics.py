"""Intervals by the bootstrap over groups: instances of one group are drawn together, as they were made together."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv

from cappy.evaluation.findings import Difference, Estimate, Power

Matrix = npt.NDArray[np.float64]

LEVEL = 0.95
SHOWN_WITH = 2.8
"""Standard errors of a difference that a two-sided 5% test finds with a probability of 80%: 1.96 + 0.84."""
_CHUNK_DRAWS = 1_000_000
_STILL = 1e-12
"""A variance of resampled means below this is none."""


def resampled_means(values: Matrix, groups: Sequence[str], *, resamples: int, seed: int) -> Matrix:
    """Means of the columns of `values` (instances, columns) in each resample, shape (resamples, columns).

    A resample draws as many groups as there are, with replacement, and every instance of a drawn group as often as the
    group was drawn (Efron and Tibshirani, 1993, §8.6). All columns see the same draws, so their differences are paired.
    """
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    sizes = np.bincount(index).astype(np.float64)
    sums = np.zeros((len(sizes), values.shape[1]))
    np.add.at(sums, index, values)
    parts = [counts @ sums / (counts @ sizes)[:, None] for counts in _counts(len(sizes), resamples, seed)]
    return np.concatenate(parts)


def estimate(mean: float, samples: Matrix) -> Estimate:
    """A mean with the percentile interval of its resampled values."""
    low, high = _percentiles(samples)
    return Estimate(mean=float(mean), low=low, high=high)


def share(good: Matrix, groups: Sequence[str], *, resamples: int, seed: int) -> Estimate:
    """The share of ones among zeros and ones, shape (instances,), with an interval that is not too narrow near 0 and 1.

    It is Clopper and Pearson's (1934) for as many instances as would vary as much, drawn one by one, as the share does
    over resampled groups, but for no more than there are (Korn and Graubard, 1998). Where all are alike, resamples say
    nothing of how alike a group is, and each group counts as one.
    """
    mean, count = float(good.mean()), float(len(set(groups)))
    variance = float(resampled_means(good[:, None], groups, resamples=resamples, seed=seed).var())
    if variance > _STILL:
        count = min(float(len(good)), mean * (1 - mean) / variance)
    ones, zeros, tail = mean * count, (1 - mean) * count, (1 - LEVEL) / 2
    low = float(betaincinv(ones, zeros + 1, tail)) if ones else 0.0
    high = float(betaincinv(ones + 1, zeros, 1 - tail)) if zeros else 1.0
    return Estimate(mean=mean, low=low, high=high)


def compare(mean: float, other: float, samples: Matrix, others: Matrix) -> Difference:
    """The paired difference of two means, and the share of resamples in which it is above 0 (a tie counts half)."""
    differences = samples - others
    low, high = _percentiles(differences)
    above = np.mean(differences > 0) + np.mean(differences == 0) / 2
    return Difference(difference=float(mean - other), low=low, high=high, probability=float(above))


def power(difference: float, samples: Matrix, others: Matrix, groups: int) -> Power:
    """The smallest difference that so many groups show, and how many would show `difference`.

    The standard error is that of the resampled differences; it falls with the root of the number of groups.
    """
    smallest = SHOWN_WITH * float(np.std(samples - others))
    needed = math.ceil(groups * (smallest / difference) ** 2) if abs(difference) > 1e-9 else None
    return Power(groups=groups, smallest=smallest, groups_needed=needed)


def p_value(difference: Difference, resamples: float) -> float:
    """The two-sided p-value of a difference of 0, at least that of one resample in all; of infinitely many, any."""
    tail = min(difference.probability, 1 - difference.probability)
    return min(1.0, 2 * max(tail, 1 / resamples))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """The p-values adjusted for that many comparisons by Holm's step-down method (Holm, 1979), in the same order."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, p_values[name] * (len(p_values) - rank)))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def _percentiles(samples: Matrix) -> tuple[float, float]:
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _counts(num_groups: int, resamples: int, seed: int) -> Iterator[Matrix]:
    """How often each resample draws each group, some resamples at a time so that memory stays small."""
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK_DRAWS // num_groups)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        drawn = rng.integers(num_groups, size=(size, num_groups)) + num_groups * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * num_groups)
        yield counts.reshape(size, num_groups).astype(np.float64)
