"""Two files that an evaluation writes for a scorer: its calibration, and scored pairs for verifying a deployment.

The calibration (calibration.json) maps the score of the best of n candidates to its expected label. The map depends on
n, because the highest of several scores is biased upwards. It is fitted on all subsets of n candidates of a pool, where
equal responses count separately, and applied with n = the number of distinct candidates that were scored. It never
changes a pick: for every n it is monotone in the score, and where it is flat, the scores decide.

The verification pairs (probe.json) are pairs with their scores. A deployment scores them again and compares the scores.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from cappy.errors import FolderError, quote
from cappy.untrusted import JSON

CALIBRATION = "calibration.json"
KIND = "picks"
"""The kind of calibration that is fitted on picks."""


@dataclass(frozen=True)
class PickMap:
    """The expected label of the best of `n`: piecewise linear in (`scores`, `expected`), constant outside."""

    n: int
    scores: tuple[float, ...]
    expected: tuple[float, ...]


@dataclass(frozen=True)
class Calibration:
    """Monotone maps for several n, ascending from 1; values for other n are interpolated.

    `metric` names the label. `fitted_on` is a number: that of the held-out groups that the maps were fitted on.
    """

    maps: tuple[PickMap, ...]
    metric: str
    fitted_on: int

    def apply(self, scores: Sequence[float], *, n: int) -> list[float]:
        """The expected label, 0 to 1, for each score if it is the best of `n` distinct candidates.

        A pair that is scored alone is the best of 1. Interpolation is linear in log(n); above the largest fitted n, the
        map of that n is used. Raises ValueError if n is below 1.
        """
        if n < 1:
            raise ValueError(f"n: must be at least 1, got {n}")
        sizes = np.log([each.n for each in self.maps])
        position = float(np.interp(np.log(n), sizes, np.arange(len(self.maps))))
        below = int(position)
        share = position - below
        values = _interpolate(self.maps[below], scores)
        if share:
            values = (1 - share) * values + share * _interpolate(self.maps[below + 1], scores)
        expected: list[float] = values.tolist()
        return expected

    def to_dict(self) -> dict[str, JSON]:
        """The values of calibration.json."""
        maps: list[JSON] = [
            {"n": each.n, "scores": list(each.scores), "expected": list(each.expected)} for each in self.maps
        ]
        return {"kind": KIND, "metric": self.metric, "fitted_on": self.fitted_on, "maps": maps}

    def to_json(self) -> str:
        """The text of calibration.json."""
        return json.dumps(self.to_dict(), indent=1) + "\n"


def read_calibration(folder: str | Path) -> Calibration | None:
    """Reads the calibration in a scorer's or a report's folder; None if there is none.

    Raises FolderError if it is damaged, or of the older kind that was fitted on all candidates and overestimates picks.
    """
    path = Path(folder) / CALIBRATION
    if not path.is_file():
        return None
    try:
        return parse_calibration(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        raise FolderError(f"{path}: is not a calibration ({error}); evaluate again, or delete it") from error


def parse_calibration(values: Mapping[str, Any]) -> Calibration:
    """The calibration with these values of calibration.json. Raises ValueError, TypeError or KeyError if it is none."""
    if values["kind"] == "isotonic":
        raise ValueError("an older version fitted it on all candidates, so it overestimates the best of several")
    if values["kind"] != KIND:
        raise ValueError(f"expected the kind {KIND!r}, got {quote(values['kind'])}")
    maps = tuple(_parse_map(each) for each in values["maps"])
    sizes = [each.n for each in maps]
    if sizes[:1] != [1] or any(after <= before for before, after in pairwise(sizes)):
        raise ValueError("its values of n must start at 1 and increase")
    return Calibration(maps, metric=str(values["metric"]), fitted_on=int(values["fitted_on"]))


class _MapValues(TypedDict):
    n: object
    scores: Sequence[float]
    expected: Sequence[float]


def _parse_map(values: _MapValues) -> PickMap:
    """Converts the values of a map.

    Raises ValueError, TypeError or KeyError if they are not a monotone map into [0, 1].
    """
    scores, expected = tuple(map(float, values["scores"])), tuple(map(float, values["expected"]))
    if not scores or len(scores) != len(expected):
        raise ValueError("a map must have as many scores as labels, and at least one")
    if not np.isfinite([*scores, *expected]).all() or min(expected) < 0 or max(expected) > 1:
        raise ValueError("scores must be finite and labels 0 to 1")
    if any(np.diff(row).min(initial=0) < 0 for row in (scores, expected)):
        raise ValueError("scores and labels must not decrease")
    n = values["n"]
    if not isinstance(n, int) or isinstance(n, bool):
        raise ValueError("n must be an integer")
    return PickMap(n, scores, expected)


def _interpolate(pick_map: PickMap, scores: Sequence[float]) -> NDArray[np.float64]:
    return np.interp(scores, pick_map.scores, pick_map.expected)


VERIFICATION_PAIRS = "probe.json"
"""File of the verification pairs."""
ScoredPair = tuple[str, str, float]
"""(instruction, response, score)."""


def read_verification_pairs(folder: str | Path) -> list[ScoredPair]:
    """Reads the verification pairs of a folder; [] if it has none. Raises FolderError if they are damaged."""
    path = Path(folder) / VERIFICATION_PAIRS
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        scored_pairs = [(instruction, response, float(score)) for instruction, response, score in rows]
        if not all(isinstance(text, str) for scored_pair in scored_pairs for text in scored_pair[:2]):
            raise ValueError("instruction and response must be texts")
    except (ValueError, TypeError) as error:
        raise FolderError(f"{path}: is not a list of scored pairs ({error}); evaluate again, or delete it") from error
    return scored_pairs
