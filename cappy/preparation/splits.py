"""Assigns each row to a split, drawn by group or read from the row. No two splits may share a group or a prompt.

Each group has a position from 0 to 1, a seeded hash of its id, so adding rows does not move other groups. Groups below
`test` are in test, those below `test + validation` in validation, and all others in train. Groups that share a prompt
(see `prompt_hash`) share one position. A requested split that would be empty gets the group nearest to it, so as many
groups as splits are enough. If splits are drawn, near-duplicates of held-out rows are dropped from training; see
`leakage`.
"""

import itertools
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cappy.errors import ConfigError, RecordError, quote
from cappy.preparation.config import PreparationConfig
from cappy.preparation.leakage import MAX_DROPPED_SHARE, SplitRows, describe_dropped, find_root, merge_near_duplicates
from cappy.preparation.rows import SourceRow, hash64
from cappy.preparation.sources import Source
from cappy.progress import Progress
from cappy.records import Instance, prompt_hash
from cappy.records.instance import SPLITS

Hashes = npt.NDArray[np.uint64]
Codes = npt.NDArray[np.uint8]
"""Splits as indexes into SPLITS, shape [num_rows]."""
RowMask = npt.NDArray[np.bool_]
"""A boolean for each row, shape [num_rows]."""

TRAIN, VALIDATION, TEST = (SPLITS.index(split) for split in ("train", "validation", "test"))
FORMATS_WITHOUT_USER_SPLITS = ("builtin", "records", "bigbench")
"""Formats whose instances have splits that do not come from the rows of a user."""
_DEFAULT_SHARES = (PreparationConfig.test, PreparationConfig.validation)
_PROGRESS_EVERY = 512
_HASH_RANGE = 2**64


@dataclass(frozen=True, kw_only=True)
class SplitAssignment:
    """The split of each row, whether it is dropped, and its ordinal in its group from 0; arrays of shape [num_rows]."""

    splits: Codes
    dropped: RowMask
    ordinals: npt.NDArray[np.uint32]
    metrics: Mapping[str, float]

    @property
    def num_rows(self) -> int:
        """The number of rows of the source."""
        return len(self.splits)


def assign_splits(source: Source, config: PreparationConfig, progress: Progress) -> SplitAssignment:
    """Assigns splits in one pass over the source, keeping a few numbers per row in memory.

    If splits are drawn, a second pass finds near-duplicates, and two more merge them if there are many. Raises
    RecordError for an invalid row, and ConfigError if there are fewer groups than splits.
    """
    ids, groups, prompts, codes, first, is_task_used = _hash_rows(source, config, progress)
    if first.has_id and (pair := _find_repeat(ids)):
        earlier, later = _read_two_rows(source, pair)
        problem = f"id {quote(later.instance.instance_id)} is already used at {earlier.where}"
        raise RecordError(f"{later.where}: {problem}; give every row its own id")
    if first.has_split:
        if (
            source.format not in FORMATS_WITHOUT_USER_SPLITS
            and not config.unlabelled
            and (config.test, config.validation) != _DEFAULT_SHARES
        ):
            source.warnings.add("shares", "the rows already have splits; --test and --validation are not used")
        _check_split_overlap(source, codes, prompts, lambda row: f"instruction {quote(row.instance.instruction)}")
        _check_split_overlap(source, codes, groups, lambda row: f"group_id {quote(row.instance.group_id)}")
        dropped = np.zeros(len(codes), dtype=np.bool_)
        if source.format == "bigbench":
            dropped = _find_near_duplicates(source, codes, prompts)
    else:
        codes, dropped = _draw_without_leaks(source, config, groups, prompts)
    _warn_dropped(source, codes, dropped)
    if config.task and not is_task_used:
        source.warnings.add("task", f"every row already has a task; --task {config.task} is not used")
    metrics = {"duplicates_of_instruction": float(len(prompts) - len(np.unique(prompts)))}
    return SplitAssignment(splits=codes, dropped=dropped, ordinals=_compute_ordinals(groups), metrics=metrics)


def _draw_without_leaks(
    source: Source, config: PreparationConfig, groups: Hashes, prompts: Hashes
) -> tuple[Codes, RowMask]:
    """The drawn split of each row, and whether it is dropped; many near-duplicates are merged into groups instead."""
    codes = draw_splits(
        merge_groups(groups, prompts), config, source.name, unread_columns=source.warnings.names("columns")
    )
    dropped = _find_near_duplicates(source, codes, prompts)
    num_train_and_validation = np.count_nonzero(codes != TEST)
    if dropped.sum() <= MAX_DROPPED_SHARE * num_train_and_validation and not _empties_split(codes, dropped):
        return codes, dropped
    keys = merge_groups(groups, merge_near_duplicates(prompts, lambda: (row.instance for row in source.rows())))
    if len(np.unique(keys)) < _num_splits(config):
        return codes, dropped
    codes_again = draw_splits(keys, config, source.name)
    dropped_again = _find_near_duplicates(source, codes_again, prompts)
    if dropped_again.sum() >= dropped.sum() or _empties_split(codes_again, dropped_again):
        return codes, dropped
    rows = f"{num_train_and_validation:,} train and validation rows"
    leaks = f"{dropped.sum():,} of {rows} were near-duplicates of held-out rows"
    source.warnings.add("near_duplicates", f"{leaks}; drew the splits again with near-duplicates merged into groups")
    return codes_again, dropped_again


def _find_near_duplicates(source: Source, codes: Codes, prompts: Hashes) -> RowMask:
    """Which rows of train and validation are near-duplicates of test rows or, in train, of validation rows."""
    if len(np.unique(codes)) < 2:
        return np.zeros(len(codes), dtype=np.bool_)
    rows = SplitRows()
    for row, code in zip(source.rows(), codes.tolist(), strict=False):
        rows.add(row.instance, SPLITS[code])
    dropped = rows.find_leaks()
    mask: RowMask = np.isin(prompts, np.fromiter(dropped, dtype=np.uint64, count=len(dropped))) & (codes != TEST)
    return mask


def _empties_split(codes: Codes, dropped: RowMask) -> bool:
    """Whether dropping rows leaves a split empty."""
    return len(np.unique(codes[~dropped])) < len(np.unique(codes))


def _warn_dropped(source: Source, codes: Codes, dropped: RowMask) -> None:
    if dropped.any():
        source.warnings.add("near_held_out", describe_dropped(int(dropped.sum()), int((codes != TEST).sum())))


def apply_splits(rows: Iterator[SourceRow], assignment: SplitAssignment) -> Iterator[Instance | None]:
    """Yields the instances of the rows with missing ids and splits filled in, and None for a dropped row.

    Rows beyond the assignment are ignored: the file has grown since, and `Source.check_unchanged` reports that.
    """
    for row, code, dropped, ordinal in zip(
        rows, assignment.splits, assignment.dropped, assignment.ordinals, strict=False
    ):
        if dropped:
            yield None
            continue
        instance = row.instance
        if not row.has_id:
            instance = replace(instance, instance_id=f"{instance.group_id}-{ordinal}")
        yield instance if row.has_split else replace(instance, split=SPLITS[code])


def draw_splits(keys: Hashes, config: PreparationConfig, name: str = "source", *, unread_columns: str = "") -> Codes:
    """Draws a split for each group hash in `keys` by the fractions of the config; no requested split is empty.

    If there are too few groups, raises ConfigError with `unread_columns`, because rows may differ in one of them.
    """
    groups = np.unique(keys)
    num_splits = _num_splits(config)
    if len(groups) < num_splits:
        remedy = f"give at least {num_splits} different instructions, or set --test 0 and --validation 0"
        if unread_columns:
            remedy = f"columns that are not read: {unread_columns}; read one with --columns FIELD=COLUMN, or {remedy}"
        raise ConfigError(f"{name}: {len(groups)} group(s) cannot fill {num_splits} splits; {remedy}")
    num_test = _count_below(groups, config.test)
    if config.test:
        num_test = min(max(num_test, 1), len(groups) - num_splits + 1)
    num_held_out = num_test
    if config.validation:
        num_held_out = min(max(_count_below(groups, config.test + config.validation), num_test + 1), len(groups) - 1)
    ranks = np.searchsorted(groups, keys)
    return np.select([ranks < num_test, ranks < num_held_out], [TEST, VALIDATION], TRAIN).astype(np.uint8)


def _num_splits(config: PreparationConfig) -> int:
    """The number of requested splits."""
    return 1 + (config.test > 0) + (config.validation > 0)


def merge_groups(groups: Hashes, prompts: Hashes) -> Hashes:
    """Replaces each group hash by one representative of all groups connected by shared prompts, shape [num_rows].

    The representative is chosen by the low half of the hash: positions come from the high half, and choosing the lowest
    position would make merged groups test groups too often.
    """
    parents: dict[int, int] = {}
    order = np.argsort(prompts, kind="stable")
    by_prompt, groups_by_prompt = prompts[order], groups[order]
    adjacent = (by_prompt[1:] == by_prompt[:-1]) & (groups_by_prompt[1:] != groups_by_prompt[:-1])
    lefts, rights = groups_by_prompt[:-1][adjacent].tolist(), groups_by_prompt[1:][adjacent].tolist()
    for pair in zip(lefts, rights, strict=True):
        low, high = sorted(
            (find_root(group, parents) for group in pair), key=lambda group: (group & 0xFFFF_FFFF, group)
        )
        parents[high] = low
    if not parents:
        return groups
    members = np.array(sorted({*parents, *parents.values()}), dtype=np.uint64)
    roots = np.array([find_root(int(member), parents) for member in members], dtype=np.uint64)
    index = np.minimum(np.searchsorted(members, groups), len(members) - 1)
    return np.where(members[index] == groups, roots[index], groups)


def _hash_rows(
    source: Source, config: PreparationConfig, progress: Progress
) -> tuple[Hashes, Hashes, Hashes, Codes, SourceRow, bool]:
    """Hashes of the id, group and prompt of each row, its split, the first row, and whether any row's task is --task.

    Raises RecordError if there is no row.
    """
    ids, groups, prompts, codes = array("Q"), array("Q"), array("Q"), array("B")
    first: SourceRow | None = None
    is_task_used = False
    for count, row in enumerate(source.rows()):
        first = first or row
        _check_consistent(row, first)
        is_task_used = is_task_used or row.instance.task == config.task
        ids.append(hash64(row.instance.instance_id))
        groups.append(hash64(f"{config.seed} {row.instance.group_id}"))
        prompts.append(prompt_hash(row.instance.instruction))
        codes.append(SPLITS.index(row.instance.split))
        if count % _PROGRESS_EVERY == 0:
            progress(count, None, unit="instances checked")
    if first is None:
        raise RecordError(f"{source.name}: holds no instances; give at least one row with instruction and reference")
    hashes = (np.frombuffer(values, dtype=np.uint64) for values in (ids, groups, prompts))
    return *hashes, np.frombuffer(codes, dtype=np.uint8), first, is_task_used  # type: ignore[return-value]


def _check_consistent(row: SourceRow, first: SourceRow) -> None:
    for name, in_row, in_first in (("split", row.has_split, first.has_split), ("id", row.has_id, first.has_id)):
        if in_row != in_first:
            state, first_state = ("present", "missing") if in_row else ("missing", "present")
            remedy = f"give every row its {name}, or none"
            raise RecordError(f"{row.where}: {name} is {state}, but {first_state} at {first.where}; {remedy}")


def _check_split_overlap(source: Source, codes: Codes, keys: Hashes, describe: Callable[[SourceRow], str]) -> None:
    """Raises RecordError for the first row whose key has occurred in another split; `describe` names the key."""
    if pair := _find_repeat(keys, codes):
        earlier, later = _read_two_rows(source, pair)
        split, other_split = later.instance.split, earlier.instance.split
        remedy = "delete one of the two, or leave out all splits to have them drawn"
        raise RecordError(
            f"{later.where}: {describe(later)} is in split {split}, but in {other_split} at {earlier.where}; {remedy}"
        )


def _find_repeat(keys: Hashes, codes: Codes | None = None) -> tuple[int, int] | None:
    """The first row that repeats an earlier key (and, with `codes`, has another code), as (earlier, later) indexes."""
    order = np.argsort(keys, kind="stable")
    repeated = keys[order][1:] == keys[order][:-1]
    if codes is not None:
        repeated &= codes[order][1:] != codes[order][:-1]
    if not repeated.any():
        return None
    later = order[1:][repeated]
    index = int(later.argmin())
    return int(order[:-1][repeated][index]), int(later[index])


def _read_two_rows(source: Source, indexes: tuple[int, int]) -> tuple[SourceRow, SourceRow]:
    earlier, later = (next(itertools.islice(source.rows(), index, None)) for index in indexes)
    return earlier, later


def _compute_ordinals(groups: Hashes) -> npt.NDArray[np.uint32]:
    """The ordinal of each row among the rows of its group, from 0."""
    order = np.argsort(groups, kind="stable")
    by_group = groups[order]
    new = np.append(True, by_group[1:] != by_group[:-1])
    starts = np.maximum.accumulate(np.where(new, np.arange(len(groups)), 0))
    ordinals = np.empty(len(groups), dtype=np.uint32)
    ordinals[order] = np.arange(len(groups)) - starts
    return ordinals


def _count_below(groups: Hashes, share: float) -> int:
    """The number of sorted group hashes below this share of the hash range."""
    return int(np.searchsorted(groups, np.uint64(min(share * _HASH_RANGE, _HASH_RANGE - 2048))))
