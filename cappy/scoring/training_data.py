"""What a scorer was trained on, kept with its folder; and which instances it has seen: by prompt, group or row text."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cappy.records import Instance, prompt_hash, read_batches
from cappy.records.overlap import (
    ROW_SHINGLES,
    Hashes,
    Prompt,
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
"""Sorted hashes of groups; rows as `cappy.records.overlap.Rows` has them, the number they were drawn from first."""
_COLUMNS = ["instruction", "task", "group_id", "split"]


def training_data(folder: str | Path) -> TrainingData:
    """What the scorer in a folder keeps; no rows where it was made before they were kept."""
    folder = Path(folder)
    groups = np.fromfile(folder / GROUPS, dtype="<u8") if (folder / GROUPS).is_file() else np.empty(0, dtype="<u8")
    rows = None
    if (folder / ROWS).is_file():
        values = np.fromfile(folder / ROWS, dtype="<u8")
        rows = Rows(values[1:].reshape(-1, 1 + ROW_SHINGLES), int(values[0])) if len(values) else Rows.none()
    return TrainingData(prompts=training_prompts(folder), groups=groups, rows=rows)


def write_training_data(folder: Path, source: str | Path, start: Path | None = None) -> None:
    """Keeps groups and rows of what is not test in `source`, with those of the scorer that training `start`ed from."""
    groups: set[int] = set()
    rows = sketch_rows(_note_groups(_prompts(source), groups))
    before = training_data(start) if start is not None else None
    kept = np.array(sorted(groups), dtype="<u8")
    if before is not None:
        kept = np.union1d(before.groups, kept).astype("<u8")
        rows = merge_rows(before.rows, rows) if before.rows is not None else rows
    kept.tofile(folder / GROUPS)
    np.concatenate((np.array([rows.seen], dtype="<u8"), rows.table.astype("<u8").ravel())).tofile(folder / ROWS)


def _prompts(source: str | Path) -> Iterator[Prompt]:
    for batch in read_batches(source, columns=_COLUMNS):
        columns = [batch[name].to_pylist() for name in _COLUMNS]
        yield from (Prompt(*row[:3]) for row in zip(*columns, strict=True) if row[3] != "test")


def _note_groups(prompts: Iterable[Prompt], groups: set[int]) -> Iterator[PromptLike]:
    for prompt in prompts:
        if is_content_id(prompt.group_id):
            groups.add(group_hash(prompt))
        yield prompt


def _content_groups(prompts: Iterable[PromptLike]) -> Hashes:
    """For each prompt the hash of its group, or zero where the group's id is not made of content."""
    return np.array([group_hash(one) if is_content_id(one.group_id) else 0 for one in prompts], dtype=np.uint64)


Known = TrainingData | npt.NDArray[np.uint64]
"""What is known of a scorer's training: all that its folder keeps, or the sorted hashes of its prompts alone."""
TrainedOn = Callable[[Path], Known]
"""What the scorer in a folder was trained on."""


def seen_in_training(instances: Sequence[Instance], trained_on: Known) -> int:
    """How many of the instances were trained on: the same prompt, group, or row (see `by_kind`)."""
    return int(np.any(list(_find_overlap(instances, trained_on).values()), axis=0).sum()) if instances else 0


def by_kind(instances: Sequence[Instance], trained_on: Known) -> dict[str, int]:
    """How many have a prompt that was trained on, a group whose id is made of a trained row, or a trained row's text.

    An instance may count under several. A row's text is found by `cappy.records.overlap`: rows of fewer than about ten
    words of their own are not, nor are rows that were not drawn where there were more than 32,768.
    """
    return {kind: int(flags.sum()) for kind, flags in _find_overlap(instances, trained_on).items()}


def describe_check(instances: Sequence[Instance], known: Mapping[str, Known]) -> dict[str, dict[str, int | str]]:
    """For the manifest, by scorer: what was found under each kind, how much its folder keeps, and what that can see."""
    return {
        name: {
            **{f"found_by_{kind}": count for kind, count in by_kind(instances, data).items()},
            **(data.describe() if isinstance(data, TrainingData) else {"prompts": len(data)}),
        }
        for name, data in known.items()
    }


def _find_overlap(instances: Sequence[Instance], trained_on: Known) -> dict[str, npt.NDArray[np.bool_]]:
    known = trained_on if isinstance(trained_on, TrainingData) else None
    prompts = np.array([prompt_hash(instance.instruction) for instance in instances], dtype=np.uint64)
    by_kind = {"prompts": np.isin(prompts, known.prompts if known else np.asarray(trained_on))}
    if known is not None and known.rows is not None:
        groups = _content_groups(instances)
        index, frequent = RowIndex(known.rows), frequent_shingles(instances)
        by_kind["groups"] = np.isin(groups, known.groups) & (groups > 0)
        by_kind["rows"] = np.array([index.holds(instance, frequent) for instance in instances], dtype=bool)
    return by_kind
