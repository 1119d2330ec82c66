"""Resumable work: under a key, behind a lock, published at the end; `parts` does what lies between.

An orchestrator gives every attempt a fresh output path, so unfinished work lies in a folder of our own, named by what
is computed (`cappy.keys`) and not by who asked for it.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from cappy.errors import FolderError
from cappy.files import make_private, open_lock
from cappy.keys import KEY, Key, work_key
from cappy.records.folder import Manifest, disk_errors, publish, write_bytes

LOGGER = logging.getLogger(__name__)
LOCK = ".lock"
WAIT_SECONDS = 10.0


@contextlib.contextmanager
def claim(
    work: Path, step: str, settings: Mapping[str, Any], inputs: Sequence[str] = (), *, fresh: str = ""
) -> Iterator[Path]:
    """The folder of this work under `work`, held by this process alone until the block ends or the process dies.

    The key stands in its key.json. Where the folder is new and other work of the step lies beside it, the log says what
    differs. With `fresh`, the name of a run, what another run left in the folder is removed first; a further attempt of
    the same run continues. FolderError if another living process holds it for more than `WAIT_SECONDS` (a killed one
    lets go by itself).
    """
    key = work_key(step, settings, inputs, fresh=fresh)
    with held(work / step / key.name) as folder:
        begin(folder, key)
        yield folder


def begin(folder: Path, key: Key) -> None:
    """Writes the key into the folder of its work, which this process holds; empties the folder for a fresh start."""
    before = read_key(folder)
    if before is not None and key.fresh in ("", before.fresh):
        return
    if key.fresh:
        _empty(folder)
    else:
        _log_differences(key, keys_of(folder.parent))
    write_bytes(folder / KEY, key.to_json().encode())


def read_key(folder: Path) -> Key | None:
    """The key of the work in a folder; None where there is none that this version reads."""
    try:
        return Key.from_json((folder / KEY).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return None


def keys_of(step_folder: Path) -> list[Key]:
    """The keys of all work of a step, the newest first."""
    paths = sorted(step_folder.glob(f"*/{KEY}"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [key for path in paths if (key := read_key(path.parent)) is not None]


@contextlib.contextmanager
def held(folder: Path, patience: float = WAIT_SECONDS) -> Iterator[Path]:
    """The folder, made where it is missing and held by this process alone; FolderError after `patience` seconds.

    It has the texts of instructions and responses, so its owner alone may enter it. Files in it have the usual rights:
    those that are published are the same files.
    """
    with disk_errors(folder):
        make_private(folder)
        lock = open_lock(folder / LOCK)
    with lock:
        _lock(lock, folder, patience)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield folder


def _log_differences(key: Key, others: Sequence[Key]) -> None:
    """Says what is new about this work, against the work most like it; nothing of another shard of the same work."""
    nearest = min((key.differences(other) for other in others), key=len, default=[])
    if nearest and not (len(nearest) == 1 and nearest[0].startswith("shard ")):
        LOGGER.warning("%s: new work: %s", key.step, ", ".join(nearest))


def _empty(folder: Path) -> None:
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
    """Publishes the work under `target` and returns its manifest."""
    publish(folder, target, manifest)
    return manifest


def _lock(lock: IO[str], folder: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
                remedy = "wait for it, or stop it and run the same command again"
                raise FolderError(f"{folder}: process {holder} holds the lock on this work; {remedy}") from None
            time.sleep(0.1)
        else:
            return
