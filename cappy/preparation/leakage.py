"""Removal of training rows that leak held-out data: near-duplicates of held-out rows, and rows of an evaluation set.

The criterion is that of `cappy.scoring.training_data`, which checks a scorer after training, so a scorer trained on
the remaining rows passes that check. Only rows of train and validation are dropped, never those of test.

Where more than `MAX_DROPPED_SHARE` of those rows would be dropped (for example five questions on one passage, each in
its own group), near-duplicates are merged into one group instead and the splits are drawn again. That moves rows
between splits, so it is not done where dropping costs little, or where too few groups would remain.
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
    GroupedPrompt,
    Hashes,
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

MAX_DROPPED_SHARE = 0.2
"""Share of the rows of train and validation; above it near-duplicates are merged into groups instead of dropped."""
_NEAR_DUPLICATE_SHARE = 0.55
"""Share of a held-out row's shingles that makes a training prompt its near-duplicate; see `HeldOutSample`."""
SAMPLED_ROWS = 256
"""Training rows of each table of a mixture that `HeldOutSample` receives."""
_COLUMNS = ["instruction", "task", "group_id"]


def describe_dropped(count: int, total: int) -> str:
    """The warning for `count` dropped near-duplicates among `total` rows."""
    what = f"dropped {count:,} of {total:,} rows of train and validation, which are near-duplicates of held-out rows"
    return f"{what}; to keep them, give rows that belong together the same group_id"


class SplitRows:
    """Collects rows with their splits, and finds the near-duplicates once all rows have been added.

    Memory is bounded: like the check after training, it samples 32,768 training rows by the hash of their prompt, and
    as many rows of each held-out split.
    """

    def __init__(self) -> None:
        self._training = {split: RowSample(max_rows=MAX_ROWS + MAX_ROWS // 4) for split in ("train", "validation")}
        self._held_out = {split: RowSample(max_rows=MAX_ROWS, all_shingles=True) for split in ("validation", "test")}

    def add(self, row: PromptLike, split: str) -> None:
        """Adds a row of a split."""
        for samples in (self._training, self._held_out):
            if split in samples:
                samples[split].add(row)

    def find_leaks(self) -> set[int]:
        """Hashes of the train and validation prompts to drop, because they nearly duplicate a held-out row.

        Test is held out from validation and train, validation from train. Dropping rows changes which shingles count
        as a template's, so the check is repeated until it finds nothing. Rows whose exact prompt is held out count as
        dropped already.
        """
        for sample in (*self._training.values(), *self._held_out.values()):
            sample.truncate()
        test = self._held_out["test"].rows
        in_test = {row.prompt for row in test}
        validation = [row for row in self._held_out["validation"].rows if row.prompt not in in_test]
        held_out = in_test | {row.prompt for row in validation}
        training_rows = [row for row in self._training["train"].rows if row.prompt not in held_out]
        training_rows += [row for row in self._training["validation"].rows if row.prompt not in in_test]
        return _find_leaks(sorted(training_rows, key=lambda row: row.prompt), validation, test)


def _find_leaks(training_rows: list[SampledRow], validation: list[SampledRow], test: list[SampledRow]) -> set[int]:
    dropped: set[int] = set()
    test = _drop_frequent_shingles(test)
    while True:
        validation_prompts = {row.prompt for row in validation}
        held_out = [*test, *_drop_frequent_shingles(validation)]
        if not held_out:
            return dropped
        indexes, table = own_shingles(
            training_rows[:MAX_ROWS], sorted_unique(np.concatenate([row.shingles for row in held_out]))
        )
        index = RowIndex(Rows(table))
        prompts = np.array([training_rows[position].prompt for position in indexes], dtype=np.uint64)
        near_prompts: set[int] = set()
        for position, row in enumerate(held_out):
            matched = {int(prompt) for prompt in prompts[index.match(row.shingles, row.group)]}
            near_prompts |= matched if position < len(test) else matched - validation_prompts
        if not near_prompts:
            return dropped
        dropped |= near_prompts
        training_rows = [row for row in training_rows if row.prompt not in near_prompts]
        validation = [row for row in validation if row.prompt not in near_prompts]


def _drop_frequent_shingles(rows: list[SampledRow]) -> list[SampledRow]:
    """The rows without the frequent shingles, which belong to templates."""
    frequent = frequent_hashes((row.group, row.shingles) for row in rows)
    return [row._replace(shingles=exclude(row.shingles, frequent)) for row in rows]


def merge_near_duplicates(prompts: Hashes, rows: Callable[[], Iterable[PromptLike]]) -> Hashes:
    """Replaces the prompt hash of each row by one hash that it shares with its near-duplicates, shape [num_rows].

    `rows` is read twice. Rows are compared with a sample of at most 32,768 rows.
    """
    sample = RowSample(max_rows=MAX_ROWS)
    for row in rows():
        sample.add(row)
    sample.truncate()
    indexes, table = own_shingles(sample.rows)
    row_index = RowIndex(Rows(table))
    sampled = np.array([sample.rows[index].prompt for index in indexes], dtype=np.uint64)
    frequent = frequent_hashes((row.group, sorted_unique(row.shingles)) for row in sample.rows)
    parents: dict[int, int] = {}

    for prompt, row in zip(prompts.tolist(), rows(), strict=False):
        near = row_index.match(shingles(row.instruction), group_hash(row), frequent)
        for near_prompt in sampled[near].tolist():
            low, high = sorted((find_root(prompt, parents), find_root(near_prompt, parents)))
            parents[high] = low
    roots = (find_root(prompt, parents) for prompt in prompts.tolist())
    return np.fromiter(roots, dtype=np.uint64, count=len(prompts))


def find_root(member: int, parents: dict[int, int]) -> int:
    """The representative of a member's set in a union-find forest; halves the path to it."""
    while (parent := parents.get(member, member)) != member:
        parents[member] = member = parents.get(parent, parent)
    return member


class HeldOutSample:
    """A sample of the rows of each split, for sources with too many training rows to render them twice.

    Each training row is compared with the sampled held-out rows.

    Some training rows are sampled too, so that the shingles of a template are recognised even if few held-out rows
    share it. The check after training looks for each reported row among the training rows;
    `_NEAR_DUPLICATE_SHARE` is lower than its threshold to make up for that.
    """

    def __init__(self) -> None:
        self._samples = {split: RowSample(max_rows=MAX_ROWS) for split in ("train", "validation", "test")}

    def add(self, row: PromptLike, split: str) -> None:
        """Adds a row of a split."""
        self._samples[split].add(row)

    def build_index(self, *splits: str) -> RowIndex:
        """An index over the sampled rows of these splits."""
        selected = [row for split in splits for row in self._bounded_rows(split)]
        others = [row for split in self._samples if split not in splits for row in self._bounded_rows(split)]
        indexes, table = own_shingles([*selected, *others])
        return RowIndex(Rows(table[: sum(index < len(selected) for index in indexes)]))

    def _bounded_rows(self, split: str) -> list[SampledRow]:
        self._samples[split].truncate()
        return self._samples[split].rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Exclusions:
    """What no instance of a split may have: sorted hashes of prompts and groups, and near-duplicates of rows.

    `near_prompts` lists the near-duplicates where all rows were compared; otherwise `rows` finds them.
    """

    prompts: "array[int]" = field(default_factory=partial(array, "Q"))
    groups: "array[int]" = field(default_factory=partial(array, "Q"))
    near_prompts: "array[int]" = field(default_factory=partial(array, "Q"))
    rows: RowIndex | None = None

    def has_prompt(self, instruction: str) -> bool:
        """Whether the prompt is held out."""
        return _contains(self.prompts, prompt_hash(instruction))

    def has_near_duplicate(self, instance: Instance) -> bool:
        """Whether the instance belongs to a held-out group or nearly duplicates a held-out row."""
        group = group_hash(instance)
        if _contains(self.groups, group) or _contains(self.near_prompts, prompt_hash(instance.instruction)):
            return True
        if self.rows is None:
            return False
        return len(self.rows.match(shingles(instance.instruction), group, share=_NEAR_DUPLICATE_SHARE)) > 0


def sort_hashes(hashes: "array[int]") -> "array[int]":
    """The hashes sorted, without duplicates."""
    return array("Q", np.unique(np.array(hashes, dtype=np.uint64)).tobytes())


def _contains(hashes: "array[int]", value: int) -> bool:
    index = bisect_left(hashes, value)
    return index < len(hashes) and hashes[index] == value


def filter_leaked(
    instances: Iterable[Instance], folders: Sequence[Path], counts: Counter[str], *, drop: bool
) -> Iterator[Instance]:
    """The instances without the train and validation instances that occur in the evaluation sets in `folders`.

    With `drop` they are dropped and counted, else RecordError names the first. `prompt_hash` and
    `cappy.records.overlap` define what counts as equal.
    """
    if not folders:
        yield from instances
        return
    held_out, rows = _read_evaluation_sets(folders)
    for instance in instances:
        what = "" if instance.split == "test" else _describe_leak(instance, held_out, rows)
        if what:
            if not drop:
                where = ", ".join(map(str, folders))
                leak = f"instance {quote(instance.instance_id)} of split {instance.split} {what} of {where}"
                raise RecordError(f"{leak}; drop such instances with --leaked drop, or fix the data")
            counts["dropped_leaked"] += 1
            continue
        yield instance


def _read_evaluation_sets(folders: Sequence[Path]) -> tuple[Exclusions, RowIndex]:
    prompts, groups = array("Q"), array("Q")

    def read() -> Iterator[GroupedPrompt]:
        for folder in folders:
            for batch in read_batches(folder, columns=_COLUMNS):
                for row in zip(*(batch[name].to_pylist() for name in _COLUMNS), strict=True):
                    prompt = GroupedPrompt(*row)
                    prompts.append(prompt_hash(prompt.instruction))
                    if is_content_id(prompt.group_id):
                        groups.append(group_hash(prompt))
                    yield prompt

    rows = RowIndex(sketch_rows(read()))
    return Exclusions(prompts=sort_hashes(prompts), groups=sort_hashes(groups)), rows


def _describe_leak(instance: Instance, held_out: Exclusions, rows: RowIndex) -> str:
    """What an instance shares with an evaluation set, for an error; empty if nothing."""
    if held_out.has_prompt(instance.instruction):
        return "has the prompt of an instance"
    if is_content_id(instance.group_id) and _contains(held_out.groups, group_hash(instance)):
        return "belongs to a group"
    return "contains the text of a row" if rows.has_row_in(instance) else ""
