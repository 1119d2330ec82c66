"""What training may not see: near-duplicates of held-out rows of its own source, and rows of an evaluation set.

Near-duplicates are what `cappy.scoring.training_data` would count after training. The same functions are asked as
there, so that a scorer that is trained on what is left has seen none of the report. A row of train or validation is
left out, and the test split stays as it is: a report on it means what it meant before. Where more than `MOST_DROPPED`
of those rows would go, such as questions on one passage of which each stands in another group, leaving them out would
cost most of the data; then near-duplicates are one group, as equal prompts are, and the splits are drawn again. That
moves rows between splits, so it is not done where leaving out costs little, nor where it would leave too few groups.
Dropping whatever the cost would lose four fifths of a file of five questions a passage; grouping always would move rows
for the sake of two.
"""

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from cappy.errors import RecordError, quote
from cappy.records import Instance, prompt_hash, read_batches
from cappy.records.overlap import (
    MAX_ROWS,
    Hashes,
    Prompt,
    PromptLike,
    RowIndex,
    Rows,
    RowSample,
    SampledRow,
    exclude,
    frequent_hashes,
    group_hash,
    is_content_id,
    own_shingles,
    shingles,
    sketch_rows,
    sorted_unique,
)

MOST_DROPPED = 0.2
"""Share of the rows of train and validation; above it near-duplicates are kept together in place of left out."""
_SHARE = 0.55
"""Of a held-out row's shingles, in a prompt to train on that is its near-duplicate; see `Exclusions`."""
SAMPLED_ROWS = 256
"""Rows to train on that `HeldOut` is given of each table of a mixture."""
_COLUMNS = ["instruction", "task", "group_id"]


def describe_left_out(count: int, of: int) -> str:
    """What is said of so many near-duplicates of held-out rows that are left out."""
    what = f"left out of training: {count:,} of {of:,} rows, near-duplicates of held-out ones"
    return f"{what}; give rows that belong together one group_id to keep them"


class SplitRows:
    """Rows with their splits, as they come; what of them is left out is known when all have been seen.

    Like the check it knows 32,768 rows to train on, drawn by the hash of their prompt, and as many of each held-out
    split: what is beyond that is not looked at.
    """

    def __init__(self) -> None:
        self._fitted = {split: RowSample(max_rows=MAX_ROWS + MAX_ROWS // 4) for split in ("train", "validation")}
        self._held = {split: RowSample(max_rows=MAX_ROWS, all_shingles=True) for split in ("validation", "test")}

    def add(self, prompted: PromptLike, split: str) -> None:
        """Takes a row of a split."""
        for draws in (self._fitted, self._held):
            if split in draws:
                draws[split].add(prompted)

    def find_leaks(self) -> set[int]:
        """The hashes of prompts of train and validation that the leak check would find in a split held out further.

        What is left out changes what is a template's among the rest, so the check is asked again until it finds
        nothing. Rows whose very prompt is held out further are taken as gone already.
        """
        for draw in (*self._fitted.values(), *self._held.values()):
            draw.truncate()
        test = self._held["test"].rows
        in_test = {row.prompt for row in test}
        validation = [row for row in self._held["validation"].rows if row.prompt not in in_test]
        held = in_test | {row.prompt for row in validation}
        fitted = [row for row in self._fitted["train"].rows if row.prompt not in held]
        fitted += [row for row in self._fitted["validation"].rows if row.prompt not in in_test]
        return _find_leaks(sorted(fitted, key=lambda row: row.prompt), validation, test)


def _find_leaks(fitted: list[SampledRow], validation: list[SampledRow], test: list[SampledRow]) -> set[int]:
    dropped: set[int] = set()
    test = _own(test)
    while True:
        fixed = {row.prompt for row in validation}
        held = [*test, *_own(validation)]
        if not held:
            return dropped
        numbers, table = own_shingles(fitted[:MAX_ROWS], sorted_unique(np.concatenate([row.shingles for row in held])))
        index = RowIndex(Rows(table))
        prompts = np.array([fitted[number].prompt for number in numbers], dtype=np.uint64)
        beside: set[int] = set()
        for number, row in enumerate(held):
            near = {int(prompt) for prompt in prompts[index.match(row.shingles, row.group)]}
            beside |= near if number < len(test) else near - fixed
        if not beside:
            return dropped
        dropped |= beside
        fitted = [row for row in fitted if row.prompt not in beside]
        validation = [row for row in validation if row.prompt not in beside]


def _own(rows: list[SampledRow]) -> list[SampledRow]:
    """The rows of a split without the shingles of its templates."""
    frequent = frequent_hashes((row.group, row.shingles) for row in rows)
    return [row._replace(shingles=exclude(row.shingles, frequent)) for row in rows]


def tied_prompts(prompts: Hashes, rows: Callable[[], Iterable[PromptLike]]) -> Hashes:
    """In place of each row's hash of its prompt one of those of its near-duplicates, equal for all of them.

    `rows` is read twice. Of more than 32,768 rows those that are like no drawn row are like none.
    """
    draw = RowSample(max_rows=MAX_ROWS)
    for prompted in rows():
        draw.add(prompted)
    draw.truncate()
    numbers, table = own_shingles(draw.rows)
    index = RowIndex(Rows(table))
    drawn = np.array([draw.rows[number].prompt for number in numbers], dtype=np.uint64)
    frequent = frequent_hashes((row.group, sorted_unique(row.shingles)) for row in draw.rows)
    parents: dict[int, int] = {}

    for prompt, prompted in zip(prompts.tolist(), rows(), strict=False):
        for other in drawn[index.match(shingles(prompted.instruction), group_hash(prompted), frequent)].tolist():
            low, high = sorted((root_of(prompt, parents), root_of(other, parents)))
            parents[high] = low
    roots = (root_of(prompt, parents) for prompt in prompts.tolist())
    return np.fromiter(roots, dtype=np.uint64, count=len(prompts))


def root_of(member: int, parents: dict[int, int]) -> int:
    """The member that stands for all that are tied to this one; the paths to it are shortened."""
    while (parent := parents.get(member, member)) != member:
        parents[member] = member = parents.get(parent, parent)
    return member


class HeldOut:
    """Rows that are held out, as they come, for a source whose rows to train on are too many to make twice.

    Some rows to train on are taken too, so that a template that few held-out rows have is known as one. The check looks
    the other way round, from the report to all that was trained on: `_SHARE` is lower than its own to make up for that.
    """

    def __init__(self) -> None:
        self._draws = {split: RowSample(max_rows=MAX_ROWS) for split in ("train", "validation", "test")}

    def add(self, prompted: PromptLike, split: str) -> None:
        """Takes a row of a split."""
        self._draws[split].add(prompted)

    def index(self, *splits: str) -> RowIndex:
        """What finds the rows of these splits."""
        held = [row for split in splits for row in self._bounded_rows(split)]
        others = [row for split in self._draws if split not in splits for row in self._bounded_rows(split)]
        numbers, table = own_shingles([*held, *others])
        return RowIndex(Rows(table[: sum(number < len(held) for number in numbers)]))

    def _bounded_rows(self, split: str) -> list[SampledRow]:
        self._draws[split].truncate()
        return self._draws[split].rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Exclusions:
    """What no instance of a split may have: sorted hashes of prompts and of groups, and the text of rows.

    `near_prompts` are those of near-duplicates, where all rows were looked at; else `rows` finds them.
    """

    prompts: "array[int]" = field(default_factory=partial(array, "Q"))
    groups: "array[int]" = field(default_factory=partial(array, "Q"))
    near_prompts: "array[int]" = field(default_factory=partial(array, "Q"))
    rows: RowIndex | None = None

    def has_prompt(self, instruction: str) -> bool:
        """Whether a prompt is one that is held out."""
        return _has(self.prompts, prompt_hash(instruction))

    def has_near_duplicate(self, instance: Instance) -> bool:
        """Whether an instance is of a group that is held out, or a near-duplicate of a row that is."""
        group = group_hash(instance)
        if _has(self.groups, group) or _has(self.near_prompts, prompt_hash(instance.instruction)):
            return True
        return self.rows is not None and len(self.rows.match(shingles(instance.instruction), group, share=_SHARE)) > 0


def sort_hashes(hashes: "array[int]") -> "array[int]":
    """The hashes in order, each once."""
    return array("Q", np.unique(np.array(hashes, dtype=np.uint64)).tobytes())


def _has(hashes: "array[int]", value: int) -> bool:
    index = bisect_left(hashes, value)
    return index < len(hashes) and hashes[index] == value


def keep_apart(
    instances: Iterable[Instance], folders: Sequence[Path], counts: Counter[str], *, drop: bool
) -> Iterator[Instance]:
    """The instances without those of train and validation that stand in an evaluation set, one of these folders.

    They are dropped and counted, or refused: RecordError names the first. See `prompt_hash` and `cappy.records.overlap`
    for what counts as equal.
    """
    if not folders:
        yield from instances
        return
    held, rows = _read_evaluation_sets(folders)
    for instance in instances:
        what = "" if instance.split == "test" else _describe_leak(instance, held, rows)
        if what:
            if not drop:
                where = ", ".join(map(str, folders))
                leak = f"instance {quote(instance.instance_id)} of {instance.split} {what} that stands in {where}"
                raise RecordError(f"{leak}; leave such instances out with --leaked drop, or mend the data")
            counts["dropped_leaked"] += 1
            continue
        yield instance


def _read_evaluation_sets(folders: Sequence[Path]) -> tuple[Exclusions, RowIndex]:
    prompts, groups = array("Q"), array("Q")

    def read() -> Iterator[Prompt]:
        for folder in folders:
            for batch in read_batches(folder, columns=_COLUMNS):
                for row in zip(*(batch[name].to_pylist() for name in _COLUMNS), strict=True):
                    prompt = Prompt(*row)
                    prompts.append(prompt_hash(prompt.instruction))
                    if is_content_id(prompt.group_id):
                        groups.append(group_hash(prompt))
                    yield prompt

    rows = RowIndex(sketch_rows(read()))
    return Exclusions(prompts=sort_hashes(prompts), groups=sort_hashes(groups)), rows


def _describe_leak(instance: Instance, held: Exclusions, rows: RowIndex) -> str:
    """What of an instance stands in an evaluation set, in words; empty if nothing does."""
    if held.has_prompt(instance.instruction):
        return "has a prompt"
    if is_content_id(instance.group_id) and _has(held.groups, group_hash(instance)):
        return "is of a group"
    return "has the text of a row" if rows.holds(instance) else ""
