"""What a scorer's folder keeps of the prompts that it was trained on: hashes, against which a guess can be tested."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from cappy.records import read_batches
from cappy.records.overlap import (
    KEPT,
    Hashes,
    Prompt,
    Prompted,
    Rows,
    TrainingData,
    group_hash,
    is_content,
    merge_rows,
    sketch_rows,
)
from cappy.scoring import trained_on

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
        rows = Rows(values[1:].reshape(-1, 1 + KEPT), int(values[0])) if len(values) else Rows.none()
    return TrainingData(prompts=trained_on(folder), groups=groups, rows=rows)


def write_training_data(folder: Path, source: str | Path, start: Path | None = None) -> None:
    """Keeps groups and rows of what is not test in `source`, with those of the scorer that training `start`ed from."""
    groups: set[int] = set()
    rows = sketch_rows(_noting_groups(_prompts(source), groups))
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


def _noting_groups(prompts: Iterable[Prompt], groups: set[int]) -> Iterator[Prompted]:
    for prompt in prompts:
        if is_content(prompt.group_id):
            groups.add(group_hash(prompt))
        yield prompt


def content_groups(prompts: Iterable[Prompted]) -> Hashes:
    """For each prompt the hash of its group, or zero where the group's id is not made of content."""
    return np.array([group_hash(one) if is_content(one.group_id) else 0 for one in prompts], dtype=np.uint64)
