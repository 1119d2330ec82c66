"""Which split each row belongs to: drawn by group, or given and then held to share no group and no prompt.

A group's place between 0 and 1 is a seeded hash of its id, so that adding rows moves no group: below `test` it is
test, below `test + validation` validation, and from there on train. Groups that share a prompt (see `prompt_hash`)
have one place. Where a split that was asked for would stay empty, it gets the group nearest to it, so that as few
groups as there are splits are enough. Where we draw the splits, near-duplicates of held-out rows are not trained on;
see `leakage`.
"""

import itertools
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cappy.errors import ConfigError, RecordError, quote
from cappy.preparation.config import PreparationConfig
from cappy.preparation.leakage import MAX_DROPPED_SHARE, SplitRows, describe_left_out, find_root, merge_near_duplicates
from cappy.preparation.rows import Row, hash64
from cappy.preparation.sources import Source
from cappy.progress import Progress
from cappy.records import Instance, prompt_hash
from cappy.records.instance import SPLITS

Hashes = npt.NDArray[np.uint64]
Codes = npt.NDArray[np.uint8]
"""Splits as indexes into SPLITS."""
RowMask = npt.NDArray[np.bool_]
"""For each row whether something is true of it."""

TRAIN, VALIDATION, TEST = (SPLITS.index(split) for split in ("train", "validation", "test"))
FIXED_SPLIT_FORMATS = ("builtin", "records", "bigbench")
"""Formats whose splits are not those of a user's rows."""
_DEFAULT_SHARES = (PreparationConfig.test, PreparationConfig.validation)
_PROGRESS_EVERY = 512
_HASH_RANGE = 2**64


@dataclass(frozen=True, kw_only=True)
class SplitAssignment:
    """What was decided before rows are written: the split of each, its ordinal in its group, whether it is left out."""

    splits: Codes
    left_out: RowMask
    ordinals: npt.NDArray[np.uint32]
    metrics: Mapping[str, float]

    @property
    def num_rows(self) -> int:
        """Rows of the source."""
        return len(self.splits)


def assign_splits(source: Source, config: PreparationConfig, progress: Progress) -> SplitAssignment:
    """Reads the whole source, holding a few numbers for each row; RecordError for the first row that is wrong.

    It is read once, and once more for near-duplicates where we draw splits (twice more again where they are many).
    """
    ids, groups, prompts, codes, first, named = _hash_rows(source, config, progress)
    if first.has_id and (clash := _find_repeat(ids)):
        earlier, later = _read_two_rows(source, clash)
        twice = f"id {quote(later.instance.instance_id)} stands at {earlier.where} already"
        raise RecordError(f"{later.where}: {twice}; give every row its own id")
    if first.has_split:
        if (
            source.format not in FIXED_SPLIT_FORMATS
            and not config.unlabelled
            and (config.test, config.validation) != _DEFAULT_SHARES
        ):
            source.unused.say("shares", "the rows give their splits; --test and --validation draw none")
        _check_split_overlap(source, codes, prompts, lambda row: f"instruction {quote(row.instance.instruction)}")
        _check_split_overlap(source, codes, groups, lambda row: f"group_id {quote(row.instance.group_id)}")
        left_out = np.zeros(len(codes), dtype=np.bool_)
        if source.format == "bigbench":
            left_out = _find_near_duplicates(source, codes, prompts)
    else:
        codes, left_out = _draw_without_leaks(source, config, groups, prompts)
    _warn_left_out(source, codes, left_out)
    if config.task and not named:
        source.unused.say("task", f"every row names its task; --task {config.task} names none")
    metrics = {"duplicates_of_instruction": float(len(prompts) - len(np.unique(prompts)))}
    return SplitAssignment(splits=codes, left_out=left_out, ordinals=_ordinals(groups), metrics=metrics)


def _draw_without_leaks(
    source: Source, config: PreparationConfig, groups: Hashes, prompts: Hashes
) -> tuple[Codes, RowMask]:
    """The drawn split of each row, and whether it is left out; near-duplicates are one group where they are many."""
    codes = draw_splits(merge_groups(groups, prompts), config, source.name, unused=source.unused.names("columns"))
    left_out = _find_near_duplicates(source, codes, prompts)
    fitted = np.count_nonzero(codes != TEST)
    if left_out.sum() <= MAX_DROPPED_SHARE * fitted and not _empties_split(codes, left_out):
        return codes, left_out
    places = merge_groups(groups, merge_near_duplicates(prompts, lambda: (row.instance for row in source.rows())))
    if len(np.unique(places)) < _num_splits(config):
        return codes, left_out
    again = draw_splits(places, config, source.name)
    left_out_again = _find_near_duplicates(source, again, prompts)
    if left_out_again.sum() >= left_out.sum() or _empties_split(again, left_out_again):
        return codes, left_out
    what = f"{left_out.sum():,} of {fitted:,} rows to train on were near-duplicates of held-out rows"
    source.unused.say("near_duplicates", f"{what}; near-duplicates are taken as one group, and splits drawn by that")
    return again, left_out_again


def _find_near_duplicates(source: Source, codes: Codes, prompts: Hashes) -> RowMask:
    """Which rows of train and validation are near-duplicates of rows that are held out further."""
    if len(np.unique(codes)) < 2:
        return np.zeros(len(codes), dtype=np.bool_)
    rows = SplitRows()
    for row, code in zip(source.rows(), codes.tolist(), strict=False):
        rows.add(row.instance, SPLITS[code])
    left_out = rows.find_leaks()
    chosen: RowMask = np.isin(prompts, np.fromiter(left_out, dtype=np.uint64, count=len(left_out))) & (codes != TEST)
    return chosen


def _empties_split(codes: Codes, left_out: RowMask) -> bool:
    """Whether a split has rows, and none that is not left out."""
    return len(np.unique(codes[~left_out])) < len(np.unique(codes))


def _warn_left_out(source: Source, codes: Codes, left_out: RowMask) -> None:
    if left_out.any():
        source.unused.say("near_held_out", describe_left_out(int(left_out.sum()), int((codes != TEST).sum())))


def apply_splits(rows: Iterator[Row], plan: SplitAssignment) -> Iterator[Instance | None]:
    """The instances of the rows, with the ids and splits that were left to us; None for one that is left out.

    Rows beyond the plan stand in a file that grew since; the source notices that itself.
    """
    for row, code, left_out, ordinal in zip(rows, plan.splits, plan.left_out, plan.ordinals, strict=False):
        if left_out:
            yield None
            continue
        instance = row.instance
        if not row.has_id:
            instance = replace(instance, instance_id=f"{instance.group_id}-{ordinal}")
        yield instance if row.has_split else replace(instance, split=SPLITS[code])


def draw_splits(places: Hashes, config: PreparationConfig, name: str = "source", *, unused: str = "") -> Codes:
    """A split for each place by the config's fractions, none of them empty.

    ConfigError if there are too few groups; it names the `unused` columns, since rows may differ by one of them.
    """
    groups = np.unique(places)
    wanted = _num_splits(config)
    if len(groups) < wanted:
        remedy = f"give at least {wanted} different instructions, or set --test 0 and --validation 0"
        if unused:
            remedy = f"columns that are not read: {unused}; --columns FIELD=COLUMN reads one, or {remedy}"
        raise ConfigError(f"{name}: {len(groups)} group(s) cannot fill {wanted} splits; {remedy}")
    num_test = _count_below(groups, config.test)
    if config.test:
        num_test = min(max(num_test, 1), len(groups) - wanted + 1)
    num_held_out = num_test
    if config.validation:
        num_held_out = min(max(_count_below(groups, config.test + config.validation), num_test + 1), len(groups) - 1)
    ranks = np.searchsorted(groups, places)
    return np.select([ranks < num_test, ranks < num_held_out], [TEST, VALIDATION], TRAIN).astype(np.uint8)


def _num_splits(config: PreparationConfig) -> int:
    """How many splits are asked for."""
    return 1 + (config.test > 0) + (config.validation > 0)


def merge_groups(groups: Hashes, prompts: Hashes) -> Hashes:
    """For each row one group of all those that its group is tied to by shared prompts.

    RowMask by the low half of the hash: the place is its high half, and the lowest place of several would be test too
    often.
    """
    parents: dict[int, int] = {}

    order = np.argsort(prompts, kind="stable")
    by_prompt, groups_by_prompt = prompts[order], groups[order]
    tied = (by_prompt[1:] == by_prompt[:-1]) & (groups_by_prompt[1:] != groups_by_prompt[:-1])
    left, right = groups_by_prompt[:-1][tied].tolist(), groups_by_prompt[1:][tied].tolist()
    for pair in zip(left, right, strict=True):
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
) -> tuple[Hashes, Hashes, Hashes, Codes, Row, bool]:
    """Hashes of each row's id, group and prompt, its split, the first row, and whether any is called as --task says.

    RecordError if there is no row.
    """
    ids, groups, prompts, codes = array("Q"), array("Q"), array("Q"), array("B")
    first: Row | None = None
    named = False
    for count, row in enumerate(source.rows()):
        first = first or row
        _check_consistent(row, first)
        named = named or row.instance.task == config.task
        ids.append(hash64(row.instance.instance_id))
        groups.append(hash64(f"{config.seed} {row.instance.group_id}"))
        prompts.append(prompt_hash(row.instance.instruction))
        codes.append(SPLITS.index(row.instance.split))
        if count % _PROGRESS_EVERY == 0:
            progress(count, None, unit="instances checked")
    if first is None:
        raise RecordError(f"{source.name}: holds no instances; give at least one row with instruction and reference")
    hashes = (np.frombuffer(values, dtype=np.uint64) for values in (ids, groups, prompts))
    return *hashes, np.frombuffer(codes, dtype=np.uint8), first, named  # type: ignore[return-value]


def _check_consistent(row: Row, first: Row) -> None:
    for name, here, there in (("split", row.has_split, first.has_split), ("id", row.has_id, first.has_id)):
        if here != there:
            mine, first_one = ("gives", "none") if here else ("gives no", "one")
            remedy = f"give every row its {name}, or none"
            raise RecordError(f"{row.where}: {mine} {name}, {first.where} gives {first_one}; {remedy}")


def _check_split_overlap(source: Source, codes: Codes, keys: Hashes, what: Callable[[Row], str]) -> None:
    """RecordError for the first row whose key stands in another split already."""
    if clash := _find_repeat(keys, codes):
        earlier, later = _read_two_rows(source, clash)
        here, there = later.instance.split, earlier.instance.split
        remedy = "delete one of the two, or leave out every split to have them drawn"
        raise RecordError(f"{later.where}: {what(later)} is in {here}, at {earlier.where} in {there}; {remedy}")


def _find_repeat(keys: Hashes, codes: Codes | None = None) -> tuple[int, int] | None:
    """Two rows of equal keys (and, with `codes`, unequal codes): the pair whose later row comes first."""
    order = np.argsort(keys, kind="stable")
    clash = keys[order][1:] == keys[order][:-1]
    if codes is not None:
        clash &= codes[order][1:] != codes[order][:-1]
    if not clash.any():
        return None
    later = order[1:][clash]
    index = int(later.argmin())
    return int(order[:-1][clash][index]), int(later[index])


def _read_two_rows(source: Source, indexes: tuple[int, int]) -> tuple[Row, Row]:
    earlier, later = (next(itertools.islice(source.rows(), index, None)) for index in indexes)
    return earlier, later


def _ordinals(groups: Hashes) -> npt.NDArray[np.uint32]:
    """The ordinal of each row among the rows of its group, from 0."""
    order = np.argsort(groups, kind="stable")
    by_group = groups[order]
    new = np.append(True, by_group[1:] != by_group[:-1])
    starts = np.maximum.accumulate(np.where(new, np.arange(len(groups)), 0))
    ordinals = np.empty(len(groups), dtype=np.uint32)
    ordinals[order] = np.arange(len(groups)) - starts
    return ordinals


def _count_below(groups: Hashes, share: float) -> int:
    """How many of the sorted groups lie below this share of all places."""
    return int(np.searchsorted(groups, np.uint64(min(share * _HASH_RANGE, _HASH_RANGE - 2048))))
