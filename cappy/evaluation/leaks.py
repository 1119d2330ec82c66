"""What reported instances were used for before: a scorer's training, or the tests of other versions.

Leaks are found by prompt, by group and by the text of a row. Of the groups that a version was tested on a sketch is
kept that fits into a tag: the smallest hashes of the set (bottom-k; Cohen and Kaplan, 2007). Up to `SKETCH_SIZE` groups
are all there, and of more the share that two sets have in common is estimated with a standard error of about 2 %.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
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
SKETCH_SIZE = 512
_DIGITS = 8
_IDENTITY = 8
"""Characters from which on a group's id is taken to name the row: a shorter one may be its number in some file."""


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


def sketch(instances: Iterable[Instance]) -> str:
    """The sketch of the groups of these instances: hashes of 8 hexadecimal digits each, in ascending order."""
    return _joined({_hash(instance) for instance in instances})


def merged(one: str, other: str) -> str:
    """The sketch of the groups of both."""
    return _joined(set(_split(one)) | set(_split(other)))


def shared(current: str, earlier: str) -> float:
    """The share, 0 to 1, of the groups of `current` that `earlier` has too."""
    own, others = _split(current), _split(earlier)
    if not own or not others:
        return 0.0
    # Of a set that was cut nothing is known beyond its highest hash.
    known = min((hashes[-1] for hashes in (own, others) if len(hashes) == SKETCH_SIZE), default="g")
    compared = [one for one in own if one <= known]
    return len(set(compared) & set(others)) / len(compared) if compared else 0.0


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


def _hash(instance: Instance) -> str:
    named = len(instance.group_id) >= _IDENTITY
    identity = instance.group_id if named else f"{prompt_hash(instance.instruction):016x}"
    return hashlib.sha256(identity.encode()).hexdigest()[:_DIGITS]


def _joined(hashes: set[str]) -> str:
    return "".join(sorted(hashes)[:SKETCH_SIZE])


def _split(text: str) -> list[str]:
    return [text[start : start + _DIGITS] for start in range(0, len(text), _DIGITS)]
