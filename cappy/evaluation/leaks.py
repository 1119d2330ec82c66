"""Which reported instances a scorer was trained on: found by prompt, by group and by the text of a row."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cappy.records import Instance, prompt_hash
from cappy.records.overlap import RowIndex, TrainingData, frequent_shingles
from cappy.scoring.training_data import content_groups

Known = TrainingData | npt.NDArray[np.uint64]
"""What is known of a scorer's training: all that its folder keeps, or the sorted hashes of its prompts alone."""
TrainedOn = Callable[[Path], Known]
"""What the scorer in a folder was trained on."""


def seen_in_training(instances: Sequence[Instance], trained_on: Known) -> int:
    """How many of the instances were trained on: the same prompt, group, or row (see `by_kind`)."""
    return int(np.any(list(_found(instances, trained_on).values()), axis=0).sum()) if instances else 0


def by_kind(instances: Sequence[Instance], trained_on: Known) -> dict[str, int]:
    """How many have a prompt that was trained on, a group whose id is made of a trained row, or a trained row's text.

    An instance may count under several. A row's text is found by `cappy.records.overlap`: rows of fewer than about ten
    words of their own are not, nor are rows that were not drawn where there were more than 32,768.
    """
    return {kind: int(found.sum()) for kind, found in _found(instances, trained_on).items()}


def describe_check(instances: Sequence[Instance], known: Mapping[str, Known]) -> dict[str, dict[str, int | str]]:
    """For the manifest, by scorer: what was found under each kind, how much its folder keeps, and what that can see."""
    return {
        name: {
            **{f"found_by_{kind}": count for kind, count in by_kind(instances, data).items()},
            **(data.describe() if isinstance(data, TrainingData) else {"prompts": len(data)}),
        }
        for name, data in known.items()
    }


def _found(instances: Sequence[Instance], trained_on: Known) -> dict[str, npt.NDArray[np.bool_]]:
    known = trained_on if isinstance(trained_on, TrainingData) else None
    prompts = np.array([prompt_hash(instance.instruction) for instance in instances], dtype=np.uint64)
    found = {"prompts": np.isin(prompts, known.prompts if known else np.asarray(trained_on))}
    if known is not None and known.rows is not None:
        groups = content_groups(instances)
        index, frequent = RowIndex(known.rows), frequent_shingles(instances)
        found["groups"] = np.isin(groups, known.groups) & (groups > 0)
        found["rows"] = np.array([index.holds(instance, frequent) for instance in instances], dtype=bool)
    return found
