"""The threshold: the score above which the scorer's picks are good often enough, and what it promises.

The lowest score whose held-out picks happen to be good often enough is too low: it is the luckiest of many. So scores
are tested in a fixed order, from strict to lenient, and the last one before the first test that fails is taken. A test
asks whether a lower bound of the precision (Clopper and Pearson, 1934) is high enough, at the whole confidence: in a
fixed sequence no test costs the others anything (Angelopoulos, Bates, Candes, Jordan and Lei, "Learn then Test", 2021,
section 3.1). With `confidence`, 95% unless another is asked for, the picks at or above the threshold are good with the
wanted precision, on instances drawn as the held-out ones were.
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
from cappy.selection.pools import Pool, Vector

PICKS = "picks.json"
CONFIDENCE = 0.95
FIRST_SHARE = 1 / 8
"""Of the picks, that the first test keeps at least: fewer have too wide a bound to pass it."""
STEP_SHARE = 1 / 20
"""Of the picks, that each further test adds: with more tests one fails sooner by chance."""
_STILL = 1e-12
"""A variance below this is none."""

Flags = npt.NDArray[np.bool_]
PickRow = tuple[float | str | int, ...]
"""Score, label, group and number of distinct candidates of a pick; in a cross-fitted report its fold too."""


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A threshold, chosen on held-out picks, and what it keeps on the reported ones.

    `floor` is the same in units of the label, chosen on what calibration.json expects of each pick, for a gateway that
    has that calibration; None without one. `held_out_low` is the lower bound of `held_out_precision` that holds with
    `confidence`; it is at least `wanted`. `coverage` is the share of reported instances that are answered, `precision`
    the share of good picks among them with its 95% interval over their `groups` (`statistics.share`); None where none
    is answered.
    With `folds` the picks are out of fold: the threshold is chosen on all of them, and what it keeps is that of
    thresholds chosen on the other folds.
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
    """Picks as arrays; `fold` is 0 everywhere where they are of one scorer."""

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
    """The lowest threshold that is shown to keep `precision`, with `confidence`; None if no score is.

    A pick is good if its label is at least `good`. FolderError where the report has no held-out picks, or an older
    version wrote them.
    """
    held, reported = _read_picks(Path(report))
    enough = held.labels >= good
    level = find_lowest(held.scores, enough, held.groups, precision, confidence)
    if level is None:
        return None
    own = held.scores >= level
    folds = np.unique(held.fold)
    kept = reported.scores >= level
    if len(folds) > 1:
        kept = _answered_by_other_folds(held, enough, precision, confidence)
    answered, groups = reported.labels[kept] >= good, reported.groups[kept].tolist()
    estimate = statistics.estimate_share(answered.astype(np.float64), groups) if groups else None
    fitted = read_calibration(report)
    return Threshold(
        threshold=level,
        floor=find_lowest(held.expected_labels(fitted), enough, held.groups, precision, confidence) if fitted else None,
        good=good,
        wanted=precision,
        confidence=confidence,
        held_out=len(held.scores),
        held_out_precision=float(enough[own].mean()),
        held_out_low=lower_bound(enough[own], held.groups[own], confidence),
        reported=len(reported.scores),
        coverage=float(kept.mean()),
        groups=len(set(groups)),
        precision=estimate.mean if estimate else None,
        low=estimate.low if estimate else None,
        high=estimate.high if estimate else None,
        folds=len(folds) if len(folds) > 1 else 0,
    )


def pick_rows(pools: Sequence[Pool], fold: int | None = None) -> list[PickRow]:
    """The rows of picks.json for these pools: score, label, group, distinct candidates, and the fold if one is given.

    An evaluation keeps them by the names `held_out` and `reported`, a cross-fitted one by `out_of_fold`.
    """
    picked = calibration.collect_picks(pools, [pool.scores["scorer"] for pool in pools])
    groups = [pool.instance.group_id for pool in pools]
    more = () if fold is None else (fold,)
    rows = zip(picked.scores.tolist(), picked.labels.tolist(), groups, picked.sizes, strict=True)
    return [(*row, *more) for row in rows]


def find_lowest(
    scores: Vector, good: Flags, groups: npt.NDArray[np.str_], precision: float, confidence: float = CONFIDENCE
) -> float | None:
    """The last score of the fixed sequence that passes its test, None if the first does not.

    Which scores are tested depends on scores and groups alone, never on which picks are good.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, enough, of = scores[order], good[order], groups[order]
    lowest_level = None
    for count in _choose_test_sizes(of, precision, confidence):
        level = ranked[count - 1]
        # Of equal scores all are kept or none.
        kept = int(np.searchsorted(-ranked, -level, side="right"))
        if lower_bound(enough[:kept], of[:kept], confidence) < precision:
            break
        lowest_level = float(level)
    return lowest_level


def lower_bound(good: Flags, groups: npt.NDArray[np.str_], confidence: float = CONFIDENCE) -> float:
    """The lower bound of the share of good picks that holds with `confidence`; picks of a group may be alike.

    It is Clopper and Pearson's for as many independent picks as the share varies like over groups, for no more than
    there are (Korn and Graubard, 1998). Where all are good, or all bad, each group counts as one.
    """
    mean, number = float(good.mean()), len(good)
    _, index = np.unique(groups, return_inverse=True)
    count = float(index.max() + 1)
    variance = float((np.bincount(index, weights=good - mean) ** 2).sum()) / number**2
    if variance > _STILL:
        few = stdtrit(number - 1, confidence) / stdtrit(count - 1, confidence) if count < number else 1.0
        count = min(float(number), few**2 * mean * (1 - mean) / variance)
    ones, zeros = mean * count, (1 - mean) * count
    return float(betaincinv(ones, zeros + 1, 1 - confidence)) if ones else 0.0


def groups_needed(precision: float, confidence: float, bad: int = 0) -> int | None:
    """The fewest groups that show a precision if all their picks but `bad` are good; None where no number does."""
    if precision >= 1:
        return None
    count = bad + 1
    while betaincinv(count - bad, bad + 1, 1 - confidence) < precision:
        count += max(1, count // 100)
    return count


def describe_threshold(
    answer: Threshold | None, *, precision: float, good: float, confidence: float = CONFIDENCE
) -> str:
    """The answer, for a person."""
    if answer is None:
        needed = groups_needed(precision, confidence)
        reason = (
            "no number of picks shows that all are good" if needed is None else f"it takes {needed:,} groups or more"
        )
        return (
            f"No score is shown, with {100 * confidence:g}% confidence, to keep {100 * precision:g}% of the picks at a "
            f"label of {good:g} or more ({reason}): ask for less, hold out more instances, or train a better scorer."
        )
    picks = "out-of-fold picks" if answer.folds else "held-out picks"
    floor = "" if answer.floor is None else f" (cappy gateway with this calibration: --floor {answer.floor:.6g})"
    text = (
        f"threshold {answer.threshold:.6g}{floor}: {100 * answer.held_out_precision:.1f}% of the {picks} at or above "
        f"it have a label of {good:g} or more, at least {100 * answer.held_out_low:.1f}% with {100 * confidence:g}% "
        "confidence"
    )
    tried = f"of the {answer.reported} reported instances it answers"
    if answer.folds:
        tried = f"chosen on the other folds and tried on each of {answer.folds}, such a threshold answers"
    if answer.precision is None or answer.low is None or answer.high is None:
        return f"{text}; {tried} none."
    interval = f"{100 * answer.low:.1f} to {100 * answer.high:.1f}"
    proof = "" if answer.low >= precision else ", so they alone do not prove what you ask for"
    text = (
        f"{text}; {tried} {100 * answer.coverage:.1f}%, of which {100 * answer.precision:.1f}% are good (95% interval "
        f"{interval} over {answer.groups} groups{proof})."
    )
    if answer.folds:
        text += (
            " The scorers of the folds are not on one scale: try it on the scorer's own split before you rely on it."
        )
    return text


def _answered_by_other_folds(picks: _Picks, good: Flags, precision: float, confidence: float) -> Flags:
    """Which picks are answered by the threshold that the other folds choose; none where they choose none."""
    kept = np.zeros(len(picks.scores), dtype=bool)
    for fold in np.unique(picks.fold):
        own, others = picks.fold == fold, picks.fold != fold
        level = find_lowest(picks.scores[others], good[others], picks.groups[others], precision, confidence)
        if level is not None:
            kept[own] = picks.scores[own] >= level
    return kept


def _choose_test_sizes(groups: npt.NDArray[np.str_], precision: float, confidence: float) -> list[int]:
    """How many of the best picks each test keeps, in order; the first keeps enough to pass with one bad among them.

    Where so many are not there, it keeps as many as pass if all are good; no test where those are not there either.
    """
    number = len(groups)
    new = np.zeros(number, dtype=np.int64)
    new[np.unique(groups, return_index=True)[1]] = 1
    seen = np.cumsum(new)
    for bad in (1, 0):
        needed = groups_needed(precision, confidence, bad)
        if needed is not None and needed <= seen[-1]:
            first = max(int(np.searchsorted(seen, needed)) + 1, round(FIRST_SHARE * number))
            steps = range(first, number, max(1, round(STEP_SHARE * number)))
            return [*steps, number]
    return []


def _read_picks(report: Path) -> tuple[_Picks, _Picks]:
    """The held-out and the reported picks; of a cross-fitted report both are the out-of-fold ones."""
    folds = read_values(report).get("folds")
    path = report / PICKS
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if folds:
            if not values.get("out_of_fold"):
                raise FolderError(f"{path}: has no out-of-fold picks, an older version wrote it; evaluate again")
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
            f"{path}: does not say score, label, group and candidates of each pick, an older version wrote it or it is "
            "damaged; evaluate again"
        ) from error


def _parse_picks(rows: Sequence[Sequence[str | float]], columns: int) -> _Picks:
    """ValueError or TypeError where a row is not [score, label, group, n], or with 5 columns [..., fold]."""
    if any(len(row) != columns for row in rows):
        raise ValueError("rows of another length")
    scores, labels, groups, sizes, *folds = ([row[place] for row in rows] for place in range(columns))
    picks = _Picks(
        scores=np.array(scores, dtype=np.float64),
        labels=np.array(labels, dtype=np.float64),
        groups=np.array(groups, dtype=np.str_),
        sizes=np.array(sizes, dtype=np.int64),
        fold=np.array(folds[0] if folds else [0] * len(rows), dtype=np.int64),
    )
    if not np.isfinite([picks.scores, picks.labels]).all() or (picks.sizes < 1).any():
        raise ValueError("scores or labels that are not finite numbers")
    return picks
