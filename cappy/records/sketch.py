"""Sketches of sets of groups that fit into a tag, and what two sets have in common.

A sketch is the smallest hashes of the set (bottom-k; Cohen and Kaplan, 2007). Up to `SKETCH_SIZE` groups are all there,
and of more the share that two sets have in common is estimated with a standard error of about 2 %.
"""

import hashlib
from collections.abc import Iterable

from cappy.records.instance import Instance, prompt_hash

SKETCH_SIZE = 512
_DIGITS = 8
_IDENTITY = 8
"""Characters from which on a group's id is taken to name the row: a shorter one may be its number in some file."""


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


def _hash(instance: Instance) -> str:
    named = len(instance.group_id) >= _IDENTITY
    identity = instance.group_id if named else f"{prompt_hash(instance.instruction):016x}"
    return hashlib.sha256(identity.encode()).hexdigest()[:_DIGITS]


def _joined(hashes: set[str]) -> str:
    return "".join(sorted(hashes)[:SKETCH_SIZE])


def _split(text: str) -> list[str]:
    return [text[start : start + _DIGITS] for start in range(0, len(text), _DIGITS)]
