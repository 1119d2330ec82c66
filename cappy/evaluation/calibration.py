"""Calibration: how far scores are from the labels they foretell, a map that mends it, and what abstaining buys."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import isotonic_regression

from cappy.evaluation.findings import Bin, Calibrated, Coverage, Reliability
from cappy.evaluation.pools import Vector
from cappy.scoring.calibration import Calibration

NUM_BINS = 10
MIN_FITTED = 50
"""Held-out candidates below which no map is fitted: an isotonic one of fewer follows their noise."""
SHARES = tuple(round(0.1 * step, 1) for step in range(1, 11))


def fit(scores: Vector, labels: Vector, metric: str) -> Calibration | None:
    """The isotonic map of held-out scores to labels (Zadrozny and Elkan, 2002); None of too few candidates."""
    if len(scores) < MIN_FITTED:
        return None
    points, where = np.unique(scores, return_inverse=True)
    weights = np.bincount(where).astype(np.float64)
    levels = isotonic_regression(np.bincount(where, weights=labels) / weights, weights=weights)
    # The ends of every level say all of a stepwise map.
    ends = sorted({*levels.blocks[:-1].tolist(), *(levels.blocks[1:] - 1).tolist()})
    expected = np.clip(levels.x[ends], 0.0, 1.0)
    return Calibration(tuple(points[ends].tolist()), tuple(expected.tolist()), metric=metric, fitted_on=len(scores))


def reliability(scores: Vector, labels: Vector) -> Reliability:
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


def calibrated(raw: Vector, mapped: Vector | None, labels: Vector, fitted_on: int) -> Calibrated:
    """The reliability of scores as they are and, where a map was fitted, after it."""
    after = None if mapped is None else reliability(mapped, labels)
    return Calibrated(raw=reliability(raw, labels), calibrated=after, fitted_on=fitted_on if after else 0)


def coverage(confidences: Sequence[float], labels: Vector) -> Coverage:
    """The mean label of the picks with the highest confidences, by the share of instances that is answered."""
    order = np.argsort(-np.asarray(confidences), kind="stable")
    sizes = [max(1, round(share * len(order))) for share in SHARES]
    quality = tuple(float(labels[order[:size]].mean()) for size in sizes)
    return Coverage(coverage=SHARES, quality=quality, random=float(labels.mean()))
