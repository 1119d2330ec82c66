"""A folder of records that grows: rows are added one by one, and at every moment the folder on disk is whole.

Rows of the open part are held in memory until it is full, and written with it at every `flush` under a new name; the
manifest then names the new part, and the old one goes. A crash loses what was added since the last flush, and leaves
at most a part that no manifest names, which the next start removes.

Rows are what users wrote: folder and files are their owner's alone, whatever the umask.
"""

import contextlib
import dataclasses
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
from filelock import Timeout
from numpy.typing import NDArray

from cappy.errors import FolderError
from cappy.files import hold_lock, make_private
from cappy.records import Candidate, File, Instance, Manifest, read_manifest
from cappy.records.folder import MANIFEST, disk_errors, write_bytes, write_manifest
from cappy.records.schema import to_table

PART_ROWS = 512
PART_CHARACTERS = 8_000_000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The columns of an instance, which it becomes once it has a reference or a label: before that it is none."""

    instance_id: str
    instruction: str
    candidates: tuple[Candidate, ...]
    group_id: str
    split: str
    references: tuple[str, ...] = ()
    task: str = "gateway"
    template: str = ""
    original_task: bool = True
    choices: tuple[str, ...] = ()


class AppendableDataset:
    """Rows by id under a manifest; of one process alone. FolderError where another process holds the folder."""

    def __init__(self, folder: Path, *, part_rows: int = PART_ROWS, part_characters: int = PART_CHARACTERS) -> None:
        self._folder = folder
        self._part_rows = part_rows
        self._part_characters = part_characters
        with disk_errors(folder):
            make_private(folder)
            self._lock = contextlib.ExitStack()
            try:
                self._lock.enter_context(hold_lock(folder / ".lock", patience=0))
            except Timeout:
                raise FolderError(f"{folder}: another gateway writes there; give each a folder of its own") from None
        self._closed: list[File] = list(read_manifest(folder).files) if (folder / MANIFEST).exists() else []
        self._number = 1 + max((_number(file.name) for file in self._closed), default=-1)
        self._keys: dict[str, NDArray[np.uint64]] = {}
        self._open: dict[str, Answer] = {}
        self._characters = 0
        self._written: File | None = None
        self._changed = False
        self._remove_strays()

    def put(self, row: Answer) -> None:
        """Adds a row, or puts it in the place of the one with its id."""
        if row.instance_id not in self._open and (index := self._part_of(row.instance_id)) is not None:
            name = self._closed[index].name
            rows = {known.instance_id: known for known in _rows(self._folder / name)}
            self._closed[index] = self._write([*(rows | {row.instance_id: row}).values()])
            self._keys.pop(name, None)
            self._changed = True
            self.flush()
            return
        former = self._open.get(row.instance_id)
        self._open[row.instance_id] = row
        self._characters += _size(row) - (_size(former) if former else 0)
        self._changed = True
        if len(self._open) >= self._part_rows or self._characters >= self._part_characters:
            try:
                self.flush()
            except FolderError:
                # Or memory would grow for as long as the disk refuses.
                del self._open[row.instance_id]
                raise
            self._closed += [self._written] if self._written else []
            self._open, self._characters, self._written = {}, 0, None

    def get(self, instance_id: str) -> Answer | None:
        """The row with this id; None if there is none."""
        if instance_id in self._open:
            return self._open[instance_id]
        index = self._part_of(instance_id)
        if index is None:
            return None
        rows = _rows(self._folder / self._closed[index].name)
        return next(row for row in rows if row.instance_id == instance_id)

    def flush(self) -> None:
        """Writes what was added or changed since the last time."""
        if not self._changed:
            return
        self._written = self._write([*self._open.values()]) if self._open else None
        files = (*self._closed, *([self._written] if self._written else []))
        write_manifest(self._folder, Manifest(step="gateway", files=files), private=True)
        self._changed = False
        self._remove_strays()

    def close(self) -> None:
        """Writes the rest, and lets the folder go."""
        try:
            self.flush()
        finally:
            self._lock.close()

    def _write(self, rows: Sequence[Answer]) -> File:
        buffer = io.BytesIO()
        # A table is made of columns alone, and an answer has an instance's.
        pq.write_table(to_table(cast("Sequence[Instance]", rows)), buffer, compression="zstd")
        name = f"part-{self._number:05d}.parquet"
        self._number += 1
        write_bytes(self._folder / name, buffer.getvalue(), private=True)
        return File(
            name=name,
            sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
            rows=len(rows),
            candidates=sum(len(row.candidates) for row in rows),
        )

    def _part_of(self, instance_id: str) -> int | None:
        """The index of the closed part that holds this id, looked for from the newest on."""
        key = _key(instance_id)
        for index in range(len(self._closed) - 1, -1, -1):
            name = self._closed[index].name
            if (self._keys_of(name) == key).any() and instance_id in self._ids(name):
                return index
        return None

    def _keys_of(self, name: str) -> NDArray[np.uint64]:
        """Hashes of a closed part's ids, kept: every new answer is looked for in all parts."""
        keys = self._keys.get(name)
        if keys is None:
            keys = self._keys[name] = np.array([_key(one) for one in self._ids(name)], np.uint64)
        return keys

    def _ids(self, name: str) -> list[str]:
        ids: list[str] = pq.read_table(self._folder / name, columns=["instance_id"])["instance_id"].to_pylist()
        return ids

    def _remove_strays(self) -> None:
        named = {file.name for file in (*self._closed, *([self._written] if self._written else []))}
        for path in self._folder.glob("part-*.parquet"):
            if path.name not in named:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()


def _key(instance_id: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(instance_id.encode(), digest_size=8).digest(), "big"))


def _size(row: Answer) -> int:
    """Characters of a row that a client chooses."""
    return len(row.instruction) + sum(map(len, row.references)) + sum(len(one.response) for one in row.candidates)


def _rows(path: Path) -> list[Answer]:
    return [Answer(**{**row, **_typed(row)}) for row in pq.read_table(path).to_pylist()]


def _typed(row: Mapping[str, Any]) -> dict[str, Any]:
    """What Parquet gives as lists, as the record has it."""
    maps = ("labels", "scores")
    candidates = tuple(Candidate(**{**one, **{name: dict(one[name]) for name in maps}}) for one in row["candidates"])
    return {"references": tuple(row["references"]), "choices": tuple(row["choices"]), "candidates": candidates}


def _number(name: str) -> int:
    return int(name.removeprefix("part-").removesuffix(".parquet"))
