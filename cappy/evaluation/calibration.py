"""Calibration: how far the scores of picks are from their labels, a map that mends it, and what abstaining buys."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression

from cappy.evaluation.findings import Bin, CalibrationResult, Coverage, Reliability
from cappy.scoring.calibration import Calibration, PickMap
from cappy.selection.pools import Pool, Vector, average_ties, best_probabilities, pick_labels

NUM_BINS = 10
MIN_GROUPS = 20
"""Held-out groups below which no map is fitted, and the groups that a fitted n must have: two levels of ten picks."""
LEVEL_GROUPS = 10
"""Groups for each level of a map: an isotonic one of fewer follows their noise, most of all at its ends."""
MAX_LEVELS = 20
SHARES = tuple(round(0.1 * step, 1) for step in range(1, 11))


@dataclass(frozen=True)
class Picks:
    """The scorer's pick of every pool: its score, its label, and the number of distinct candidates, the n of its map.

    Of equally scored candidates each is picked as often, so that the label is their mean. `spreads` are the differences
    of the highest and the lowest score.
    """

    scores: Vector
    labels: Vector
    sizes: tuple[int, ...]
    spreads: Vector

    def expected_labels(self, fitted: Calibration) -> Vector:
        """The expected label of every pick."""
        pairs = zip(self.scores.tolist(), self.sizes, strict=True)
        return np.array([fitted.apply([score], n=size)[0] for score, size in pairs])


def collect_picks(pools: Sequence[Pool], scores: Sequence[Vector]) -> Picks:
    """The picks of these scores."""
    return Picks(
        scores=np.array([own.max() for own in scores], dtype=np.float64),
        labels=pick_labels(pools, scores),
        sizes=tuple(len(set(pool.responses)) for pool in pools),
        spreads=np.array([np.ptp(own) for own in scores], dtype=np.float64),
    )


def fit(pools: Sequence[Pool], scores: Sequence[Vector], metric: str) -> Calibration | None:
    """The maps from the scores of held-out picks to their labels; None of fewer than `MIN_GROUPS` groups.

    For every n of a grid the picks are those of all subsets of n candidates of each pool, in their exact proportions
    (`best_probabilities`), so that each pool weighs 1. A text that was sampled twice stands in its pool twice, as
    it does in n samples. Each n has its own isotonic map (Zadrozny and Elkan, 2002), over levels of about equal weight.
    """
    ranked = [_sort_picks(own, pool.labels) for pool, own in zip(pools, scores, strict=True)]
    groups = np.array([pool.instance.group_id for pool in pools])
    maps = []
    for n in _choose_sizes([len(own) for own, _ in ranked], groups):
        where = [index for index, (own, _) in enumerate(ranked) if len(own) >= n]
        weights = np.concatenate([best_probabilities(len(ranked[index][0]))[n - 1] for index in where])
        values, labels = (np.concatenate([ranked[index][side] for index in where]) for side in (0, 1))
        levels = min(MAX_LEVELS, len(set(groups[where])) // LEVEL_GROUPS)
        maps.append(_fit_monotone_map(n, values, labels, weights, levels))
    return Calibration(tuple(maps), metric=metric, fitted_on=len(set(groups))) if maps else None


def _sort_picks(scores: Vector, labels: Vector) -> tuple[Vector, Vector]:
    """Scores and labels, best first; equal scores have the mean of their labels."""
    order = np.argsort(-scores, kind="stable")
    return scores[order], average_ties(scores[order], labels[order])


def _choose_sizes(sizes: Sequence[int], groups: "np.ndarray[tuple[int], np.dtype[np.str_]]") -> Iterator[int]:
    """1, 2, 4 and so on, and the largest n of which `MIN_GROUPS` groups have a pool; nothing of fewer groups."""
    largest: dict[str, int] = {}
    for size, group in zip(sizes, groups.tolist(), strict=True):
        largest[group] = max(size, largest.get(group, 0))
    if len(largest) < MIN_GROUPS:
        return
    last, n = sorted(largest.values())[-MIN_GROUPS], 1
    while n < last:
        yield n
        n *= 2
    yield last


def _fit_monotone_map(n: int, scores: Vector, labels: Vector, weights: Vector, levels: int) -> PickMap:
    """The monotone map of at most `levels` levels of about equal weight: each from its lowest to its highest score.

    So the mean of what is expected of the picks is the mean of their labels.
    """
    drawn = weights > 0
    points, where = np.unique(scores[drawn], return_inverse=True)
    weight = np.bincount(where, weights=weights[drawn])
    total = np.bincount(where, weights=weights[drawn] * labels[drawn])
    # Equal scores are of one level; a pick in the middle of its own weight says which.
    middle = (np.cumsum(weight) - weight / 2) / weight.sum()
    level = np.minimum((middle * levels).astype(int), levels - 1)
    level = np.unique(level, return_inverse=True)[1]
    mass, label = (np.bincount(level, weights=own) for own in (weight, total))
    expected = np.clip(isotonic_regression(label / mass, weights=mass).x, 0.0, 1.0)[level]
    change = np.diff(expected) != 0
    ends = np.flatnonzero(np.append(True, change) | np.append(change, True))
    return PickMap(n, tuple(points[ends].tolist()), tuple(expected[ends].tolist()))


def measure_reliability(scores: Vector, labels: Vector) -> Reliability:
    """Calibration error, Brier score and bins of about equal size, of scores against labels of 0 to 1.

    Equal scores are in one bin, whatever their order: a calibrated score has many of them.
    """
    order = np.argsort(scores, kind="stable")
    rank = np.searchsorted(scores[order], scores, side="left")
    place = rank * NUM_BINS // len(scores)
    parts = [part for number in range(NUM_BINS) if len(part := np.flatnonzero(place == number))]
    bins = tuple(
        Bin(score=float(scores[part].mean()), label=float(labels[part].mean()), count=len(part)) for part in parts
    )
    error = sum(abs(one.score - one.label) * one.count for one in bins) / len(scores)
    return Reliability(ece=float(error), brier=float(np.mean((scores - labels) ** 2)), bins=bins)


def measure_calibration(splits: Sequence[tuple[Picks, Calibration | None]]) -> CalibrationResult:
    """The reliability of picks by their scores and, where every part has a map, by what its own map expects."""
    raw, labels = (np.concatenate([getattr(own, name) for own, _ in splits]) for name in ("scores", "labels"))
    # Of a pool with one distinct candidate there is nothing to tell apart.
    spreads = np.concatenate([own.spreads[np.array(own.sizes) > 1] for own, _ in splits])
    spread = float(np.median(spreads)) if len(spreads) else None
    maps = [fitted for _, fitted in splits if fitted is not None]
    if len(maps) < len(splits):
        return CalibrationResult(raw=measure_reliability(raw, labels), spread=spread)
    mapped = np.concatenate([own.expected_labels(fitted) for own, fitted in splits if fitted is not None])
    return CalibrationResult(
        raw=measure_reliability(raw, labels),
        calibrated=measure_reliability(mapped, labels),
        fitted_on=sum(fitted.fitted_on for fitted in maps),
        spread=spread,
    )


def measure_coverage(confidences: Sequence[float], labels: Vector) -> Coverage:
    """The mean label of the picks with the highest confidences, by the share of instances that is answered."""
    order = np.argsort(-np.asarray(confidences), kind="stable")
    sizes = [max(1, round(share * len(order))) for share in SHARES]
    quality = tuple(float(labels[order[:size]].mean()) for size in sizes)
    return Coverage(coverage=SHARES, quality=quality, random=float(labels.mean()))
