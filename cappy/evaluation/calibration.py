"""Calibration: measures how far the scores of picks are from their labels, and fits maps from scores to labels."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression

from cappy.evaluation.findings import Bin, CalibrationResult, Coverage, Reliability
from cappy.scoring.calibration import Calibration, PickMap
from cappy.selection.curves import average_ties, best_probabilities, sample_picks
from cappy.selection.linear import PoolFeatures, Selector, features_for
from cappy.selection.pools import Pool, PoolVectors, Vector, pick_label, pick_labels

NUM_BINS = 10
MIN_GROUPS = 20
"""Minimum number of held-out groups to fit a map, overall and for each n: enough for two levels."""
MIN_LEVEL_GROUPS = 10
"""Minimum number of groups per level of a map: with fewer, isotonic regression fits noise, above all at the ends."""
MAX_LEVELS = 20
COVERAGES = tuple(round(0.1 * step, 1) for step in range(1, 11))
"""Coverages (shares of instances that are answered) at which quality is measured."""


@dataclass(frozen=True)
class Picks:
    """The pick of every pool: its score, its label, and the number of distinct candidates (the n of its calibration).

    Score and label are means over the candidates with the highest value. `spreads` are the differences between the
    highest and the lowest score of each pool.
    """

    scores: Vector
    labels: Vector
    sizes: tuple[int, ...]
    spreads: Vector

    def expected_labels(self, fitted: Calibration) -> Vector:
        """The calibrated score of every pick, shape (pools,)."""
        pairs = zip(self.scores.tolist(), self.sizes, strict=True)
        return np.array([fitted.apply([score], n=size)[0] for score, size in pairs])


def collect_picks(pools: Sequence[Pool], values: PoolVectors) -> Picks:
    """Collects the pick of every pool: the candidate with the highest value."""
    scores = [pool.scores["scorer"] for pool in pools]
    return Picks(
        scores=np.array([pick_label(value, score) for value, score in zip(values, scores, strict=True)]),
        labels=pick_labels(pools, values),
        sizes=tuple(len(set(pool.responses)) for pool in pools),
        spreads=np.array([np.ptp(pool_scores) for pool_scores in scores], dtype=np.float64),
    )


def fit(pools: Sequence[Pool], selectors: Sequence[Selector], metric: str, *, seed: int) -> Calibration | None:
    """Fits the maps from the scores of held-out picks to their labels; None with fewer than `MIN_GROUPS` groups.

    `selectors` has the selector of each pool, which picks from it. For every n of a grid, the picks are those among n
    candidates of each pool: of all subsets with their exact probabilities if the pick depends on the score alone, else
    of random subsets that include the greedy response if it is known (`sample_picks`, from `seed`), so that each pool
    has weight 1. Here n counts a response that was sampled twice as two candidates; when a calibration is applied, n is
    the number of distinct candidates. Each n has its own isotonic map (Zadrozny and Elkan, 2002) over levels of about
    equal weight.
    """
    rng = np.random.default_rng(seed)
    known = zip(pools, selectors, features_for(pools, selectors), strict=True)
    picks = [_weighted_picks(pool, selector, features, rng) for pool, selector, features in known]
    groups = np.array([pool.instance.group_id for pool in pools])
    maps = []
    for n in _choose_sizes([len(pool.labels) for pool in pools], groups):
        large_pools = [index for index, pool in enumerate(pools) if len(pool.labels) >= n]
        scores, labels, weights = (
            np.concatenate([picks[index](n)[part] for index in large_pools]) for part in range(3)
        )
        levels = min(MAX_LEVELS, len(set(groups[large_pools])) // MIN_LEVEL_GROUPS)
        maps.append(_fit_monotone_map(n, scores, labels, weights, levels))
    return Calibration(tuple(maps), metric=metric, fitted_on=len(set(groups))) if maps else None


def _weighted_picks(
    pool: Pool, selector: Selector, features: PoolFeatures, rng: np.random.Generator
) -> Callable[[int], tuple[Vector, Vector, Vector]]:
    """A function from n to the scores, the labels and the weights of the picks among n candidates of the pool."""
    if selector.rule(features.available).single == "score" and not features.truncated:
        scores, labels = _sort_candidates(features.scores, pool.labels)
        return lambda n: (scores, labels, best_probabilities(len(scores))[n - 1])
    size = len(pool.labels)
    alone = features.scores, pool.labels, np.full(size, 1 / size)
    sampled = sample_picks(selector, features, pool.labels, rng, greedy_first=True)
    weights = np.full(len(sampled.scores), 1 / len(sampled.scores))
    return lambda n: alone if n == 1 else (sampled.scores[:, n - 1], sampled.labels[:, n - 1], weights)


def _sort_candidates(scores: Vector, labels: Vector) -> tuple[Vector, Vector]:
    """Scores and labels, sorted from the highest score; equal scores get the mean of their labels."""
    order = np.argsort(-scores, kind="stable")
    return scores[order], average_ties(scores[order], labels[order])


def _choose_sizes(sizes: Sequence[int], groups: "np.ndarray[tuple[int], np.dtype[np.str_]]") -> Iterator[int]:
    """Yields 1, 2, 4, ... up to a largest n, which is yielded last.

    That is the largest n for which at least `MIN_GROUPS` groups have a pool of n or more candidates. Yields nothing if
    there are fewer than `MIN_GROUPS` groups.
    """
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
    """Fits a monotone map with at most `levels` levels of about equal weight.

    A level is constant from its lowest to its highest score. The weighted mean of the expected labels equals that of
    the labels.
    """
    positive = weights > 0
    points, index = np.unique(scores[positive], return_inverse=True)
    weight = np.bincount(index, weights=weights[positive])
    total = np.bincount(index, weights=weights[positive] * labels[positive])
    # Equal scores share a level: the one at the middle of their cumulative weight.
    middle = (np.cumsum(weight) - weight / 2) / weight.sum()
    level = np.minimum((middle * levels).astype(int), levels - 1)
    level = np.unique(level, return_inverse=True)[1]
    level_weight, level_total = (np.bincount(level, weights=values) for values in (weight, total))
    expected = np.clip(isotonic_regression(level_total / level_weight, weights=level_weight).x, 0.0, 1.0)[level]
    change = np.diff(expected) != 0
    ends = np.flatnonzero(np.append(True, change) | np.append(change, True))
    return PickMap(n, tuple(points[ends].tolist()), tuple(expected[ends].tolist()))


def measure_reliability(scores: Vector, labels: Vector) -> Reliability:
    """Calibration error, Brier score and bins of about equal size; scores and labels (0 to 1) have shape (pools,).

    Equal scores, which are frequent after calibration, share one bin, so the result does not depend on their order.
    """
    order = np.argsort(scores, kind="stable")
    rank = np.searchsorted(scores[order], scores, side="left")
    bin_index = rank * NUM_BINS // len(scores)
    parts = [part for number in range(NUM_BINS) if len(part := np.flatnonzero(bin_index == number))]
    bins = tuple(
        Bin(score=float(scores[part].mean()), label=float(labels[part].mean()), count=len(part)) for part in parts
    )
    error = sum(abs(each.score - each.label) * each.count for each in bins) / len(scores)
    return Reliability(ece=float(error), brier=float(np.mean((scores - labels) ** 2)), bins=bins)


def measure_calibration(splits: Sequence[tuple[Picks, Calibration | None]]) -> CalibrationResult:
    """Reliability of the raw scores of picks and, if every split has a calibration, of their calibrated scores."""
    raw, labels = (np.concatenate([getattr(picks, name) for picks, _ in splits]) for name in ("scores", "labels"))
    # A pool with a single distinct candidate has no spread.
    spreads = np.concatenate([picks.spreads[np.array(picks.sizes) > 1] for picks, _ in splits])
    spread = float(np.median(spreads)) if len(spreads) else None
    calibrations = [fitted for _, fitted in splits if fitted is not None]
    if len(calibrations) < len(splits):
        return CalibrationResult(raw=measure_reliability(raw, labels), spread=spread)
    calibrated = np.concatenate([picks.expected_labels(fitted) for picks, fitted in splits if fitted is not None])
    return CalibrationResult(
        raw=measure_reliability(raw, labels),
        calibrated=measure_reliability(calibrated, labels),
        fitted_on=sum(fitted.fitted_on for fitted in calibrations),
        spread=spread,
    )


def measure_coverage(confidences: Sequence[float], labels: Vector) -> Coverage:
    """Mean label of the picks with the highest confidences, by the share of instances that is answered.

    `confidences` and `labels` have shape (pools,).
    """
    order = np.argsort(-np.asarray(confidences), kind="stable")
    sizes = [max(1, round(coverage * len(order))) for coverage in COVERAGES]
    quality = tuple(float(labels[order[:size]].mean()) for size in sizes)
    return Coverage(coverage=COVERAGES, quality=quality, random=float(labels.mean()))
