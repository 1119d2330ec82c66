"""One response per row, several rows per prompt: gathered into one instance, so that there is a choice."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from cappy.errors import RecordError
from cappy.preparation.rows import Row, hash64

Rows = Callable[[], Iterator[Row]]
Wanted = Literal["auto", "always", "never"]
MAX_HELD_CHARACTERS = 512 * 2**20
"""Of responses whose prompt comes again further down."""


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """How often each prompt comes, where it comes more than once; and what all that makes."""

    rows: int
    instances: int
    counts: Counter[int] = field(default_factory=Counter)

    @property
    def needed(self) -> bool:
        """Whether any rows belong together."""
        return self.rows > self.instances


def survey_groups(rows: Rows, wanted: Wanted) -> Grouping:
    """Reads a source once for the rows that belong together, 8 bytes of each; none where `wanted` is never.

    With auto, nothing is gathered unless every row has exactly one response: reading ends at the first that has not.
    """
    keys: list[int] = []
    for found in rows() if wanted != "never" else ():
        if wanted == "auto" and len(found.instance.candidates) != 1:
            keys = []
            break
        keys.append(_key(found))
    hashes, numbers = np.unique(np.array(keys, dtype=np.uint64), return_counts=True)
    many = numbers > 1
    counts = Counter(dict(zip(hashes[many].tolist(), numbers[many].tolist(), strict=True)))
    return Grouping(rows=len(keys), instances=len(hashes), counts=counts)


def gathered(rows: Rows, grouping: Grouping) -> Iterator[Row]:
    """The rows, those of one prompt as one: its candidates in the order of the file, at the place of the last row.

    RecordError where so much is held at once that memory would run out.
    """
    left, held, characters = Counter(grouping.counts), dict[int, Row](), 0
    for found in rows():
        key = _key(found)
        if key not in left:
            yield found
            continue
        left[key] -= 1
        if key in held:
            earlier = held.pop(key)
            characters -= _size(earlier)
            found = _joined(earlier, found)
        if left[key]:
            held[key] = found
            characters += _size(found)
            if characters > MAX_HELD_CHARACTERS:
                remedy = "sort the file by prompt, or set --group-responses never"
                raise RecordError(f"{found.where}: rows of one prompt stand too far apart to be gathered; {remedy}")
        else:
            yield found


def _joined(first: Row, second: Row) -> Row:
    candidates = first.instance.candidates + second.instance.candidates
    return replace(first, instance=replace(first.instance, candidates=candidates))


def _size(row: Row) -> int:
    return sum(len(candidate.response) for candidate in row.instance.candidates) + len(row.instance.instruction)


def _key(row: Row) -> int:
    """Equal for rows that are one instance but for their responses: their ids and groups may be row numbers."""
    one = row.instance
    rated = all(candidate.labels for candidate in one.candidates)
    parts = (one.instruction, one.references, one.choices, one.task, one.template, one.split, row.has_split, rated)
    return hash64(repr(parts))
