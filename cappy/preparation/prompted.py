"""Datasets of many prompts per row: templates over a table, or a benchmark's own prompts, streamed to instances.

The rows of a dataset are read once, and once more before that where some are held out: the prompts of held-out rows are
collected first, so that no training instance shares one, or is nearly one (of one dataset up to 32,768 rows to train on
are looked at with them, so that it is known what a scorer would be found to have seen; see `leakage`). Splits go by
the hash of the row itself, so one row under ten templates is one group, and so is a row that stands twice. Nothing but
the hashes of held-out prompts, and shingles of a bounded number, is held in memory.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cappy.errors import RecordError
from cappy.preparation.leakage import SAMPLED_ROWS, Exclusions, RowSample, SplitRows, sort_hashes
from cappy.preparation.rows import Rows, Values, choice_candidates, hash64
from cappy.progress import Progress
from cappy.records import Instance, Split, prompt_hash
from cappy.records.overlap import MAX_ROWS, group_hash
from cappy.records.overlap import Prompt as Text
from cappy.records.work import Shard

MIN_ROWS_TO_REFUSE = 100
"""Rows after which a template that failed on all of them fails the run at once."""
MAX_CONSECUTIVE_LIMITS = 3
"""Rows in a row on which a template may run out of time or memory: each costs seconds."""
_PROGRESS_EVERY = 4_096


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a row is under one template, or as a benchmark has it."""

    instruction: str
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()
    template: str = ""
    original_task: bool = True


@dataclass(slots=True)
class Tally:
    """What is worth knowing afterwards: how often what happened, and each template's failures with the first error.

    A template may fail on a share of `max_failed` of its rows. A row that lacks a field that its template reads is a
    failure where `missing` is fail, and else a hole in the prompt, which is counted.
    """

    max_failed: float = 0.0
    missing: Literal["blank", "fail"] = "blank"
    counts: Counter[str] = field(default_factory=Counter)
    tried: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    errors: dict[str, str] = field(default_factory=dict)
    limited: Counter[str] = field(default_factory=Counter)
    holes: dict[str, str] = field(default_factory=dict)

    def hole(self, name: str, error: str) -> None:
        """A prompt was rendered from a row that lacks a field that its template reads."""
        self.counts["with_missing_fields"] += 1
        self.holes.setdefault(name, error)

    def succeed(self, name: str) -> None:
        """A template did not fail on a row."""
        self.limited.pop(name, None)

    def fail(self, name: str, error: str, *, limited: bool = False) -> None:
        """One more failure of a template; RecordError where it has never done anything else.

        `limited` says that it ran out of time or memory: RecordError where it does that row after row, whatever share
        of rows it may fail on.
        """
        self.failed[name] += 1
        self.counts["failed"] += 1
        self.errors.setdefault(name, error)
        self.limited[name] = self.limited[name] + 1 if limited else 0
        if self.limited[name] == MAX_CONSECUTIVE_LIMITS:
            rows = f"it ran out of time or memory on {MAX_CONSECUTIVE_LIMITS} rows in a row"
            raise RecordError(f"{self.errors[name]}; {rows}: leave the template out with --template")
        if self.max_failed < 1 and self.failed[name] == self.tried[name] == MIN_ROWS_TO_REFUSE:
            self.refuse(name)

    def check(self) -> None:
        """RecordError for the template that failed on the largest share of its rows, if that share is too large."""
        shares = {name: count / self.tried[name] for name, count in self.failed.items()}
        worst = max(shares, key=lambda name: shares[name], default=None)
        if worst is not None and shares[worst] > self.max_failed:
            self.refuse(worst)

    def refuse(self, name: str) -> None:
        """RecordError with the first error of a template."""
        share = f"{self.failed[name]:,} of {self.tried[name]:,} rows"
        remedy = "leave the template out with --template, or raise --max-failed"
        raise RecordError(f"{self.errors[name]}; it failed on {share}: {remedy}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The rows of one split of a dataset, readable again and again; `held_out` makes all of them test."""

    split: str
    rows: Callable[[], Rows]
    held_out: bool = False


LocatedRow = tuple[int, str, Values]
"""A row with its index and the place where it stands."""
Prompts = Callable[[Iterable[LocatedRow], Tally], Iterator[tuple[LocatedRow, list[Prompt]]]]
"""The prompts of each row, in order; it may read rows ahead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A dataset of a source: its tables, and what prompts a row of them makes."""

    name: str
    tables: tuple[Table, ...]
    prompts: Prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRule:
    """Which split each group belongs to, and which rows are this shard's."""

    seed: int
    test: float
    validation: float
    shard: Shard

    def split(self, group: str, table: Table) -> Split:
        """The split of a group: what a table holds out is test, what is left is drawn by the hash."""
        if table.held_out:
            return "test"
        place = hash64(f"{self.seed} {group}") / 2**64
        return "test" if place < self.test else "validation" if place < self.test + self.validation else "train"


def make_instances(
    datasets: Sequence[Dataset], places: SplitRule, tally: Tally, progress: Progress
) -> Iterator[Instance]:
    """The instances of all datasets in order; RecordError where a template fails on a row, see `Tally`."""
    held_out = _find_exclusions(datasets, places, progress)
    for dataset in datasets:
        for table in dataset.tables:
            rows = (row for row in _read_rows(dataset, table, progress) if places.shard.holds(row[0]))
            for row, prompts in dataset.prompts(rows, tally):
                yield from _make_row_instances(dataset, table, row, prompts, places, held_out, tally)


def _make_row_instances(
    dataset: Dataset,
    table: Table,
    row: LocatedRow,
    prompts: Iterable[Prompt],
    places: SplitRule,
    held_out: Mapping[Split, Exclusions],
    tally: Tally,
) -> Iterator[Instance]:
    index, _, values = row
    group = _group_id(dataset.name, values)
    split = places.split(group, table)
    for prompt in prompts:
        if held_out[split].has_prompt(prompt.instruction):
            tally.counts["dropped_shared_with_held_out"] += 1
            continue
        instance = Instance(
            instance_id=":".join(filter(None, (dataset.name, table.split, str(index), prompt.template))),
            group_id=group,
            task=dataset.name,
            template=prompt.template,
            original_task=prompt.original_task,
            split=split,
            instruction=prompt.instruction,
            references=prompt.references,
            choices=prompt.choices,
            candidates=choice_candidates(prompt.choices),
        )
        if held_out[split].has_near_duplicate(instance):
            tally.counts["dropped_near_held_out"] += 1
            continue
        yield instance


def _group_id(name: str, values: Values) -> str:
    """The group of a row: equal rows of a dataset are one."""
    text = json.dumps(values, sort_keys=True, default=str, ensure_ascii=False)
    return f"{name}:{hashlib.blake2b(text.encode(errors='surrogatepass'), digest_size=8).hexdigest()}"


def _find_exclusions(datasets: Sequence[Dataset], places: SplitRule, progress: Progress) -> Mapping[Split, Exclusions]:
    """For train and validation what it may not have: prompts, groups and near-duplicates of rows held out further.

    All datasets and all shards count. There is nothing to keep apart where all is test.
    """
    exclusions, rows, held_out = {"validation": Exclusions(), "test": Exclusions()}, SplitRows(), RowSample()
    unreported = Tally(max_failed=1.0)
    tables = [(dataset, table) for dataset in datasets for table in dataset.tables]
    if all(table.held_out for _, table in tables) or not (
        places.test or places.validation or any(table.held_out for _, table in tables)
    ):
        return {"train": Exclusions(), "validation": Exclusions(), "test": Exclusions()}
    one_dataset = len(tables) == 1
    limit, seen = MAX_ROWS if one_dataset else SAMPLED_ROWS, 0
    for dataset, table in tables:
        for (_, _, values), prompts in dataset.prompts(
            _rows_to_check(dataset, table, places, progress, limit), unreported
        ):
            group = _group_id(dataset.name, values)
            split = places.split(group, table)
            seen += split == "train"
            for prompt in prompts:
                text = Text(prompt.instruction, dataset.name, group)
                held_out.add(text, split)
                if one_dataset:
                    rows.add(text, split)
                if split != "train":
                    exclusions[split].prompts.append(prompt_hash(prompt.instruction))
                    exclusions[split].groups.append(group_hash(text))
    test, validation = exclusions["test"], exclusions["validation"]
    exact = one_dataset and seen < limit
    near = sort_hashes(array("Q", rows.find_leaks())) if exact else array("Q")
    return {
        "train": Exclusions(
            prompts=sort_hashes(test.prompts + validation.prompts),
            groups=sort_hashes(test.groups + validation.groups),
            near_prompts=near,
            rows=None if exact else held_out.index("test", "validation"),
        ),
        "validation": Exclusions(
            prompts=sort_hashes(test.prompts),
            groups=sort_hashes(test.groups),
            near_prompts=near,
            rows=None if exact else held_out.index("test"),
        ),
        "test": Exclusions(),
    }


def _rows_to_check(
    dataset: Dataset, table: Table, places: SplitRule, progress: Progress, left: int
) -> Iterator[LocatedRow]:
    """The rows of a table that are held out, and the first that are not, so many of them at most."""
    for row in _read_rows(dataset, table, progress):
        if places.split(_group_id(dataset.name, row[2]), table) != "train":
            yield row
        elif left:
            left -= 1
            yield row


def _read_rows(dataset: Dataset, table: Table, progress: Progress) -> Iterator[LocatedRow]:
    for index, (where, values) in enumerate(table.rows()):
        if index % _PROGRESS_EVERY == 0:
            progress(index, None, unit=f"rows of {dataset.name}")
        yield index, where, values
