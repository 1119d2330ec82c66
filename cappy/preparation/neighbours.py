"""Near-duplicates of held-out rows among those to train on: what `cappy.evaluation.leaks` would count after training.

The same functions are asked as there, so that a scorer that is trained on what is left has seen none of the report. A
row of train or validation is left out, and the test split stays as it is: a report on it means what it meant before.
Where more than `MOST_DROPPED` of those rows would go, such as questions on one passage of which each stands in another
group, leaving them out would cost most of the data; then near-duplicates are one group, as equal prompts are, and the
splits are drawn again. That moves rows between splits, so it is not done where leaving out costs little, nor where it
would leave too few groups. Dropping whatever the cost would lose four fifths of a file of five questions a passage;
grouping always would move rows for the sake of two.
"""

from collections.abc import Callable, Iterable

import numpy as np

from cappy.records.overlap import (
    MAX_ROWS,
    Draw,
    Drawn,
    Hashes,
    Prompted,
    RowIndex,
    distinct,
    frequent_of,
    group_hash,
    own_shingles,
    shingles,
    without,
)
from cappy.records.overlap import Rows as Table

MOST_DROPPED = 0.2
"""Share of the rows of train and validation; above it near-duplicates are kept together in place of left out."""
SHARE = 0.55
"""Of a held-out row's shingles, in a prompt to train on that is its near-duplicate; see `HeldOut`."""
SAMPLED_ROWS = 256
"""Rows to train on that `HeldOut` is given of each table of a mixture."""


def left_out_of_training(count: int, of: int) -> str:
    """What is said of so many near-duplicates of held-out rows that are left out."""
    what = f"left out of training: {count:,} of {of:,} rows, near-duplicates of held-out ones"
    return f"{what}; give rows that belong together one group_id to keep them"


class Rows:
    """Rows with their splits, as they come; what of them is left out is known when all have been seen.

    Like the check it knows 32,768 rows to train on, drawn by the hash of their prompt, and as many of each held-out
    split: what is beyond that is not looked at.
    """

    def __init__(self) -> None:
        self._fitted = {split: Draw(most=MAX_ROWS + MAX_ROWS // 4) for split in ("train", "validation")}
        self._held = {split: Draw(most=MAX_ROWS, whole=True) for split in ("validation", "test")}

    def add(self, prompted: Prompted, split: str) -> None:
        """Takes a row of a split."""
        for draws in (self._fitted, self._held):
            if split in draws:
                draws[split].add(prompted)

    def left_out(self) -> set[int]:
        """The hashes of prompts of train and validation that the leak check would find in a split held out further.

        What is left out changes what is a template's among the rest, so the check is asked again until it finds
        nothing. Rows whose very prompt is held out further are taken as gone already.
        """
        for draw in (*self._fitted.values(), *self._held.values()):
            draw.cut()
        test = self._held["test"].held
        in_test = {row.prompt for row in test}
        validation = [row for row in self._held["validation"].held if row.prompt not in in_test]
        held = in_test | {row.prompt for row in validation}
        fitted = [row for row in self._fitted["train"].held if row.prompt not in held]
        fitted += [row for row in self._fitted["validation"].held if row.prompt not in in_test]
        return _dropped(sorted(fitted, key=lambda row: row.prompt), validation, test)


def _dropped(fitted: list[Drawn], validation: list[Drawn], test: list[Drawn]) -> set[int]:
    dropped: set[int] = set()
    test = _own(test)
    while True:
        fixed = {row.prompt for row in validation}
        held = [*test, *_own(validation)]
        if not held:
            return dropped
        numbers, table = own_shingles(fitted[:MAX_ROWS], distinct(np.concatenate([row.shingles for row in held])))
        index = RowIndex(Table(table))
        prompts = np.array([fitted[number].prompt for number in numbers], dtype=np.uint64)
        found: set[int] = set()
        for number, row in enumerate(held):
            near = {int(prompt) for prompt in prompts[index.found(row.shingles, row.group)]}
            found |= near if number < len(test) else near - fixed
        if not found:
            return dropped
        dropped |= found
        fitted = [row for row in fitted if row.prompt not in found]
        validation = [row for row in validation if row.prompt not in found]


def _own(rows: list[Drawn]) -> list[Drawn]:
    """The rows of a split without the shingles of its templates."""
    frequent = frequent_of((row.group, row.shingles) for row in rows)
    return [row._replace(shingles=without(row.shingles, frequent)) for row in rows]


def tied_prompts(prompts: Hashes, rows: Callable[[], Iterable[Prompted]]) -> Hashes:
    """In place of each row's hash of its prompt one of those of its near-duplicates, equal for all of them.

    `rows` is read twice. Of more than 32,768 rows those that are like no drawn row are like none.
    """
    draw = Draw(most=MAX_ROWS)
    for prompted in rows():
        draw.add(prompted)
    draw.cut()
    numbers, table = own_shingles(draw.held)
    index = RowIndex(Table(table))
    drawn = np.array([draw.held[number].prompt for number in numbers], dtype=np.uint64)
    frequent = frequent_of((row.group, distinct(row.shingles)) for row in draw.held)
    parents: dict[int, int] = {}

    def root(prompt: int) -> int:
        while (parent := parents.get(prompt, prompt)) != prompt:
            parents[prompt] = prompt = parents.get(parent, parent)
        return prompt

    for prompt, prompted in zip(prompts.tolist(), rows(), strict=False):
        for other in drawn[index.found(shingles(prompted.instruction), group_hash(prompted), frequent)].tolist():
            low, high = sorted((root(prompt), root(other)))
            parents[high] = low
    return np.fromiter(map(root, prompts.tolist()), dtype=np.uint64, count=len(prompts))


class HeldOut:
    """Rows that are held out, as they come, for a source whose rows to train on are too many to make twice.

    Some rows to train on are taken too, so that a template that few held-out rows have is known as one. The check looks
    the other way round, from the report to all that was trained on: `SHARE` is lower than its own to make up for that.
    """

    def __init__(self) -> None:
        self._draws = {split: Draw(most=MAX_ROWS) for split in ("train", "validation", "test")}

    def add(self, prompted: Prompted, split: str) -> None:
        """Takes a row of a split."""
        self._draws[split].add(prompted)

    def index(self, *splits: str) -> RowIndex:
        """What finds the rows of these splits."""
        held = [row for split in splits for row in self._cut(split)]
        others = [row for split in self._draws if split not in splits for row in self._cut(split)]
        numbers, table = own_shingles([*held, *others])
        return RowIndex(Table(table[: sum(number < len(held) for number in numbers)]))

    def _cut(self, split: str) -> list[Drawn]:
        self._draws[split].cut()
        return self._draws[split].held
