"""Resumable work: under a key, behind a lock, published at the end; `parts` does what lies between.

An orchestrator gives every attempt a fresh output path, so unfinished work lies in a folder of our own, named by what
is computed (`cappy.keys`) and not by who asked for it.

Several machines share a piece of work by shards: shard i of N does its rows and no other does. `list_pieces` lists what lies
in a work folder, and which of it a run can still find.
"""

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from filelock import Timeout
from pydantic import Field

from cappy.errors import ConfigError, FolderError, quote
from cappy.files import hold_lock, lock_holder, remove_folder
from cappy.keys import KEY, Key, work_key
from cappy.records.folder import Manifest, disk_errors, publish, write_bytes
from cappy.steps import STEP_SPECS, step_version

LOGGER = logging.getLogger(__name__)
LOCK = ".lock"
JOBS = "jobs"
"""Folder, under the work folder, of the jobs that train on a platform."""
WAIT_SECONDS = 10.0


@contextlib.contextmanager
def claim(
    work: Path, step: str, settings: Mapping[str, object], inputs: Sequence[str] = (), *, fresh: str = ""
) -> Iterator[Path]:
    """The folder of this work under `work`, held by this process alone until the block ends or the process dies.

    The key stands in its key.json. Where the folder is new and other work of the step lies beside it, the log says what
    differs. With `fresh`, the name of a run, what was finished or was begun without it is removed first; what such a
    run began and did not finish is continued. FolderError if another living process holds it for more than
    `WAIT_SECONDS` (a killed one lets go by itself).
    """
    key = work_key(step, settings, inputs, fresh=fresh)
    with lock_folder(work / step / key.name) as folder:
        begin(folder, key)
        yield folder


def begin(folder: Path, key: Key) -> None:
    """Writes the key into the folder of its work, which this process holds.

    What lies there is removed first where the run asked for a fresh start, and where no key vouches for it: a run was
    killed while it removed it.
    """
    if not must_start_over(folder, key):
        return
    _clear(folder)
    if not key.fresh:
        _log_differences(key, _read_keys(folder.parent))
    write_bytes(folder / KEY, key.to_json().encode())


def must_start_over(folder: Path, key: Key) -> bool:
    """Whether `begin` removes what lies in the folder of this work."""
    before = read_key(folder)
    if before is None:
        return True
    return key.fresh not in ("", before.fresh) and (before.finished or not before.fresh)


def fresh_name(work: Path, step: str, settings: Mapping[str, object], inputs: Sequence[str], fresh: str) -> str:
    """The name of the fresh start that this work is of, before all its inputs are known; empty where it is of none.

    A run that asks for a fresh start goes on under the name of one that was not finished.
    """
    wanted = Key.from_json(work_key(step, settings, inputs).to_json())
    for key in _read_keys(work / step):
        same = (key.version, key.settings, key.inputs[: len(inputs)]) == (
            wanted.version,
            wanted.settings,
            wanted.inputs,
        )
        if same and key.fresh and not (fresh and key.finished):
            return key.fresh
    return fresh


def read_key(folder: Path) -> Key | None:
    """The key of the work in a folder; None where there is none that this version reads."""
    try:
        return Key.from_json((folder / KEY).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return None


def _read_keys(step_folder: Path) -> list[Key]:
    """The keys of all work of a step, but for what another process is just removing."""
    keys = (read_key(path.parent) for path in sorted(step_folder.glob(f"*/{KEY}")))
    return [key for key in keys if key is not None]


@contextlib.contextmanager
def lock_folder(folder: Path, patience: float | None = None) -> Iterator[Path]:
    """The folder, made where it is missing and held by this process alone.

    FolderError where another one holds it for `patience` seconds, `WAIT_SECONDS` if left out.

    It has the texts of instructions and responses, so its owner alone may enter it. Files in it have the usual rights:
    those that are published are the same files.
    """
    path = folder / LOCK
    with contextlib.ExitStack() as stack:
        with disk_errors(folder):
            try:
                stack.enter_context(hold_lock(path, WAIT_SECONDS if patience is None else patience))
            except Timeout:
                holder = f"process {lock_holder(path)} holds the lock on this work"
                remedy = "wait for it, or stop it and run the same command again"
                raise FolderError(f"{folder}: {holder}; {remedy}") from None
        yield folder


def _log_differences(key: Key, others: Sequence[Key]) -> None:
    """Says what is new about this work, against the work most like it; nothing of another shard of the same work."""
    nearest = min((key.differences(other) for other in others if other.step == key.step), key=len, default=[])
    if nearest and not (len(nearest) == 1 and nearest[0].startswith("shard ")):
        LOGGER.warning("%s: new work: %s", key.step, ", ".join(nearest))


def _clear(folder: Path) -> None:
    """Removes what lies in the folder but its lock, which this process holds; the key first, as it vouches for all."""
    (folder / KEY).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def finish(folder: Path, target: Path, manifest: Manifest) -> Manifest:
    """Publishes the work under `target`, notes in its key that it is finished, and returns its manifest."""
    publish(folder, target, manifest)
    mark_finished(folder)
    return manifest


def mark_finished(folder: Path) -> None:
    """Notes in the key of a folder that its work was published: the next fresh start is a new one."""
    key = read_key(folder)
    if key is not None and not key.finished:
        write_bytes(folder / KEY, replace(key, finished=True).to_json().encode())


MAX_SHARDS = 4_096
ShardOf = Annotated[
    str, Field(description="Share of the work, i/N, counted from 0: 0/4 to 3/4 on four machines; all if left out")
]


@dataclass(frozen=True, slots=True)
class Shard:
    """Shard `index` of `count`, counted from 0."""

    index: int = 0
    count: int = 1

    def rows(self, total: int) -> range:
        """Its rows of `total`: contiguous, and of all shards together each row once."""
        return range(total * self.index // self.count, total * (self.index + 1) // self.count)

    def holds(self, row: int) -> bool:
        """Whether this row is the shard's, for a source of unknown length: rows go to the shards in turn."""
        return row % self.count == self.index


def refuse_same(source: str | Path, target: Path) -> None:
    """ConfigError where the target is the source: what was there would be gone."""
    if Path(source).resolve() == target.resolve():
        raise ConfigError(f"--target: {target} is the source itself; choose another folder")


def parse_shard(text: str) -> Shard:
    """The shard that i/N names, the whole for an empty text; ConfigError for another form."""
    if not text:
        return Shard()
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text.strip())
    if match is None or not int(match[1]) < int(match[2]) <= MAX_SHARDS:
        last = f"counted from 0, of at most {MAX_SHARDS:,}"
        raise ConfigError(f"--shard: {quote(text)} is not a shard i/N; give 0/4 to 3/4 for four, {last}")
    return Shard(int(match[1]), int(match[2]))


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The folder of one piece of work, or of the job that does it elsewhere; `last_used` in seconds of `time.time`."""

    step: str
    path: Path
    key: Key | None
    size_bytes: int
    last_used: float

    @property
    def unreachable(self) -> str:
        """Why no run of this version finds it again; empty where one can."""
        if self.key is None:
            return "without a key: of an earlier release, or left by a removal that was killed"
        present = step_version(self.step)
        return "" if self.key.version == present else f"of version {self.key.version}, the step has {present}"


def list_pieces(work: Path, step: str = "") -> Iterator[Piece]:
    """Every piece of work of the steps, or of one step, the newest first within a step."""
    for name in STEP_SPECS:
        if step in ("", name):
            paths = [*(work / name).glob("*"), *(work / JOBS).glob(f"{job_name(name, '')}*")]
            listed = [_describe_piece(name, path) for path in paths if path.is_dir()]
            yield from sorted(listed, key=lambda piece: -piece.last_used)


def job_name(step: str, key: str) -> str:
    """The name of the job that does a piece of work on a platform, and of its folder under `JOBS`."""
    return f"cappy-{step}-{key}"


def remove_piece(piece: Piece) -> None:
    """Deletes a piece of work; FolderError where a process holds it. What was published from it stays.

    The key goes first: what is left by a killed removal vouches for nothing.
    """
    with lock_folder(piece.path, patience=0), disk_errors(piece.path):
        (piece.path / KEY).unlink(missing_ok=True)
        remove_folder(piece.path)


def _describe_piece(step: str, path: Path) -> Piece:
    """What is known of a folder, which its run may be writing to meanwhile."""
    sizes, used = [0], [0.0]
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                stat = Path(folder, name).stat()
                sizes.append(stat.st_size)
                used.append(stat.st_mtime)
    return Piece(step=step, path=path, key=read_key(path), size_bytes=sum(sizes), last_used=max(used))
