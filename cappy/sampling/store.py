"""What was drawn, kept under the work folder by what was asked for: nothing is drawn or paid for twice.

    candidates/<origin>/origin.json     which generator, revision and version of the drawing code
    candidates/<origin>/*.jsonl         its candidates; each process that draws writes one file, and that one alone
    answers/                            the answers of endpoints, one file each (`cappy.sampling.endpoint.answers`)

A file grows by blocks: a line with keys and lengths, then a line of candidates for each of them. A block that is not
whole yet, or that a killed process left, is passed over. Blocks are written once they are drawn, so a kill loses what
was being drawn. Only keys and places are held in memory, 24 bytes for each set of candidates.

Plain files, because work folders lie on network volumes and mounted buckets too, where a database's locks cannot be
trusted.
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
from cappy.files import PRIVATE_FILE, REMOVED, lock_shared, make_private, open_lock, remove_folder
from cappy.records import Candidate
from cappy.records.folder import disk_errors, write_bytes

DRAWING_VERSION = 1
"""Of the code that draws: raised when the same question gets other candidates, so that none of before is used."""
CANDIDATES = "candidates"
FRESH_FOLDER = "fresh"
"""Folder with a folder for each run that drew again what was kept (`--fresh`)."""
ANSWERS = "answers"
_ORIGIN = "origin.json"
LOCK = ".lock"
_FORMAT = 1
_MAX_FILE_BYTES = 64_000_000
"""A process begins another file after so many bytes: a mounted bucket may send the whole file for each addition."""
_LOCATION = np.dtype([("file", "<u4"), ("size", "<u4"), ("start", "<u8")])
_STORED_FIELDS = ("response", "decoding", "seed", "status", "logprob_sum", "logprob_mean", "num_tokens")
"""What is kept of a candidate, beside its origin."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Who drew: a generator's spec and revision, and the version of the code that draws."""

    generator: str
    revision: str
    version: int


def sample_key(**asked: object) -> str:
    """The key of everything that a draw depends on, its origin and the numbers of the samples aside."""
    return fingerprint("draw", _FORMAT, asked)[:32]


class CandidateStore:
    """The candidates of one origin by key; any number of processes may use a folder at once.

    A key's candidates are the samples 0, 1, ... of one question. Where several sets have one key, the longest counts,
    and of equally long ones the first by the file's name.
    """

    def __init__(self, work: Path, origin: Origin) -> None:
        self._origin = origin
        values = {"generator": origin.generator, "revision": origin.revision, "version": origin.version}
        self._folder = work / CANDIDATES / fingerprint("origin", _FORMAT, values)[:24]
        self._file: IO[bytes] | None = None
        self._paths: dict[Path, int] = {}
        self._read: dict[Path, int] = {}
        self._keys = np.empty(0, dtype="<u8")
        self._places = np.empty(0, dtype=_LOCATION)
        with disk_errors(self._folder):
            make_private(self._folder.parent)
            self._lock = lock_shared(self._folder / LOCK)
            if not (self._folder / _ORIGIN).is_file():
                write_bytes(self._folder / _ORIGIN, json.dumps(values, indent=1).encode(), private=True)
        with contextlib.suppress(OSError):  # A mounted bucket may keep no such times.
            os.utime(self._folder / _ORIGIN)

    def get(self, keys: Sequence[str]) -> dict[str, tuple[Candidate, ...]]:
        """The kept candidates of those keys that have any."""
        self._refresh()
        numbers = np.array([_key_number(key) for key in keys], dtype="<u8")
        first, last = (np.searchsorted(self._keys, numbers, side) for side in ("left", "right"))
        wanted: dict[int, list[tuple[int, int, str]]] = {}
        for key, begin, end in zip(keys, first.tolist(), last.tolist(), strict=True):
            for place in self._places[begin:end]:
                wanted.setdefault(int(place["file"]), []).append((int(place["start"]), int(place["size"]), key))
        best: dict[str, tuple[Candidate, ...]] = {}
        paths = list(self._paths)
        for number in sorted(wanted, key=lambda number: paths[number].name):
            for key, drawn in self._sets(paths[number], sorted(wanted[number])):
                if len(drawn) > len(best.get(key, ())):
                    best[key] = drawn
        return best

    def put(self, sets: Mapping[str, Sequence[Candidate]]) -> None:
        """Keeps candidates, all samples of each key from number 0 on; those that failed are not for keeping."""
        kept = {key: drawn for key, drawn in sets.items() if all(one.status != "failed" for one in drawn)}
        lines = [_line(key, drawn) for key, drawn in kept.items()]
        if not lines:
            return
        head = json.dumps([[key, len(line)] for key, line in zip(kept, lines, strict=True)]).encode()
        with disk_errors(self._folder):
            file = self._file = self._file or self._new_file()
            try:
                _write_all(file, b"".join((head, b"\n", *lines)))
            except BaseException:
                # What was written of the block must stay the end of its file.
                self._end_file()
                raise
            if file.tell() > _MAX_FILE_BYTES:
                self._end_file()

    def close(self) -> None:
        """Closes the files."""
        self._end_file()
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
        # Unbuffered: a kill loses no block that `put` has written.
        return os.fdopen(os.open(path, flags, PRIVATE_FILE), "wb", buffering=0)

    def _end_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()

    def _refresh(self) -> None:
        """Takes in the blocks that were added since the last call, by other processes too."""
        keys: list[int] = []
        places: list[tuple[int, int, int]] = []
        with disk_errors(self._folder):
            for path in sorted(self._folder.glob("*.jsonl")):
                number, read = self._paths.setdefault(path, len(self._paths)), self._read.get(path, 0)
                if path.stat().st_size == read:
                    continue
                for key, start, size, end in _read_blocks(path, read):
                    keys.append(_key_number(key))
                    places.append((number, size, start))
                    self._read[path] = end
        if not keys:
            return
        added = np.array(keys, dtype="<u8")
        order = added.argsort(kind="stable")
        added, new = added[order], np.array(places, dtype=_LOCATION)[order]
        at = self._keys.searchsorted(added, "right")
        self._keys, self._places = np.insert(self._keys, at, added), np.insert(self._places, at, new)

    def _sets(self, path: Path, places: Sequence[tuple[int, int, str]]) -> Iterator[tuple[str, tuple[Candidate, ...]]]:
        """The sets at these places of a file that are under the wanted key; damaged ones are passed over."""
        origin = self._origin
        with path.open("rb") as file:
            for start, size, key in places:
                file.seek(start)
                try:
                    values = json.loads(file.read(size))
                    drawn = tuple(
                        Candidate(generator=origin.generator, revision=origin.revision, **one)
                        for one in values["candidates"]
                    )
                    same = values["key"] == key
                except (ValueError, TypeError, KeyError, RecordError):
                    continue
                if same:
                    yield key, drawn


@dataclass(frozen=True, kw_only=True)
class StoreEntry:
    """What lies in a work folder for one origin, or of endpoints' answers in all (`generator` is empty then).

    `sets` counts questions with their candidates, or answers; `last_used` is in seconds of `time.time`; `fresh` names
    the fresh start that drew them.
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
    """What was drawn and answered for this work folder, one entry for each origin, the least recently used first."""
    own = _list_folder(work)
    for folder in sorted((work / FRESH_FOLDER).glob("*")):
        own += [replace(entry, fresh=folder.name) for entry in _list_folder(folder)]
    return sorted(own, key=lambda entry: entry.last_used)


def _list_folder(work: Path) -> list[StoreEntry]:
    listed = [_candidates_entry(path.parent) for path in (work / CANDIDATES).glob(f"*/{_ORIGIN}")]
    answers = [path.stat() for path in (work / ANSWERS).glob("[0-9a-f][0-9a-f]/*.json")]
    if answers:
        used = [path.stat().st_mtime for path in [work / ANSWERS / LOCK] if path.exists()]
        size, last = sum(one.st_size for one in answers), max([*(one.st_mtime for one in answers), *used])
        listed.append(
            StoreEntry(kind="answers", path=work / ANSWERS, sets=len(answers), size_bytes=size, last_used=last),
        )
    return listed


def unreachable_reason(entry: StoreEntry, fresh: Collection[str] = ()) -> str:
    """Why no run of this version uses an entry; empty where one can. `fresh` are the fresh starts that work is of."""
    if entry.path.name.startswith(REMOVED):
        return "left by a removal that was killed"
    if entry.fresh and entry.fresh not in fresh:
        return "drawn by a run with --fresh, whose work is not there any more"
    if entry.kind == "answers" or entry.version == DRAWING_VERSION:
        return ""
    return f"drawn by version {entry.version}, drawing has {DRAWING_VERSION}"


def remove_entry(entry: StoreEntry) -> None:
    """Deletes what an entry names; FolderError where a run is using it. What endpoints' runs have spent stays known."""
    with disk_errors(entry.path), open_lock(entry.path / LOCK) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderError(f"{entry.path}: a run is drawing from it; wait for it, or stop it first") from None
        if entry.kind == "candidates":
            remove_folder(entry.path)
        else:
            for folder in entry.path.glob("[0-9a-f][0-9a-f]"):
                shutil.rmtree(folder, ignore_errors=True)
    if entry.fresh:
        for parent in entry.path.parents[: 2 if entry.kind == "candidates" else 1]:
            with contextlib.suppress(OSError):  # Something else is in it.
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
    rest = memoryview(block)
    while rest:
        rest = rest[file.write(rest) :]


def _key_number(key: str) -> int:
    return int(key[:16], 16)


def _line(key: str, drawn: Sequence[Candidate]) -> bytes:
    values = [{name: getattr(one, name) for name in _STORED_FIELDS} for one in drawn]
    return json.dumps({"key": key, "candidates": values}).encode() + b"\n"


def _read_blocks(path: Path, start: int) -> Iterator[tuple[str, int, int, int]]:
    """Key, start and size of each set in a file's whole blocks from `start` on, and where its block ends."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while start < size:
            file.seek(start)
            head = file.readline()
            try:
                sets = [(str(key), int(length)) for key, length in json.loads(head)]
                for key, _ in sets:
                    _key_number(key)
            except (ValueError, TypeError):
                return  # The beginning of a block, or damage: nothing behind it can be trusted.
            place = start + len(head)
            end = place + sum(length for _, length in sets)
            if not head.endswith(b"\n") or end > size:
                return
            for key, length in sets:
                yield key, place, length, end
                place += length
            start = end
