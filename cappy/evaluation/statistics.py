"""Confidence intervals, tests and power over groups.

Instances of one group come from one row of the source and are dependent, so the sampling unit is the group, not
the instance. At each end, the interval of a mean is the wider one of two:

- Student's t with the standard error of the delete-one-group jackknife (Efron and Tibshirani, 1993, §11), whose
  degrees of freedom are Kish's effective number of groups minus one (Kish, 1965, §11.7), which accounts for groups of
  different sizes;
- the same after Hall's cubic transformation, which removes the skewness of a t statistic (Hall, 1992, "On the removal
  of skewness by transformation").

`benchmarks/intervals.py` compares this interval with the percentile bootstrap, the studentised bootstrap and BCa. With
each of those, at 30 groups, the promotion check (`cappy.registry.gate`) would too often promote a scorer that is not
better, for symmetric or for skewed differences. The method is deterministic and needs no seed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv, stdtr, stdtrit

from cappy.evaluation.findings import LEVEL, Difference, MeanEstimate, Power

Matrix = npt.NDArray[np.float64]

POWER = 0.8
_TOLERANCE = 1e-12
"""A mean, standard error or skewness below this counts as 0: it is a rounding error of sums."""


@dataclass(frozen=True, kw_only=True)
class MeanStatistics:
    """The values from which the interval of a mean is computed, besides the mean itself.

    `standard_error` is infinite for a single group. `skewness` is that of the mean: the skewness of the groups divided
    by the square root of their number.
    """

    standard_error: float
    skewness: float
    degrees_of_freedom: float


def compute_mean_statistics(values: Matrix, groups: Sequence[str]) -> list[MeanStatistics]:
    """The statistics of the mean of each column of `values`, shape (instances, columns)."""
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    sizes = np.bincount(index).astype(np.float64)
    count, total = len(sizes), float(len(index))
    if count < 2:
        return [MeanStatistics(standard_error=math.inf, skewness=0.0, degrees_of_freedom=1.0)] * values.shape[1]
    sums = np.zeros((count, values.shape[1]))
    np.add.at(sums, index, values)
    total_sum = sums.sum(axis=0)
    means_without = (total_sum - sums) / (total - sizes)[:, None]
    # (count - 1) times the change when a group is left out; for groups of one instance it is the instance's deviation.
    influence = (count - 1) * (total_sum / total - means_without)
    errors = np.sqrt((influence**2).sum(axis=0) / (count * (count - 1)))
    errors[errors < _TOLERANCE] = 0.0
    deviations = influence - influence.mean(axis=0)
    third_moments = (deviations**3).mean(axis=0)
    scale = np.where(errors > 0, errors * math.sqrt(count), 1.0)
    skewness = np.where(errors > 0, third_moments / scale**3 / math.sqrt(count), 0.0)
    degrees_of_freedom = max(1.0, total**2 / float((sizes**2).sum()) - 1)
    return [
        MeanStatistics(standard_error=error, skewness=skew, degrees_of_freedom=degrees_of_freedom)
        for error, skew in zip(errors.tolist(), skewness.tolist(), strict=True)
    ]


def interval_bounds(mean: float, mean_statistics: MeanStatistics, level: float = LEVEL) -> tuple[float, float]:
    """The ends of the interval of a mean; infinite for a single group."""
    if math.isinf(mean_statistics.standard_error):
        return -math.inf, math.inf
    quantile = float(stdtrit(mean_statistics.degrees_of_freedom, (1 + level) / 2))
    standard_error, skewness = mean_statistics.standard_error, mean_statistics.skewness
    low = mean - standard_error * max(quantile, _invert_transform(quantile, skewness))
    high = mean + standard_error * max(quantile, -_invert_transform(-quantile, skewness))
    return low, high


def estimate_means(values: Matrix, groups: Sequence[str]) -> list[MeanEstimate]:
    """The mean of each column of `values`, shape (instances, columns) of labels from 0 to 1, with its interval."""
    means = values.mean(axis=0).tolist()
    return [
        _estimate(mean, mean_statistics)
        for mean, mean_statistics in zip(means, compute_mean_statistics(values, groups), strict=True)
    ]


def estimate_share(good: Matrix, groups: Sequence[str]) -> MeanEstimate:
    """The share of ones in `good` (zeros and ones, shape (instances,)), with an interval that is valid near 0 and 1.

    It is Clopper and Pearson's interval (1934) for the effective number of independent instances, which is at most the
    number of instances (Korn and Graubard, 1998). If all values are equal, their dependence is unknown, and each group
    counts as one instance.
    """
    mean, count = float(good.mean()), float(len(set(groups)))
    (mean_statistics,) = compute_mean_statistics(good[:, None], groups)
    if 0 < mean_statistics.standard_error < math.inf:
        # Removes the jackknife's small-sample factor, which Clopper and Pearson's interval does not need.
        variance = mean_statistics.standard_error**2 * (count - 1) / count
        count = min(float(len(good)), mean * (1 - mean) / variance)
    ones, zeros, tail = mean * count, (1 - mean) * count, (1 - LEVEL) / 2
    low = float(betaincinv(ones, zeros + 1, tail)) if ones else 0.0
    high = float(betaincinv(ones + 1, zeros, 1 - tail)) if zeros else 1.0
    return MeanEstimate(mean=mean, low=low, high=high)


def compare(values: Matrix, others: Matrix, groups: Sequence[str]) -> Difference:
    """The mean of the paired differences `values - others`, both of shape (instances,) with labels from 0 to 1."""
    differences = values - others
    (mean_statistics,) = compute_mean_statistics(differences[:, None], groups)
    mean = float(differences.mean())
    if abs(mean) < _TOLERANCE:
        mean = 0.0
    low, high = interval_bounds(mean, mean_statistics)
    if mean_statistics.standard_error == 0 and mean:
        low, high = _bounds_without_variance(mean, mean_statistics.degrees_of_freedom + 1)
    return Difference(
        difference=mean,
        low=max(-1.0, low),
        high=min(1.0, high),
        p_value=p_value(mean, mean_statistics),
        standard_error=mean_statistics.standard_error if math.isfinite(mean_statistics.standard_error) else None,
        skewness=mean_statistics.skewness,
        degrees_of_freedom=mean_statistics.degrees_of_freedom,
        groups=len(set(groups)),
    )


def p_value(mean: float, mean_statistics: MeanStatistics) -> float:
    """Two-sided p-value for the null hypothesis that the true mean is 0.

    It is 1 minus the highest level at which `interval_bounds` excludes 0.

    Returns 1 if the differences do not vary, or for a single group.
    """
    if mean_statistics.standard_error == 0 or math.isinf(mean_statistics.standard_error):
        return 1.0
    statistic = abs(mean) / mean_statistics.standard_error
    skewness = math.copysign(mean_statistics.skewness, mean_statistics.skewness * mean)
    smaller = min(statistic, _transform(statistic, skewness))
    return min(1.0, 2 * float(stdtr(mean_statistics.degrees_of_freedom, -max(0.0, smaller))))


def lower_bound(difference: Difference, level: float) -> float:
    """The lower end of the interval at another level; minus infinity for a single group or without variance."""
    if not difference.standard_error:
        return -math.inf
    mean_statistics = MeanStatistics(
        standard_error=difference.standard_error,
        skewness=difference.skewness,
        degrees_of_freedom=difference.degrees_of_freedom,
    )
    return interval_bounds(difference.difference, mean_statistics, level)[0]


def compute_power(difference: Difference, level: float = LEVEL) -> Power:
    """The smallest difference that is detectable with these groups, and how many groups the observed one needs.

    A difference is detectable if its interval excludes 0 with a probability of 80%. The standard error is assumed to
    fall with the square root of the number of groups; the quantiles are those of Student's t with the current degrees
    of freedom.
    """
    if difference.standard_error is None:
        return Power(groups=difference.groups, smallest=1.0, groups_needed=None)
    degrees_of_freedom = difference.degrees_of_freedom
    quantiles = float(stdtrit(degrees_of_freedom, (1 + level) / 2) + stdtrit(degrees_of_freedom, POWER))
    smallest = quantiles * difference.standard_error
    size = abs(difference.difference)
    needed = math.ceil(difference.groups * (smallest / size) ** 2) if size > 1e-9 else None
    return Power(groups=difference.groups, smallest=smallest, groups_needed=needed)


def adjust_p_values(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusts p-values for multiple comparisons by Holm's step-down method (Holm, 1979); the order is kept."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, p_values[name] * (len(p_values) - rank)))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def _estimate(mean: float, mean_statistics: MeanStatistics) -> MeanEstimate:
    low, high = interval_bounds(mean, mean_statistics)
    if mean_statistics.standard_error == 0:
        low, high = _bounds_without_variance(mean, mean_statistics.degrees_of_freedom + 1, lowest=0.0)
    return MeanEstimate(mean=mean, low=max(0.0, low), high=min(1.0, high))


def _bounds_without_variance(mean: float, groups: float, lowest: float = -1.0) -> tuple[float, float]:
    """The interval if all groups have the same value; a small share of the population may still have other values.

    If a share of 1 - 0.025^(1 / groups) of the population had other values, `groups` draws would miss all of them with
    a probability of 2.5% (Clopper and Pearson).
    """
    missed_share = 1 - ((1 - LEVEL) / 2) ** (1 / groups)
    return mean - missed_share * (mean - lowest), mean + missed_share * (1 - mean)


def _transform(statistic: float, skewness: float) -> float:
    """Hall's monotone transformation of a t statistic, which removes the skewness of the mean."""
    if abs(skewness) < _TOLERANCE:
        return statistic
    return ((1 + skewness * statistic / 3) ** 3 - 1) / skewness + skewness / 6


def _invert_transform(value: float, skewness: float) -> float:
    """The inverse of `_transform`."""
    if abs(skewness) < _TOLERANCE:
        return value
    return 3 * (math.cbrt(1 + skewness * (value - skewness / 6)) - 1) / skewness
