"""Records what a scorer was trained on in its folder, and finds instances that it has seen: by prompt, group or row."""

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
"""Sorted hashes of groups; and rows (`cappy.records.overlap.Rows`), preceded by the number they were drawn from."""
_COLUMNS = ["instruction", "task", "group_id", "split"]


def training_data(folder: str | Path) -> TrainingData:
    """Reads what the scorer in a folder was trained on; older scorers have no rows."""
    folder = Path(folder)
    groups = np.fromfile(folder / GROUPS, dtype="<u8") if (folder / GROUPS).is_file() else np.empty(0, dtype="<u8")
    rows = None
    if (folder / ROWS).is_file():
        values = np.fromfile(folder / ROWS, dtype="<u8")
        rows = Rows(values[1:].reshape(-1, 1 + ROW_SHINGLES), int(values[0])) if len(values) else Rows.none()
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
    np.concatenate((np.array([rows.seen], dtype="<u8"), rows.table.astype("<u8").ravel())).tofile(folder / ROWS)


def _read_prompts(source: str | Path) -> Iterator[GroupedPrompt]:
    for batch in read_batches(source, columns=_COLUMNS):
        columns = [batch[name].to_pylist() for name in _COLUMNS]
        yield from (GroupedPrompt(*row[:3]) for row in zip(*columns, strict=True) if row[3] != "test")


def _collect_groups(prompts: Iterable[GroupedPrompt], groups: set[int]) -> Iterator[PromptLike]:
    for prompt in prompts:
        if is_content_id(prompt.group_id):
            groups.add(group_hash(prompt))
        yield prompt


def _hash_content_groups(prompts: Iterable[PromptLike]) -> Hashes:
    """The hash of each prompt's group, or zero if the group's id is not derived from content."""
    hashes = (group_hash(prompt) if is_content_id(prompt.group_id) else 0 for prompt in prompts)
    return np.fromiter(hashes, dtype=np.uint64)


Known = TrainingData | npt.NDArray[np.uint64]
"""What is known of a scorer's training data: all that its folder records, or the sorted hashes of its prompts."""
TrainedOn = Callable[[Path], Known]
"""Reads what the scorer in a folder was trained on."""


def count_seen(instances: Sequence[Instance], trained_on: Known) -> int:
    """How many of the instances share a prompt, group or row with the training data (see `count_seen_by_kind`)."""
    return int(np.any(list(_find_overlap(instances, trained_on).values()), axis=0).sum()) if instances else 0


def count_seen_by_kind(instances: Sequence[Instance], trained_on: Known) -> dict[str, int]:
    """How many instances share a prompt, a group (if its id is derived from the row) or a row's text with training.

    An instance may count under several kinds. Row texts are compared by `cappy.records.overlap`, which does not find
    rows with fewer than about ten distinctive words, nor rows that were not sampled if there were more than 32,768.
    """
    return {kind: int(flags.sum()) for kind, flags in _find_overlap(instances, trained_on).items()}


def describe_leak_check(instances: Sequence[Instance], known: Mapping[str, Known]) -> dict[str, dict[str, int | str]]:
    """By scorer, for the manifest: how many instances of each kind were found, and what its folder records."""
    return {
        name: {
            **{f"found_by_{kind}": count for kind, count in count_seen_by_kind(instances, data).items()},
            **(data.describe() if isinstance(data, TrainingData) else {"prompts": len(data)}),
        }
        for name, data in known.items()
    }


def _find_overlap(instances: Sequence[Instance], trained_on: Known) -> dict[str, npt.NDArray[np.bool_]]:
    known = trained_on if isinstance(trained_on, TrainingData) else None
    prompts = np.array([prompt_hash(instance.instruction) for instance in instances], dtype=np.uint64)
    by_kind = {"prompts": np.isin(prompts, known.prompts if known else np.asarray(trained_on))}
    if known is not None and known.rows is not None:
        groups = _hash_content_groups(instances)
        index, frequent = RowIndex(known.rows), frequent_shingles(instances)
        by_kind["groups"] = np.isin(groups, known.groups) & (groups > 0)
        by_kind["rows"] = np.array([index.has_row_in(instance, frequent) for instance in instances], dtype=bool)
    return by_kind
