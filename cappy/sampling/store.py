"""The store of candidates and answers in the work folder, so that nothing is drawn or paid for twice.

    candidates/<origin>/origin.json     generator, revision and version of the drawing code
    candidates/<origin>/*.jsonl         the candidates; each process writes its own file
    answers/                            the answers of endpoints, one file each (`cappy.sampling.endpoint.answers`)

A file consists of blocks: a line with keys and lengths, then a line of candidates for each key. Incomplete blocks
of a killed process are skipped. A block is written as soon as it is drawn, so a kill loses only the current block.
Memory holds keys and locations only, 24 bytes per set of candidates.

The store uses plain files because work folders may be on network volumes and mounted buckets, where the locks of a
database are unreliable.
"""

import contextlib
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Literal

import numpy as np

from cappy.config import fingerprint
from cappy.errors import FolderError, RecordError
from cappy.files import PRIVATE_FILE, REMOVED_PREFIX, lock_shared, make_private, open_lock, remove_folder
from cappy.records import Candidate
from cappy.records.folder import disk_errors, write_bytes

DRAWING_VERSION = 1
"""Version of the drawing code: raise it when the same input gives other candidates, so that old ones are not used."""
CANDIDATES = "candidates"
FRESH_FOLDER = "fresh"
"""Folder with a subfolder for each `--fresh` run."""
ANSWERS = "answers"
_ORIGIN = "origin.json"
LOCK = ".lock"
_FORMAT = 1
_MAX_FILE_BYTES = 64_000_000
"""Size at which a process starts another file: a mounted bucket may upload the whole file for each append."""
_LOCATION = np.dtype([("file", "<u4"), ("size", "<u4"), ("start", "<u8")])
_STORED_FIELDS = ("response", "decoding", "seed", "status", "logprob_sum", "logprob_mean", "num_tokens")
"""Fields of a candidate that are stored with it; the others are in the origin."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The origin of candidates: a generator's spec and revision, and the version of the drawing code."""

    generator: str
    revision: str
    version: int


def sample_key(**inputs: object) -> str:
    """The key of a set of samples: a hash of everything they depend on, except the origin and the sample numbers."""
    return fingerprint("draw", _FORMAT, inputs)[:32]


class CandidateStore:
    """The candidates of one origin by key; several processes may use the folder at once.

    The candidates of a key are its samples 0, 1, ... in order. If several sets have the same key, the longest is used,
    and of equally long ones the first by file name.
    """

    def __init__(self, work: Path, origin: Origin) -> None:
        self._origin = origin
        values = {"generator": origin.generator, "revision": origin.revision, "version": origin.version}
        self._folder = work / CANDIDATES / fingerprint("origin", _FORMAT, values)[:24]
        self._file: IO[bytes] | None = None
        self._file_indices: dict[Path, int] = {}
        self._read_offsets: dict[Path, int] = {}
        self._keys = np.empty(0, dtype="<u8")
        self._locations = np.empty(0, dtype=_LOCATION)
        with disk_errors(self._folder):
            make_private(self._folder.parent)
            self._lock = lock_shared(self._folder / LOCK)
            if not (self._folder / _ORIGIN).is_file():
                write_bytes(self._folder / _ORIGIN, json.dumps(values, indent=1).encode(), private=True)
        with contextlib.suppress(OSError):  # A mounted bucket may not support modification times.
            os.utime(self._folder / _ORIGIN)

    def get(self, keys: Sequence[str]) -> dict[str, tuple[Candidate, ...]]:
        """The stored candidates by key; keys without candidates are left out."""
        self._refresh()
        numbers = np.array([_key_number(key) for key in keys], dtype="<u8")
        starts, stops = (np.searchsorted(self._keys, numbers, side) for side in ("left", "right"))
        by_file: dict[int, list[tuple[int, int, str]]] = {}
        for key, start, stop in zip(keys, starts.tolist(), stops.tolist(), strict=True):
            for location in self._locations[start:stop]:
                by_file.setdefault(int(location["file"]), []).append(
                    (int(location["start"]), int(location["size"]), key)
                )
        sets: dict[str, tuple[Candidate, ...]] = {}
        paths = list(self._file_indices)
        for index in sorted(by_file, key=lambda index: paths[index].name):
            for key, candidates in self._read_sets(paths[index], sorted(by_file[index])):
                if len(candidates) > len(sets.get(key, ())):
                    sets[key] = candidates
        return sets

    def put(self, sets: Mapping[str, Sequence[Candidate]]) -> None:
        """Stores all samples of each key from number 0 on; a set with a failed candidate is not stored."""
        storable = {
            key: candidates
            for key, candidates in sets.items()
            if all(candidate.status != "failed" for candidate in candidates)
        }
        lines = [_encode_line(key, candidates) for key, candidates in storable.items()]
        if not lines:
            return
        header = json.dumps([[key, len(line)] for key, line in zip(storable, lines, strict=True)]).encode()
        with disk_errors(self._folder):
            file = self._file = self._file or self._new_file()
            try:
                _write_all(file, b"".join((header, b"\n", *lines)))
            except BaseException:
                # Nothing may follow an incomplete block.
                self._close_file()
                raise
            if file.tell() > _MAX_FILE_BYTES:
                self._close_file()

    def close(self) -> None:
        """Closes the files."""
        self._close_file()
        self._lock.close()

    def __enter__(self) -> "CandidateStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _new_file(self) -> IO[bytes]:
        path = self._folder / f"{os.getpid()}-{uuid.uuid4().hex[:12]}.jsonl"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        # Unbuffered, so that a kill loses no block that `put` has written.
        return os.fdopen(os.open(path, flags, PRIVATE_FILE), "wb", buffering=0)

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()

    def _refresh(self) -> None:
        """Reads the blocks that were added since the last call, also by other processes."""
        keys: list[int] = []
        locations: list[tuple[int, int, int]] = []
        with disk_errors(self._folder):
            for path in sorted(self._folder.glob("*.jsonl")):
                file_index = self._file_indices.setdefault(path, len(self._file_indices))
                offset = self._read_offsets.get(path, 0)
                if path.stat().st_size == offset:
                    continue
                for key, start, size, end in _read_blocks(path, offset):
                    keys.append(_key_number(key))
                    locations.append((file_index, size, start))
                    self._read_offsets[path] = end
        if not keys:
            return
        added = np.array(keys, dtype="<u8")
        order = added.argsort(kind="stable")
        added, added_locations = added[order], np.array(locations, dtype=_LOCATION)[order]
        indices = self._keys.searchsorted(added, "right")
        self._keys = np.insert(self._keys, indices, added)
        self._locations = np.insert(self._locations, indices, added_locations)

    def _read_sets(
        self, path: Path, locations: Sequence[tuple[int, int, str]]
    ) -> Iterator[tuple[str, tuple[Candidate, ...]]]:
        """Key and candidates at each (start, size, key) of a file; skips damaged sets and those of another key."""
        origin = self._origin
        with path.open("rb") as file:
            for start, size, key in locations:
                file.seek(start)
                try:
                    values = json.loads(file.read(size))
                    candidates = tuple(
                        Candidate(generator=origin.generator, revision=origin.revision, **fields)
                        for fields in values["candidates"]
                    )
                    key_matches = values["key"] == key
                except (ValueError, TypeError, KeyError, RecordError):
                    continue
                if key_matches:
                    yield key, candidates


@dataclass(frozen=True, kw_only=True)
class StoreEntry:
    """The stored candidates of one origin, or all stored answers of endpoints (`generator` is empty then).

    `sets` is the number of sets of candidates, or of answers; `last_used` is in seconds of `time.time`; `fresh` is the
    name of the `--fresh` run that drew them.
    """

    kind: Literal["candidates", "answers"]
    path: Path
    generator: str = ""
    revision: str = ""
    version: int = 0
    sets: int
    size_bytes: int
    last_used: float
    fresh: str = ""


def list_entries(work: Path) -> list[StoreEntry]:
    """Lists the stored candidates and answers of a work folder, the least recently used first."""
    entries = _list_folder(work)
    for folder in sorted((work / FRESH_FOLDER).glob("*")):
        entries += [replace(entry, fresh=folder.name) for entry in _list_folder(folder)]
    return sorted(entries, key=lambda entry: entry.last_used)


def _list_folder(work: Path) -> list[StoreEntry]:
    entries = [_candidates_entry(path.parent) for path in (work / CANDIDATES).glob(f"*/{_ORIGIN}")]
    answers = [path.stat() for path in (work / ANSWERS).glob("[0-9a-f][0-9a-f]/*.json")]
    if answers:
        lock_times = [path.stat().st_mtime for path in [work / ANSWERS / LOCK] if path.exists()]
        size = sum(stat.st_size for stat in answers)
        last_used = max([*(stat.st_mtime for stat in answers), *lock_times])
        entries.append(
            StoreEntry(kind="answers", path=work / ANSWERS, sets=len(answers), size_bytes=size, last_used=last_used),
        )
    return entries


def not_reusable_reason(entry: StoreEntry, fresh: Collection[str] = ()) -> str:
    """Why no run of this version can use an entry; empty if one can. `fresh` names the `--fresh` runs with work."""
    if entry.path.name.startswith(REMOVED_PREFIX):
        return "left by a removal that was killed"
    if entry.fresh and entry.fresh not in fresh:
        return "drawn by a --fresh run whose work no longer exists"
    if entry.kind == "answers" or entry.version == DRAWING_VERSION:
        return ""
    return f"drawn by version {entry.version} of the drawing code, the current one is {DRAWING_VERSION}"


def remove_entry(entry: StoreEntry) -> None:
    """Deletes the candidates or answers of an entry, but not the ledgers. Raises FolderError if a run is using them."""
    with disk_errors(entry.path), open_lock(entry.path / LOCK) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderError(f"{entry.path}: in use by a run; wait for the run to end, or stop it") from None
        if entry.kind == "candidates":
            remove_folder(entry.path)
        else:
            for folder in entry.path.glob("[0-9a-f][0-9a-f]"):
                shutil.rmtree(folder, ignore_errors=True)
    if entry.fresh:
        for parent in entry.path.parents[: 2 if entry.kind == "candidates" else 1]:
            with contextlib.suppress(OSError):  # The folder is not empty.
                parent.rmdir()


def _candidates_entry(folder: Path) -> StoreEntry:
    values = json.loads((folder / _ORIGIN).read_bytes())
    files = list(folder.glob("*.jsonl"))
    return StoreEntry(
        kind="candidates",
        path=folder,
        generator=str(values["generator"]),
        revision=str(values["revision"]),
        version=int(values["version"]),
        sets=sum(1 for path in files for _ in _read_blocks(path, 0)),
        size_bytes=sum(path.stat().st_size for path in files),
        last_used=max(path.stat().st_mtime for path in (folder / _ORIGIN, *files)),
    )


def _write_all(file: IO[bytes], block: bytes) -> None:
    remaining = memoryview(block)
    while remaining:
        remaining = remaining[file.write(remaining) :]


def _key_number(key: str) -> int:
    return int(key[:16], 16)


def _encode_line(key: str, candidates: Sequence[Candidate]) -> bytes:
    values = [{name: getattr(candidate, name) for name in _STORED_FIELDS} for candidate in candidates]
    return json.dumps({"key": key, "candidates": values}).encode() + b"\n"


def _read_blocks(path: Path, start: int) -> Iterator[tuple[str, int, int, int]]:
    """Key, start and size of each set in the complete blocks from `start` on, and the end of its block."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while start < size:
            file.seek(start)
            header = file.readline()
            try:
                sets = [(str(key), int(length)) for key, length in json.loads(header)]
                for key, _ in sets:
                    _key_number(key)
            except (ValueError, TypeError):
                return  # An incomplete block, or damage: what follows cannot be trusted.
            position = start + len(header)
            end = position + sum(length for _, length in sets)
            if not header.endswith(b"\n") or end > size:
                return
            for key, length in sets:
                yield key, position, length, end
                position += length
            start = end
