"""Removes training rows that leak held-out data: near-duplicates of held-out rows, and rows of an evaluation set.

The criterion is that of `cappy.scoring.training_data`, which checks a scorer after training, so a scorer trained on
the remaining rows passes that check. Only rows of train and validation are dropped, never those of test.

If more than `MAX_DROPPED_SHARE` of those rows would be dropped (for example, because five questions on one passage are
in five groups), near-duplicates are merged into one group instead and the splits are drawn again. That moves rows
between splits, so it is not done if few rows would be dropped, or if too few groups would remain.
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
"""Largest share of train and validation rows to drop; above it, near-duplicates are merged into groups instead."""
_NEAR_DUPLICATE_SHARE = 0.55
"""A training prompt with at least this share of a held-out row's shingles is a near-duplicate; see `HeldOutSample`."""
SAMPLED_ROWS = 256
"""Number of training rows of each table of a mixture that are added to `HeldOutSample`."""
_COLUMNS = ["instruction", "task", "group_id"]


def describe_dropped(count: int, total: int) -> str:
    """The warning for `count` dropped near-duplicates among `total` rows."""
    dropped = f"dropped {count:,} of {total:,} rows of train and validation, which are near-duplicates of held-out rows"
    return f"{dropped}; to keep them, give rows that belong together the same group_id"


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
        """Returns the hashes of train and validation prompts that nearly duplicate a held-out row.

        Test is held out from train and validation; validation is held out from train. Dropping rows changes which
        shingles count as part of a template, so the check is repeated until it finds nothing. Rows whose exact prompt
        is held out are treated as dropped already.
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
    """Returns a hash for each row, shape [num_rows], that a row shares with its near-duplicates.

    `prompts` are the hashes of the rows' prompts. `rows` is called twice. Rows are compared with a sample of at most
    32,768 rows.
    """
    sample = RowSample(max_rows=MAX_ROWS)
    for row in rows():
        sample.add(row)
    sample.truncate()
    indexes, table = own_shingles(sample.rows)
    row_index = RowIndex(Rows(table))
    sampled_prompts = np.array([sample.rows[index].prompt for index in indexes], dtype=np.uint64)
    frequent = frequent_hashes((row.group, sorted_unique(row.shingles)) for row in sample.rows)
    parents: dict[int, int] = {}

    for prompt, row in zip(prompts.tolist(), rows(), strict=False):
        matches = row_index.match(shingles(row.instruction), group_hash(row), frequent)
        for near_prompt in sampled_prompts[matches].tolist():
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

    Each training row is compared with the sampled held-out rows. Some training rows are sampled too, so that the
    shingles of a template are recognised even if few held-out rows share it. The check after training works the other
    way round: it compares each evaluated row with a sample of the training rows. `_NEAR_DUPLICATE_SHARE` is lower than
    its threshold to make up for that.
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
    """Held-out data that no instance of a split may contain: sorted hashes of prompts and groups, and near-duplicates.

    If all rows were compared, `near_prompts` has the prompt hashes of the near-duplicates; otherwise `row_index` finds
    them.
    """

    prompts: "array[int]" = field(default_factory=partial(array, "Q"))
    groups: "array[int]" = field(default_factory=partial(array, "Q"))
    near_prompts: "array[int]" = field(default_factory=partial(array, "Q"))
    row_index: RowIndex | None = None

    def has_prompt(self, instruction: str) -> bool:
        """Whether the prompt is held out."""
        return _contains(self.prompts, prompt_hash(instruction))

    def has_near_duplicate(self, instance: Instance) -> bool:
        """Whether the instance belongs to a held-out group or nearly duplicates a held-out row."""
        group = group_hash(instance)
        if _contains(self.groups, group) or _contains(self.near_prompts, prompt_hash(instance.instruction)):
            return True
        if self.row_index is None:
            return False
        return len(self.row_index.match(shingles(instance.instruction), group, share=_NEAR_DUPLICATE_SHARE)) > 0


def sort_hashes(hashes: "array[int]") -> "array[int]":
    """The hashes sorted, without duplicates."""
    return array("Q", np.unique(np.array(hashes, dtype=np.uint64)).tobytes())


def _contains(hashes: "array[int]", value: int) -> bool:
    index = bisect_left(hashes, value)
    return index < len(hashes) and hashes[index] == value


def filter_leaked(
    instances: Iterable[Instance], folders: Sequence[Path], counts: Counter[str], *, drop: bool
) -> Iterator[Instance]:
    """Yields the instances, except those of train and validation that occur in the evaluation sets in `folders`.

    With `drop` these are dropped and counted in `counts`; otherwise RecordError is raised for the first one.
    `prompt_hash` and `cappy.records.overlap` define which instances count as equal.
    """
    if not folders:
        yield from instances
        return
    held_out, row_index = _read_evaluation_sets(folders)
    for instance in instances:
        problem = "" if instance.split == "test" else _describe_leak(instance, held_out, row_index)
        if problem:
            if not drop:
                names = ", ".join(map(str, folders))
                leak = f"instance {quote(instance.instance_id)} of split {instance.split} {problem} of {names}"
                raise RecordError(f"{leak}; drop such instances with --leaked drop, or fix the data")
            counts["dropped_leaked"] += 1
            continue
        yield instance


def _read_evaluation_sets(folders: Sequence[Path]) -> tuple[Exclusions, RowIndex]:
    """The prompts and groups of all evaluation sets, and an index of their rows."""
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


def _describe_leak(instance: Instance, held_out: Exclusions, row_index: RowIndex) -> str:
    """Describes what an instance shares with an evaluation set, for an error; empty if it shares nothing."""
    if held_out.has_prompt(instance.instruction):
        return "has the prompt of an instance"
    if is_content_id(instance.group_id) and _contains(held_out.groups, group_hash(instance)):
        return "belongs to a group"
    return "contains the text of a row" if row_index.has_row_in(instance) else ""
