"""What is kept beside a scorer: its calibration, and what it answered to stored pairs when it was evaluated.

Calibration (calibration.json) says what the best of n candidates is worth, given its score. The best of many is judged
otherwise than one alone: a score that a lone candidate earns by being right, the best of eight may have by luck. So the
expected label depends on the score and on n, the number of distinct candidates that were scored. It never changes a
pick: for every n it rises with the score, and where it is flat the scores decide. The stored pairs are probe.json.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from cappy.errors import FolderError

CALIBRATION = "calibration.json"
KIND = "picks"


@dataclass(frozen=True)
class PickMap:
    """The expected label of the best of `n`: piecewise linear through (`scores[i]`, `expected[i]`), level outside."""

    n: int
    scores: tuple[float, ...]
    expected: tuple[float, ...]


@dataclass(frozen=True)
class Calibration:
    """A monotone map for each of some n, in rising order and beginning at 1; between two of them it is interpolated.

    `metric` names the label that is expected, `fitted_on` the number of held-out groups that it was fitted on.
    """

    maps: tuple[PickMap, ...]
    metric: str
    fitted_on: int

    def apply(self, scores: Sequence[float], *, n: int) -> list[float]:
        """The label, 0 to 1, to expect of a candidate with each of these scores, were it the best of `n`.

        A pair that is scored alone is the best of 1. Interpolation is linear in log(n); beyond the largest n that was
        fitted its map holds. ValueError where n is below 1.
        """
        if n < 1:
            raise ValueError(f"n: is {n}; the best of 1 or more candidates has an expected label")
        sizes = np.log([one.n for one in self.maps])
        place = float(np.interp(np.log(n), sizes, np.arange(len(self.maps))))
        below = int(place)
        share = place - below
        values = _interpolate(self.maps[below], scores)
        if share:
            values = (1 - share) * values + share * _interpolate(self.maps[below + 1], scores)
        expected: list[float] = values.tolist()
        return expected

    def to_json(self) -> str:
        """The text of calibration.json."""
        values = {
            "kind": KIND,
            "metric": self.metric,
            "fitted_on": self.fitted_on,
            "maps": [{"n": one.n, "scores": one.scores, "expected": one.expected} for one in self.maps],
        }
        return json.dumps(values, indent=1) + "\n"


def read_calibration(folder: str | Path) -> Calibration | None:
    """The calibration in a scorer's or a report's folder, None if there is none.

    FolderError where it is damaged, or of the older kind that was fitted on all candidates and so overrates picks.
    """
    path = Path(folder) / CALIBRATION
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["kind"] == "isotonic":
            raise ValueError("an older version fitted it on all candidates, so it overrates the best of several")
        if values["kind"] != KIND:
            raise ValueError(f"it is of another kind than {KIND!r}")
        maps = tuple(_parse_map(one) for one in values["maps"])
        calibration = Calibration(maps, metric=str(values["metric"]), fitted_on=int(values["fitted_on"]))
        sizes = [one.n for one in maps]
        if sizes[:1] != [1] or any(after <= before for before, after in pairwise(sizes)):
            raise ValueError("its n do not begin at 1 and rise")
    except (ValueError, TypeError, KeyError) as error:
        raise FolderError(f"{path}: is not a calibration ({error}); evaluate again, or delete it") from error
    return calibration


class _MapValues(TypedDict):
    n: object
    scores: Sequence[float]
    expected: Sequence[float]


def _parse_map(values: _MapValues) -> PickMap:
    """ValueError, TypeError or KeyError where it is not a monotone map to 0 to 1."""
    scores, expected = tuple(map(float, values["scores"])), tuple(map(float, values["expected"]))
    if not scores or len(scores) != len(expected):
        raise ValueError("it has not as many scores as labels")
    if not np.isfinite([*scores, *expected]).all() or min(expected) < 0 or max(expected) > 1:
        raise ValueError("its points are not finite scores and labels of 0 to 1")
    if any(np.diff(row).min(initial=0) < 0 for row in (scores, expected)):
        raise ValueError("its points do not rise")
    n = values["n"]
    if not isinstance(n, int) or isinstance(n, bool):
        raise ValueError("its n are not whole numbers")
    return PickMap(n, scores, expected)


def _interpolate(one: PickMap, scores: Sequence[float]) -> NDArray[np.float64]:
    return np.interp(scores, one.scores, one.expected)


PROBE = "probe.json"
Triple = tuple[str, str, float]
"""(instruction, response, score)."""


def read_probe(folder: str | Path) -> list[Triple]:
    """The (instruction, response, score) triples of a folder; [] where it has none, FolderError if damaged."""
    path = Path(folder) / PROBE
    if not path.is_file():
        return []
    try:
        triples = json.loads(path.read_text(encoding="utf-8"))
        stored = [(instruction, response, float(score)) for instruction, response, score in triples]
        if not all(isinstance(text, str) for triple in stored for text in triple[:2]):
            raise ValueError("a text is none")
    except (ValueError, TypeError) as error:
        raise FolderError(f"{path}: holds no stored pairs ({error}); evaluate again, or delete it") from error
    return stored
