"""Out-of-fold scores: what a cross-fitted report leaves beside a scorer, so that another recipe is compared with it.

Two recipes are compared on the picks of the same instances with the same candidates, each made by a scorer that saw
neither. The file travels with the registered version.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from cappy.errors import FolderError, shown
from cappy.evaluation.pools import Pool, Vector

OUT_OF_FOLD = "out_of_fold.json"


@dataclass(frozen=True, kw_only=True)
class OutOfFold:
    """Scores by pool (see `identity`), each made by a scorer that was trained on the other folds.

    `leaks` counts the instances that were tested by a scorer which had been trained on their prompt.
    """

    metric: str
    folds: int
    leaks: int
    scores: Mapping[str, Sequence[float]]

    def of(self, pools: Sequence[Pool], metric: str) -> list[Vector] | str:
        """The scores of these pools' candidates, or why they cannot be compared."""
        if metric != self.metric:
            return f"its out-of-fold picks are by {self.metric}, this report is by {metric}"
        known = [identity(pool) in self.scores for pool in pools]
        if not all(known) or len(pools) != len(self.scores):
            return (
                f"its out-of-fold picks are of {len(self.scores)} instances, this report is on {len(pools)}, and "
                f"{sum(known)} of them are the same with the same candidates"
            )
        return [np.array(self.scores[identity(pool)], dtype=np.float64) for pool in pools]


def identity(pool: Pool) -> str:
    """A hash of what is picked from: the instance, its instruction and its candidates in their order."""
    instance = pool.instance
    parts = [instance.instance_id, instance.group_id, instance.instruction, *pool.responses]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def to_json(pools: Sequence[Pool], scores: Sequence[Vector], *, metric: str, folds: int, leaks: int) -> str:
    """The text of out_of_fold.json. FolderError where two instances are the same."""
    rows = {identity(pool): values.tolist() for pool, values in zip(pools, scores, strict=True)}
    if len(rows) != len(pools):
        twice, _ = Counter(identity(pool) for pool in pools).most_common(1)[0]
        name = next(pool.instance.instance_id for pool in pools if identity(pool) == twice)
        raise FolderError(f"instance {shown(name)} stands in the data twice; prepare the instances again")
    values = {"metric": metric, "folds": folds, "leaks": leaks, "scores": rows}
    return json.dumps(values, allow_nan=False) + "\n"


def read_out_of_fold(folder: Path) -> OutOfFold | None:
    """The out-of-fold scores beside a scorer, None if there are none; FolderError if the file is damaged."""
    path = folder / OUT_OF_FOLD
    if not path.is_file():
        return None
    try:
        return TypeAdapter(OutOfFold).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise FolderError(f"{path}: {place}: {first['msg']}; evaluate again with --folds") from error
