"""Records what a scorer was trained on, and finds instances with a prompt, group or row of its training data."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cappy.records import Instance, prompt_hash, read_batches
from cappy.records.overlap import (
    ROW_SHINGLES,
    GroupedPrompt,
    Hashes,
    PromptLike,
    RowIndex,
    Rows,
    TrainingData,
    frequent_shingles,
    group_hash,
    is_content_id,
    merge_rows,
    sketch_rows,
)
from cappy.scoring import training_prompts

GROUPS, ROWS = "trained_on_groups.u64", "trained_on_rows.u64"
"""Files of unsigned 64-bit integers (little-endian).

`GROUPS` contains the sorted hashes of the groups. `ROWS` contains a `Rows`: first the number of rows before sampling,
then the table.
"""
_COLUMNS = ["instruction", "task", "group_id", "split"]


def training_data(folder: str | Path) -> TrainingData:
    """Reads what the scorer in a folder was trained on; `rows` is None for scorers of earlier releases."""
    folder = Path(folder)
    groups = np.fromfile(folder / GROUPS, dtype="<u8") if (folder / GROUPS).is_file() else np.empty(0, dtype="<u8")
    rows = None
    if (folder / ROWS).is_file():
        values = np.fromfile(folder / ROWS, dtype="<u8")
        rows = Rows(values[1:].reshape(-1, 1 + ROW_SHINGLES), int(values[0])) if len(values) else Rows.empty()
    return TrainingData(prompts=training_prompts(folder), groups=groups, rows=rows)


def write_training_data(folder: Path, source: str | Path, start: Path | None = None) -> None:
    """Records the groups and rows of `source` except its test split, and those of the scorer in `start`."""
    groups: set[int] = set()
    rows = sketch_rows(_collect_groups(_read_prompts(source), groups))
    before = training_data(start) if start is not None else None
    hashes = np.array(sorted(groups), dtype="<u8")
    if before is not None:
        hashes = np.union1d(before.groups, hashes).astype("<u8")
        rows = merge_rows(before.rows, rows) if before.rows is not None else rows
    hashes.tofile(folder / GROUPS)
    np.concatenate((np.array([rows.total_rows], dtype="<u8"), rows.table.astype("<u8").ravel())).tofile(folder / ROWS)


def _read_prompts(source: str | Path) -> Iterator[GroupedPrompt]:
    for batch in read_batches(source, columns=_COLUMNS):
        columns = [batch[name].to_pylist() for name in _COLUMNS]
        yield from (GroupedPrompt(*row[:3]) for row in zip(*columns, strict=True) if row[3] != "test")


def _collect_groups(prompts: Iterable[GroupedPrompt], groups: set[int]) -> Iterator[PromptLike]:
    """Yields the prompts, and adds the hash of each group with a content id to `groups`."""
    for prompt in prompts:
        if is_content_id(prompt.group_id):
            groups.add(group_hash(prompt))
        yield prompt


def _hash_content_groups(prompts: Iterable[PromptLike]) -> Hashes:
    """The hash of each prompt's group, or zero if the group's id is not derived from content."""
    hashes = (group_hash(prompt) if is_content_id(prompt.group_id) else 0 for prompt in prompts)
    return np.fromiter(hashes, dtype=np.uint64)


TrainingHashes = TrainingData | npt.NDArray[np.uint64]
"""What is known about a scorer's training data: all hashes in its folder, or only those of its prompts, sorted."""
ReadTrainingData = Callable[[Path], TrainingHashes]
"""Reads what the scorer in a folder was trained on."""


def count_seen(instances: Sequence[Instance], training: TrainingHashes) -> int:
    """How many of the instances share a prompt, group or row with the training data; see `count_seen_by_kind`."""
    return int(np.any(list(_find_overlap(instances, training).values()), axis=0).sum()) if instances else 0


def count_seen_by_kind(instances: Sequence[Instance], training: TrainingHashes) -> dict[str, int]:
    """How many instances share a prompt, a group (if its id is derived from the row) or a row's text with training.

    An instance may count under several kinds. Row texts are compared by `cappy.records.overlap`, which does not find
    rows with fewer than about ten distinctive words, nor rows that were not sampled if there were more than 32,768.
    """
    return {kind: int(flags.sum()) for kind, flags in _find_overlap(instances, training).items()}


def describe_leak_check(
    instances: Sequence[Instance], training: Mapping[str, TrainingHashes]
) -> dict[str, dict[str, int | str]]:
    """Scorer -> number of instances that share each kind of data with its training, and what its folder records."""
    return {
        name: {
            **{f"found_by_{kind}": count for kind, count in count_seen_by_kind(instances, data).items()},
            **(data.describe() if isinstance(data, TrainingData) else {"prompts": len(data)}),
        }
        for name, data in training.items()
    }


def _find_overlap(instances: Sequence[Instance], training: TrainingHashes) -> dict[str, npt.NDArray[np.bool_]]:
    data = training if isinstance(training, TrainingData) else None
    prompts = np.array([prompt_hash(instance.instruction) for instance in instances], dtype=np.uint64)
    by_kind = {"prompts": np.isin(prompts, data.prompts if data else np.asarray(training))}
    if data is not None and data.rows is not None:
        groups = _hash_content_groups(instances)
        index, frequent = RowIndex(data.rows), frequent_shingles(instances)
        by_kind["groups"] = np.isin(groups, data.groups) & (groups > 0)
        by_kind["rows"] = np.array([index.has_row_in(instance, frequent) for instance in instances], dtype=bool)
    return by_kind
