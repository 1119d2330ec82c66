"""Resumable work: a run locks the folder of its work, and publishes the result when it is finished.

An orchestrator gives every attempt a new output path, so unfinished work is kept in a separate folder that is named
after what is computed (`cappy.steps`). `cappy.records.parts` processes the parts in such a folder.

Several machines can share work by shards: shard i of N processes its own rows. `list_work_folders` lists the folders of
all work and says which ones later runs can still reuse.
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
from cappy.records.folder import Manifest, disk_errors, publish, write_bytes
from cappy.steps import KEY, STEP_SPECS, Key, step_version, work_key

LOGGER = logging.getLogger(__name__)
LOCK = ".lock"
JOBS = "jobs"
"""Folder in the work folder for jobs that train on a platform."""
WAIT_SECONDS = 10.0


@contextlib.contextmanager
def claim(
    work: Path, step: str, settings: Mapping[str, object], inputs: Sequence[str] = (), *, fresh: str = ""
) -> Iterator[Path]:
    """Yields the folder of this work in `work`, locked by this process until the block ends or the process exits.

    The key is written to key.json. If the folder is new and there is other work of the step, the log says what differs.
    `fresh` is the name of a run that must not reuse earlier work (--fresh), empty for any other run. Earlier work is
    removed first; only unfinished work of an earlier fresh run is continued. Raises FolderError if another process
    holds the lock for more than `WAIT_SECONDS`; a killed process releases it.
    """
    key = work_key(step, settings, inputs, fresh=fresh)
    with lock_folder(work / step / key.name) as folder:
        begin(folder, key)
        yield folder


def begin(folder: Path, key: Key) -> None:
    """Writes the key into the folder of its work, which this process has locked.

    Earlier work is removed first if the run asked for a fresh start, or if there is no key, because its removal was
    interrupted.
    """
    if not must_start_over(folder, key):
        return
    _clear(folder)
    if not key.fresh:
        _log_differences(key, _read_keys(folder.parent))
    write_bytes(folder / KEY, key.to_json().encode())


def must_start_over(folder: Path, key: Key) -> bool:
    """Whether `begin` removes earlier work from the folder."""
    previous = read_key(folder)
    if previous is None:
        return True
    return key.fresh not in ("", previous.fresh) and (previous.finished or not previous.fresh)


def fresh_name(work: Path, step: str, settings: Mapping[str, object], inputs: Sequence[str], fresh: str) -> str:
    """The name of the fresh run that has work with these settings and whose inputs start with `inputs`; else `fresh`.

    `fresh` is the name of this run if it has --fresh, otherwise empty. A run with --fresh continues the work of an
    unfinished fresh run under the name of that run, and does not continue finished work.
    """
    expected = Key.from_json(work_key(step, settings, inputs).to_json())
    for key in _read_keys(work / step):
        is_same = (key.version, key.settings, key.inputs[: len(inputs)]) == (
            expected.version,
            expected.settings,
            expected.inputs,
        )
        if is_same and key.fresh and not (fresh and key.finished):
            return key.fresh
    return fresh


def read_key(folder: Path) -> Key | None:
    """The key of the work in a folder; None if there is none that this version can read."""
    try:
        return Key.from_json((folder / KEY).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return None


def _read_keys(step_folder: Path) -> list[Key]:
    """The keys of all work of a step; folders that another process is removing are skipped."""
    keys = (read_key(path.parent) for path in sorted(step_folder.glob(f"*/{KEY}")))
    return [key for key in keys if key is not None]


@contextlib.contextmanager
def lock_folder(folder: Path, timeout: float | None = None) -> Iterator[Path]:
    """Locks a folder, which is created if it is missing.

    Raises FolderError if another process holds the lock for `timeout` seconds, by default `WAIT_SECONDS`.

    Only its owner may enter the folder, because it contains instructions and responses. Files in it have the usual
    permissions, because they are published by hard links.
    """
    path = folder / LOCK
    with contextlib.ExitStack() as stack:
        with disk_errors(folder):
            try:
                stack.enter_context(hold_lock(path, WAIT_SECONDS if timeout is None else timeout))
            except Timeout:
                holder = f"process {lock_holder(path)} holds the lock on this work"
                remedy = "wait for it, or stop it and run the same command again"
                raise FolderError(f"{folder}: {holder}; {remedy}") from None
        yield folder


def _log_differences(key: Key, others: Sequence[Key]) -> None:
    """Logs how this work differs from the most similar other work, unless only the shard differs."""
    nearest = min((key.differences(other) for other in others if other.step == key.step), key=len, default=[])
    if nearest and not (len(nearest) == 1 and nearest[0].startswith("shard ")):
        LOGGER.warning("%s: new work, because of %s", key.step, ", ".join(nearest))


def _clear(folder: Path) -> None:
    """Removes all but the lock from the folder, the key first, since a folder with a key counts as valid."""
    (folder / KEY).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def finish(folder: Path, target: Path, manifest: Manifest) -> Manifest:
    """Publishes the work in `target`, marks its key as finished, and returns the manifest."""
    publish(folder, target, manifest)
    mark_finished(folder)
    return manifest


def mark_finished(folder: Path) -> None:
    """Marks the key of a folder as published, so that the next fresh run starts over."""
    key = read_key(folder)
    if key is not None and not key.finished:
        write_bytes(folder / KEY, replace(key, finished=True).to_json().encode())


MAX_SHARDS = 4_096
ShardSetting = Annotated[
    str, Field(description="Shard of the work as i/N, counted from 0: 0/4 to 3/4 on four machines; default: all")
]


@dataclass(frozen=True, slots=True)
class Shard:
    """Shard `index` of `count`, counted from 0."""

    index: int = 0
    count: int = 1

    def rows(self, total: int) -> range:
        """The contiguous range of the shard out of `total` rows; all shards together cover each row once."""
        return range(total * self.index // self.count, total * (self.index + 1) // self.count)

    def holds(self, row: int) -> bool:
        """Whether a row belongs to the shard, for a source of unknown length: rows are assigned round-robin."""
        return row % self.count == self.index


def refuse_same_folder(source: str | Path, target: Path) -> None:
    """Raises ConfigError if the target is the source, which would be overwritten."""
    if Path(source).resolve() == target.resolve():
        raise ConfigError(f"--target: {target} is the source itself; choose another folder")


def parse_shard(text: str) -> Shard:
    """Parses i/N; an empty text means all of the work. Raises ConfigError for anything else."""
    if not text:
        return Shard()
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text.strip())
    if match is None or not int(match[1]) < int(match[2]) <= MAX_SHARDS:
        limit = f"counted from 0, at most {MAX_SHARDS:,}"
        raise ConfigError(f"--shard: {quote(text)} is not a shard i/N; give 0/4 to 3/4 for four shards, {limit}")
    return Shard(int(match[1]), int(match[2]))


@dataclass(frozen=True, kw_only=True)
class WorkFolder:
    """The folder of a piece of work, or of its job on a platform; `last_used` in seconds of `time.time`."""

    step: str
    path: Path
    key: Key | None
    size_bytes: int
    last_used: float

    @property
    def not_reusable_reason(self) -> str:
        """Why no run of this version can reuse it; empty if one can."""
        if self.key is None:
            return "without a key: written by an earlier release, or left by an interrupted removal"
        current = step_version(self.step)
        return (
            ""
            if self.key.version == current
            else f"of version {self.key.version} of the step, which is now at version {current}"
        )


def list_work_folders(work: Path, step: str = "") -> Iterator[WorkFolder]:
    """Yields the work folders of all steps, or of one step; within a step, the most recently used first."""
    for name in STEP_SPECS:
        if step in ("", name):
            paths = [*(work / name).glob("*"), *(work / JOBS).glob(f"{job_name(name, '')}*")]
            folders = [_describe_work_folder(name, path) for path in paths if path.is_dir()]
            yield from sorted(folders, key=lambda folder: -folder.last_used)


def job_name(step: str, key: str) -> str:
    """The name of the job that does a piece of work on a platform, and of its folder under `JOBS`."""
    return f"cappy-{step}-{key}"


def remove_work_folder(work_folder: WorkFolder) -> None:
    """Deletes a work folder; published folders are kept. Raises FolderError if a process has locked it.

    The key is removed first, so that an interrupted removal leaves no valid work.
    """
    with lock_folder(work_folder.path, timeout=0), disk_errors(work_folder.path):
        (work_folder.path / KEY).unlink(missing_ok=True)
        remove_folder(work_folder.path)


def _describe_work_folder(step: str, path: Path) -> WorkFolder:
    """Describes a folder of work; its run may be changing it at the same time."""
    sizes, times = [0], [0.0]
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                stat = Path(folder, name).stat()
                sizes.append(stat.st_size)
                times.append(stat.st_mtime)
    return WorkFolder(step=step, path=path, key=read_key(path), size_bytes=sum(sizes), last_used=max(times))
