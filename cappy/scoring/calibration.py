"""Calibration: a map from scores to what they are worth, kept beside a scorer as calibration.json.

It never changes a pick: it is monotone, and where it is flat the scores decide.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cappy.errors import FolderError

CALIBRATION = "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """A monotone, piecewise linear map through the points (`scores[i]`, `expected[i]`), level outside of them.

    `metric` names the label that is expected, `fitted_on` how many held-out candidates it was fitted on.
    """

    scores: tuple[float, ...]
    expected: tuple[float, ...]
    metric: str
    fitted_on: int

    def apply(self, scores: Sequence[float]) -> list[float]:
        """The expected label, 0 to 1, of candidates with these scores."""
        values: list[float] = np.interp(scores, self.scores, self.expected).tolist()
        return values

    def to_json(self) -> str:
        """The text of calibration.json."""
        values = {
            "kind": "isotonic",
            "metric": self.metric,
            "fitted_on": self.fitted_on,
            "scores": self.scores,
            "expected": self.expected,
        }
        return json.dumps(values, indent=1) + "\n"


def read_calibration(folder: str | Path) -> Calibration | None:
    """The calibration in a scorer's or a report's folder, None if there is none; FolderError if it is damaged."""
    path = Path(folder) / CALIBRATION
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        scores, expected = (tuple(float(value) for value in values[name]) for name in ("scores", "expected"))
        found = Calibration(scores, expected, metric=str(values["metric"]), fitted_on=int(values["fitted_on"]))
        if values["kind"] != "isotonic" or not scores or len(scores) != len(expected):
            raise ValueError("it has not as many scores as labels")
        if any(np.diff(row).min(initial=0) < 0 for row in (scores, expected)):
            raise ValueError("its points do not rise")
    except (ValueError, TypeError, KeyError) as error:
        raise FolderError(f"{path}: is no calibration ({error}); evaluate again, or delete it") from error
    return found
