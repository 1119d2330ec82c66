"""Threshold: the lowest score above which the selector's picks have a given precision, with a given confidence.

Choosing the lowest score whose held-out picks have the precision would be biased by selection. So scores are tested in
a fixed order, from strict to lenient, and the last one before the first failing test is chosen. A test passes if the
lower bound of the precision (Clopper and Pearson, 1934) is high enough; with fixed-sequence testing, every test may use
the full confidence level (Angelopoulos, Bates, Candes, Jordan and Lei, "Learn then Test", 2021, section 3.1). The
guarantee holds for instances from the same distribution as the held-out ones.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.special import betaincinv, stdtrit

from cappy.errors import FolderError
from cappy.evaluation import calibration, read_values, statistics
from cappy.scoring.calibration import Calibration, read_calibration
from cappy.selection.pools import Pool, PoolVectors, Vector

PICKS = "picks.json"
CONFIDENCE = 0.95
FIRST_SHARE = 1 / 8
"""Minimum share of the picks in the first test: with fewer, its bound is too wide to pass."""
STEP_SHARE = 1 / 20
"""Share of the picks that each further test adds: with more tests, it is more likely that one fails by chance."""
_TOLERANCE = 1e-12
"""A variance below this counts as 0."""

Flags = npt.NDArray[np.bool_]
PickRow = tuple[float | str | int, ...]
"""Score, label, group and number of distinct candidates of a pick, and its fold in a cross-fitted report."""


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A threshold that was chosen on held-out picks, and its effect on the reported picks.

    A pick is good if its label is at least `good`; `wanted` is the required share of good picks. `held_out` and
    `reported` are numbers of picks. `floor` is the threshold on calibrated scores, for a gateway with the same
    calibration.json; None if there is none. `held_out_low` is the lower bound of `held_out_precision` with
    `confidence`; it is at least `wanted`. `coverage` is
    the share of reported instances that are answered, `precision` the share of good picks among them, with its 95%
    interval over their `groups` (`statistics.estimate_share`); None if none is answered.
    If `folds` is above 0, the picks are out-of-fold: the threshold is chosen on all of them, and `coverage` and
    `precision` are those of thresholds chosen on the other folds.
    """

    threshold: float
    floor: float | None
    good: float
    wanted: float
    confidence: float
    held_out: int
    held_out_precision: float
    held_out_low: float
    reported: int
    coverage: float
    groups: int
    precision: float | None
    low: float | None
    high: float | None
    folds: int = 0


@dataclass(frozen=True)
class _Picks:
    """Picks as arrays, shape (picks,); `fold` is 0 if all are from one scorer."""

    scores: Vector
    labels: Vector
    groups: npt.NDArray[np.str_]
    sizes: npt.NDArray[np.int64]
    fold: npt.NDArray[np.int64]

    def expected_labels(self, fitted: Calibration) -> Vector:
        rows = zip(self.scores.tolist(), self.sizes.tolist(), strict=True)
        return np.array([fitted.apply([score], n=size)[0] for score, size in rows])


def find_threshold(
    report: str | Path, *, precision: float, good: float, confidence: float = CONFIDENCE
) -> Threshold | None:
    """Finds the lowest threshold whose picks have `precision` with `confidence`; None if no score passes the test.

    A pick is good if its label is at least `good`; all three are from 0 to 1. Raises FolderError if the report has no
    held-out picks, or if an older version wrote them.
    """
    held_out, reported = _read_picks(Path(report))
    is_good = held_out.labels >= good
    threshold = find_lowest(held_out.scores, is_good, held_out.groups, precision, confidence)
    if threshold is None:
        return None
    above = held_out.scores >= threshold
    folds = np.unique(held_out.fold)
    answered = reported.scores >= threshold
    if len(folds) > 1:
        answered = _answered_out_of_fold(held_out, is_good, precision, confidence)
    is_answer_good, groups = reported.labels[answered] >= good, reported.groups[answered].tolist()
    estimate = statistics.estimate_share(is_answer_good.astype(np.float64), groups) if groups else None
    fitted = read_calibration(report)
    return Threshold(
        threshold=threshold,
        floor=find_lowest(held_out.expected_labels(fitted), is_good, held_out.groups, precision, confidence)
        if fitted
        else None,
        good=good,
        wanted=precision,
        confidence=confidence,
        held_out=len(held_out.scores),
        held_out_precision=float(is_good[above].mean()),
        held_out_low=lower_bound(is_good[above], held_out.groups[above], confidence),
        reported=len(reported.scores),
        coverage=float(answered.mean()),
        groups=len(set(groups)),
        precision=estimate.mean if estimate else None,
        low=estimate.low if estimate else None,
        high=estimate.high if estimate else None,
        folds=len(folds) if len(folds) > 1 else 0,
    )


def pick_rows(pools: Sequence[Pool], values: PoolVectors, fold: int | None = None) -> list[PickRow]:
    """The rows of picks.json: score, label, group and distinct candidates of each pick, and the fold if there is one.

    They are stored under the keys `held_out` and `reported`, or `out_of_fold` if cross-fitted.
    """
    picked = calibration.collect_picks(pools, values)
    groups = [pool.instance.group_id for pool in pools]
    extra = () if fold is None else (fold,)
    rows = zip(picked.scores.tolist(), picked.labels.tolist(), groups, picked.sizes, strict=True)
    return [(*row, *extra) for row in rows]


def find_lowest(
    scores: Vector, is_good: Flags, groups: npt.NDArray[np.str_], precision: float, confidence: float = CONFIDENCE
) -> float | None:
    """The lowest threshold that passes: the score before the first failing test; None if the first test fails.

    Which scores are tested depends only on scores and groups, never on which picks are good.
    """
    order = np.argsort(-scores, kind="stable")
    scores, is_good, groups = scores[order], is_good[order], groups[order]
    lowest = None
    for count in _choose_test_sizes(groups, precision, confidence):
        score = scores[count - 1]
        # Equal scores are accepted together.
        end = int(np.searchsorted(-scores, -score, side="right"))
        if lower_bound(is_good[:end], groups[:end], confidence) < precision:
            break
        lowest = float(score)
    return lowest


def lower_bound(is_good: Flags, groups: npt.NDArray[np.str_], confidence: float = CONFIDENCE) -> float:
    """One-sided lower bound of the share of good picks, with `confidence`; picks of a group may be dependent.

    It is Clopper and Pearson's bound for the effective number of independent picks, which is at most the number of
    picks (Korn and Graubard, 1998). If all picks are good, or all bad, each group counts as one.
    """
    mean, number = float(is_good.mean()), len(is_good)
    _, index = np.unique(groups, return_inverse=True)
    count = float(index.max() + 1)
    variance = float((np.bincount(index, weights=is_good - mean) ** 2).sum()) / number**2
    if variance > _TOLERANCE:
        correction = stdtrit(number - 1, confidence) / stdtrit(count - 1, confidence) if count < number else 1.0
        count = min(float(number), correction**2 * mean * (1 - mean) / variance)
    ones, zeros = mean * count, (1 - mean) * count
    return float(betaincinv(ones, zeros + 1, 1 - confidence)) if ones else 0.0


def groups_needed(precision: float, confidence: float, bad: int = 0) -> int | None:
    """Number of groups at which the lower bound reaches `precision` if all but `bad` picks are good; None if none does.

    It is at most 1% above the smallest such number.
    """
    if precision >= 1:
        return None
    count = bad + 1
    while betaincinv(count - bad, bad + 1, 1 - confidence) < precision:
        count += max(1, count // 100)
    return count


def describe_threshold(
    result: Threshold | None, *, precision: float, good: float, confidence: float = CONFIDENCE
) -> str:
    """The threshold and its effect as text for a terminal."""
    if result is None:
        needed = groups_needed(precision, confidence)
        reason = (
            "no number of picks proves that all are good"
            if needed is None
            else f"at least {needed:,} groups are needed"
        )
        return (
            f"No threshold guarantees, with {100 * confidence:g}% confidence, that {100 * precision:g}% of the "
            f"picks have a label of {good:g} or more ({reason}): lower --min-precision, hold out more instances, or "
            "train a better scorer."
        )
    picks = "out-of-fold picks" if result.folds else "held-out picks"
    floor = "" if result.floor is None else f" (cappy gateway with this calibration: --floor {result.floor:.6g})"
    text = (
        f"threshold {result.threshold:.6g}{floor}: {100 * result.held_out_precision:.1f}% of the {picks} at or above "
        f"it have a label of {good:g} or more, at least {100 * result.held_out_low:.1f}% with {100 * confidence:g}% "
        "confidence"
    )
    if result.precision is None or result.low is None or result.high is None:
        return f"{text}; {_describe_coverage(result, 'none')}."
    interval = f"{100 * result.low:.1f} to {100 * result.high:.1f}"
    proof = "" if result.low >= precision else ", so the reported instances alone do not confirm the required precision"
    text = (
        f"{text}; {_describe_coverage(result, f'{100 * result.coverage:.1f}%')}, of which "
        f"{100 * result.precision:.1f}% are good (95% interval {interval} over {result.groups} groups{proof})."
    )
    if result.folds:
        text += (
            " The scores of the folds' scorers may have different scales: check the threshold on instances that the "
            "final scorer was not trained on before you rely on it."
        )
    return text


def _describe_coverage(result: Threshold, share: str) -> str:
    if result.folds:
        others = f"the other {result.folds - 1} folds" if result.folds > 2 else "the other fold"
        return f"with thresholds chosen on {others}, {share} of the instances are at or above the threshold"
    return f"{share} of the {result.reported} reported instances have a pick at or above it"


def _answered_out_of_fold(picks: _Picks, is_good: Flags, precision: float, confidence: float) -> Flags:
    """Mask of the picks that reach the threshold chosen on the other folds; all false if these have no threshold."""
    answered = np.zeros(len(picks.scores), dtype=bool)
    for fold in np.unique(picks.fold):
        in_fold, others = picks.fold == fold, picks.fold != fold
        threshold = find_lowest(picks.scores[others], is_good[others], picks.groups[others], precision, confidence)
        if threshold is not None:
            answered[in_fold] = picks.scores[in_fold] >= threshold
    return answered


def _choose_test_sizes(groups: npt.NDArray[np.str_], precision: float, confidence: float) -> list[int]:
    """How many of the picks with the highest scores each test uses, in increasing order.

    The first test is large enough to pass with one bad pick or, if there are too few groups for that, if all its picks
    are good. If there are too few groups even for that, the result is empty.
    """
    number = len(groups)
    is_new = np.zeros(number, dtype=np.int64)
    is_new[np.unique(groups, return_index=True)[1]] = 1
    seen = np.cumsum(is_new)
    for bad in (1, 0):
        needed = groups_needed(precision, confidence, bad)
        if needed is not None and needed <= seen[-1]:
            first = max(int(np.searchsorted(seen, needed)) + 1, round(FIRST_SHARE * number))
            steps = range(first, number, max(1, round(STEP_SHARE * number)))
            return [*steps, number]
    return []


def _read_picks(report: Path) -> tuple[_Picks, _Picks]:
    """The held-out and the reported picks; in a cross-fitted report both are the out-of-fold picks."""
    folds = read_values(report).get("folds")
    path = report / PICKS
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if folds:
            if not values.get("out_of_fold"):
                raise FolderError(
                    f"{path}: has no out-of-fold picks, because an older version wrote it; evaluate again"
                )
            picks = _parse_picks(values["out_of_fold"], columns=5)
            return picks, picks
        if not values.get("held_out"):
            raise FolderError(
                f"{path}: has no held-out picks to choose a threshold on; evaluate on --split test, with a validation "
                "split"
            )
        return _parse_picks(values["held_out"], columns=4), _parse_picks(values["reported"], columns=4)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FolderError(
            f"{path}: lacks the score, label, group or number of candidates of a pick, because an older version wrote "
            "it or it is damaged; evaluate again"
        ) from error


def _parse_picks(rows: Sequence[Sequence[str | float]], columns: int) -> _Picks:
    """Converts rows to arrays. Raises ValueError or TypeError if a row is not [score, label, group, n(, fold)]."""
    if any(len(row) != columns for row in rows):
        raise ValueError(f"every row must have {columns} values")
    scores, labels, groups, sizes, *folds = ([row[column] for row in rows] for column in range(columns))
    picks = _Picks(
        scores=np.array(scores, dtype=np.float64),
        labels=np.array(labels, dtype=np.float64),
        groups=np.array(groups, dtype=np.str_),
        sizes=np.array(sizes, dtype=np.int64),
        fold=np.array(folds[0] if folds else [0] * len(rows), dtype=np.int64),
    )
    if not np.isfinite([picks.scores, picks.labels]).all() or (picks.sizes < 1).any():
        raise ValueError("scores and labels must be finite numbers")
    return picks
