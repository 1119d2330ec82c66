"""The threshold: the score above which the scorer's picks are good often enough."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cappy.errors import FolderError
from cappy.evaluation import read_values, statistics
from cappy.evaluation.pools import Vector

PICKS = "picks.json"


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """A threshold, chosen on held-out picks, and what it keeps on the reported ones.

    `coverage` is the share of reported instances that are answered, `precision` the share of good picks among them with
    its 95% interval over their `groups` (`statistics.share`); None where none is answered.
    """

    threshold: float
    good: float
    wanted: float
    held_out: int
    held_out_precision: float
    reported: int
    coverage: float
    groups: int
    precision: float | None
    low: float | None
    high: float | None


def threshold(report: str | Path, *, precision: float, good: float) -> Threshold | None:
    """The lowest threshold whose held-out picks are good with at least `precision`; None if no score is enough.

    A pick is good if its label is at least `good`. FolderError where the report has no held-out picks, or picks that
    do not say which group they are of.
    """
    picks = _read_picks(Path(report))
    held, reported = (np.array([pick[:2] for pick in picks[name]]) for name in ("held_out", "reported"))
    found = lowest(held[:, 0], held[:, 1] >= good, precision)
    if found is None:
        return None
    kept, own = reported[reported[:, 0] >= found, 1] >= good, held[held[:, 0] >= found, 1] >= good
    groups = [group for score, _, group in picks["reported"] if score >= found]
    estimate = statistics.share(kept.astype(np.float64), groups) if groups else None
    return Threshold(
        threshold=found,
        good=good,
        wanted=precision,
        held_out=len(held),
        held_out_precision=float(own.mean()),
        reported=len(reported),
        coverage=len(kept) / len(reported),
        groups=len(set(groups)),
        precision=estimate.mean if estimate else None,
        low=estimate.low if estimate else None,
        high=estimate.high if estimate else None,
    )


def _read_picks(report: Path) -> dict[str, list[tuple[float, float, str]]]:
    """Score, label and group of the picks, held-out and reported."""
    if read_values(report).get("folds"):
        raise FolderError(
            f"{report}: is cross-fitted, so no one scorer gave its scores; evaluate a scorer on its own split"
        )
    path = report / PICKS
    picks: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not picks.get("held_out"):
        raise FolderError(
            f"{path}: has no held-out picks to choose a threshold on; evaluate on --split test, with a validation split"
        )
    if any(len(pick) != 3 for pick in picks["reported"]):
        raise FolderError(f"{path}: does not say which group a pick is of, an older version wrote it; evaluate again")
    return picks


def lowest(scores: Vector, good: npt.NDArray[np.bool_], precision: float) -> float | None:
    """The lowest of the scores at and above which at least `precision` of the picks are good, None if there is none."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    share = np.cumsum(good[order]) / np.arange(1, len(order) + 1)
    # Of equal scores all are kept or none.
    last = np.append(ranked[1:] != ranked[:-1], True)
    enough = np.flatnonzero((share >= precision) & last)
    return float(ranked[enough[-1]]) if len(enough) else None


def sentence(found: Threshold | None, *, precision: float, good: float) -> str:
    """The answer, for a person."""
    if found is None:
        return (
            f"No score keeps {100 * precision:g}% of the picks at a label of {good:g} or more on the held-out "
            "instances: ask for less, or train a better scorer."
        )
    text = (
        f"threshold {found.threshold:.4f}: {100 * found.held_out_precision:.1f}% of the held-out picks at or above it "
        f"have a label of {good:g} or more"
    )
    if found.precision is None or found.low is None or found.high is None:
        return f"{text}; none of the {found.reported} reported instances is answered."
    interval = f"{100 * found.low:.1f} to {100 * found.high:.1f}"
    proof = "" if found.low >= precision else ", so what you ask for is not proven"
    return (
        f"{text}; of the {found.reported} reported instances it answers {100 * found.coverage:.1f}%, of which "
        f"{100 * found.precision:.1f}% are good (95% interval {interval} over {found.groups} groups{proof})."
    )
