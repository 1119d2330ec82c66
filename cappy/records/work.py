"""Resumable work: under a key, behind a lock, part by part, published at the end.

An orchestrator gives every attempt a fresh output path, so unfinished work lies in a folder of our own, named by what
is computed (step, settings, inputs, code) and not by who asked for it.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from cappy.config import code_version, fingerprint
from cappy.errors import FolderError
from cappy.progress import Progress
from cappy.records.folder import (
    File,
    Manifest,
    _batched,
    disk_errors,
    publish,
    sha256_of,
    write_bytes,
    write_part,
)
from cappy.records.instance import Instance

WAIT_SECONDS = 10.0
Transform = Callable[[list[Instance]], Iterable[Instance]]


@contextlib.contextmanager
def claim(work: Path, step: str, config: Mapping[str, Any], parents: Sequence[str] = ()) -> Iterator[Path]:
    """The folder of this work under `work`, held by this process alone until the block ends or the process dies.

    Its key is a hash of step, config, the manifest hashes of the parents and the code. FolderError if another living
    process holds it for more than `WAIT_SECONDS` (a killed one lets go by itself).
    """
    key = fingerprint(step, dict(config), list(parents), code_version())[:24]
    folder = work / step / key
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a+")
    with lock:
        _lock(lock, folder)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield folder


def process(
    instances: Iterable[Instance],
    folder: Path,
    transform: Transform,
    *,
    part_rows: int,
    progress: Progress,
    total: int | None = None,
) -> tuple[File, ...]:
    """Runs `transform` over parts of `part_rows` instances and writes each result as a part of `folder`.

    Parts that an earlier start finished, and that still have their sha256, are not done again.
    """
    files: list[File] = []
    done = resumed = 0
    progress(done, total)
    for index, part in enumerate(_batched(instances, part_rows)):
        file = _finished(folder, index)
        if file is not None:
            resumed += len(part)
        else:
            file = write_part(folder, index, list(transform(part)))
            write_bytes(_note(folder, index), json.dumps(asdict(file)).encode())
        files.append(file)
        done += len(part)
        progress(done, total, resumed=resumed)
    return tuple(files)


def finish(folder: Path, target: Path, manifest: Manifest) -> Manifest:
    """Publishes the work under `target` and returns its manifest."""
    publish(folder, target, manifest)
    return manifest


def _finished(folder: Path, index: int) -> File | None:
    note = _note(folder, index)
    if not note.is_file():
        return None
    try:
        file = File(**json.loads(note.read_text()))
    except (ValueError, TypeError):
        return None
    path = folder / file.name
    return file if path.is_file() and sha256_of(path) == file.sha256 else None


def _note(folder: Path, index: int) -> Path:
    return folder / f".part-{index:05d}.json"


def _lock(lock: IO[str], folder: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
                remedy = "wait for it, or stop it and run the same command again"
                raise FolderError(f"{folder}: process {holder} is doing this very work; {remedy}") from None
            time.sleep(0.1)
        else:
            return
