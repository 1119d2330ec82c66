"""Turns the rows of datasets into instances: one for each template, or one with a benchmark's own prompt.

The rows of a dataset are streamed. If some are held out, all rows are read once beforehand to collect the held-out
prompts, so that no training instance has a held-out prompt or a near-duplicate of one. If there is a single dataset
with fewer than 32,768 training rows, all its rows are compared; otherwise each training row is compared with a sample
of the held-out rows (see `leakage`). Only the hashes of held-out prompts and a bounded number of shingles are kept in
memory.

The split of a row depends on the hash of its values. So all instances of a row form one group, whatever their
templates, together with those of equal rows.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cappy.errors import RecordError
from cappy.preparation.leakage import SAMPLED_ROWS, Exclusions, HeldOutSample, SplitRows, sort_hashes
from cappy.preparation.rows import Rows, Values, choice_candidates, hash64
from cappy.progress import Progress
from cappy.records import Instance, Split, prompt_hash
from cappy.records.overlap import MAX_ROWS, GroupedPrompt, group_hash
from cappy.records.work import Shard

MIN_ROWS_TO_REFUSE = 100
"""If a template fails on all of its first rows, the run ends after this many."""
MAX_CONSECUTIVE_LIMITS = 3
"""If a template exceeds its limits on this many consecutive rows, the run fails: each such row costs seconds."""
_PROGRESS_EVERY = 4_096


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRow:
    """A row rendered by one template, or a prompt of a benchmark."""

    instruction: str
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()
    template: str = ""
    original_task: bool = True


@dataclass(slots=True)
class Tally:
    """Counts events, and the failures of each template with its first error.

    A template may fail on a share of `max_failed` of its rows. A row without a field that the template reads is a
    failure if `on_missing_field` is "fail", otherwise it is rendered blank and counted.
    """

    max_failed: float = 0.0
    on_missing_field: Literal["blank", "fail"] = "blank"
    counts: Counter[str] = field(default_factory=Counter)
    attempts: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    errors: dict[str, str] = field(default_factory=dict)
    limit_failures: Counter[str] = field(default_factory=Counter)
    missing_fields: dict[str, str] = field(default_factory=dict)

    def add_missing_fields(self, name: str, error: str) -> None:
        """Counts a prompt rendered from a row without a field that the template reads."""
        self.counts["with_missing_fields"] += 1
        self.missing_fields.setdefault(name, error)

    def succeed(self, name: str) -> None:
        """Resets the consecutive limit failures of a template."""
        self.limit_failures.pop(name, None)

    def fail(self, name: str, error: str, *, exceeded_limit: bool = False) -> None:
        """Counts a failure of a template; raises RecordError if it failed on all of its first rows.

        `exceeded_limit` means that it ran out of time or memory. If it did so on several consecutive rows, RecordError
        is raised regardless of `max_failed`.
        """
        self.failures[name] += 1
        self.counts["failed"] += 1
        self.errors.setdefault(name, error)
        self.limit_failures[name] = self.limit_failures[name] + 1 if exceeded_limit else 0
        if self.limit_failures[name] == MAX_CONSECUTIVE_LIMITS:
            rows = f"it ran out of time or memory on {MAX_CONSECUTIVE_LIMITS} consecutive rows"
            raise RecordError(f"{self.errors[name]}; {rows}; leave the template out with --template")
        if self.max_failed < 1 and self.failures[name] == self.attempts[name] == MIN_ROWS_TO_REFUSE:
            self.refuse(name)

    def check(self) -> None:
        """Raises RecordError for the template with the largest share of failures, if the share exceeds `max_failed`."""
        shares = {name: count / self.attempts[name] for name, count in self.failures.items()}
        worst = max(shares, key=lambda name: shares[name], default=None)
        if worst is not None and shares[worst] > self.max_failed:
            self.refuse(worst)

    def refuse(self, name: str) -> None:
        """Raises RecordError with the first error of a template."""
        share = f"{self.failures[name]:,} of {self.attempts[name]:,} rows"
        remedy = "leave the template out with --template, or raise --max-failed"
        raise RecordError(f"{self.errors[name]}; it failed on {share}; {remedy}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The rows of one split of a dataset; `rows` can be called repeatedly. If `held_out`, all are in the test split."""

    split: str
    rows: Callable[[], Rows]
    held_out: bool = False


LocatedRow = tuple[int, str, Values]
"""A row as (index, location, values)."""
MakePrompts = Callable[[Iterable[LocatedRow], Tally], Iterator[tuple[LocatedRow, list[PromptRow]]]]
"""Makes the prompts of each row, in order; it may read rows ahead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A dataset of a source: its tables, and the function that makes the prompts of their rows."""

    name: str
    tables: tuple[Table, ...]
    make_prompts: MakePrompts


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRule:
    """Assigns groups to splits, and rows to shards."""

    seed: int
    test: float
    validation: float
    shard: Shard

    def split(self, group: str, table: Table) -> Split:
        """The split of a group: test in a held-out table, otherwise drawn by the hash."""
        if table.held_out:
            return "test"
        position = hash64(f"{self.seed} {group}") / 2**64
        return "test" if position < self.test else "validation" if position < self.test + self.validation else "train"


def make_instances(
    datasets: Sequence[Dataset], rule: SplitRule, tally: Tally, progress: Progress
) -> Iterator[Instance]:
    """Yields the instances of all datasets in order; raises RecordError if a template fails too often, see `Tally`."""
    exclusions = _find_exclusions(datasets, rule, progress)
    for dataset in datasets:
        for table in dataset.tables:
            rows = (row for row in _read_rows(dataset, table, progress) if rule.shard.holds(row[0]))
            for row, prompts in dataset.make_prompts(rows, tally):
                yield from _make_row_instances(dataset, table, row, prompts, rule, exclusions, tally)


def _make_row_instances(
    dataset: Dataset,
    table: Table,
    row: LocatedRow,
    prompts: Iterable[PromptRow],
    rule: SplitRule,
    exclusions: Mapping[Split, Exclusions],
    tally: Tally,
) -> Iterator[Instance]:
    index, _, values = row
    group = _group_id(dataset.name, values)
    split = rule.split(group, table)
    for prompt in prompts:
        if exclusions[split].has_prompt(prompt.instruction):
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
        if exclusions[split].has_near_duplicate(instance):
            tally.counts["dropped_near_held_out"] += 1
            continue
        yield instance


def _group_id(name: str, values: Values) -> str:
    """The group id of a row; equal rows of a dataset have the same."""
    text = json.dumps(values, sort_keys=True, default=str, ensure_ascii=False)
    return f"{name}:{hashlib.blake2b(text.encode(errors='surrogatepass'), digest_size=8).hexdigest()}"


def _find_exclusions(datasets: Sequence[Dataset], rule: SplitRule, progress: Progress) -> Mapping[Split, Exclusions]:
    """The prompts, groups and near-duplicates to exclude from each split, because they are held out from it.

    Held-out rows of all datasets and all shards are excluded. Nothing is excluded if all rows are in the test split.
    """
    exclusions, split_rows, sample = {"validation": Exclusions(), "test": Exclusions()}, SplitRows(), HeldOutSample()
    ignored_tally = Tally(max_failed=1.0)
    tables = [(dataset, table) for dataset in datasets for table in dataset.tables]
    if all(table.held_out for _, table in tables) or not (
        rule.test or rule.validation or any(table.held_out for _, table in tables)
    ):
        return {"train": Exclusions(), "validation": Exclusions(), "test": Exclusions()}
    one_dataset = len(tables) == 1
    limit, num_train = MAX_ROWS if one_dataset else SAMPLED_ROWS, 0
    for dataset, table in tables:
        for (_, _, values), prompts in dataset.make_prompts(
            _rows_to_check(dataset, table, rule, progress, limit), ignored_tally
        ):
            group = _group_id(dataset.name, values)
            split = rule.split(group, table)
            num_train += split == "train"
            for prompt in prompts:
                grouped_prompt = GroupedPrompt(prompt.instruction, dataset.name, group)
                sample.add(grouped_prompt, split)
                if one_dataset:
                    split_rows.add(grouped_prompt, split)
                if split != "train":
                    exclusions[split].prompts.append(prompt_hash(prompt.instruction))
                    exclusions[split].groups.append(group_hash(grouped_prompt))
    test, validation = exclusions["test"], exclusions["validation"]
    compares_all = one_dataset and num_train < limit
    near_prompts = sort_hashes(array("Q", split_rows.find_leaks())) if compares_all else array("Q")
    return {
        "train": Exclusions(
            prompts=sort_hashes(test.prompts + validation.prompts),
            groups=sort_hashes(test.groups + validation.groups),
            near_prompts=near_prompts,
            row_index=None if compares_all else sample.build_index("test", "validation"),
        ),
        "validation": Exclusions(
            prompts=sort_hashes(test.prompts),
            groups=sort_hashes(test.groups),
            near_prompts=near_prompts,
            row_index=None if compares_all else sample.build_index("test"),
        ),
        "test": Exclusions(),
    }


def _rows_to_check(
    dataset: Dataset, table: Table, rule: SplitRule, progress: Progress, limit: int
) -> Iterator[LocatedRow]:
    """All held-out rows of a table, and at most `limit` of the others."""
    for row in _read_rows(dataset, table, progress):
        if rule.split(_group_id(dataset.name, row[2]), table) != "train":
            yield row
        elif limit:
            limit -= 1
            yield row


def _read_rows(dataset: Dataset, table: Table, progress: Progress) -> Iterator[LocatedRow]:
    for index, (where, values) in enumerate(table.rows()):
        if index % _PROGRESS_EVERY == 0:
            progress(index, None, unit=f"rows of {dataset.name}")
        yield index, where, values
