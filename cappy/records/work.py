"""Resumable work: under a key, behind a lock, published at the end; `parts` does what lies between.

An orchestrator gives every attempt a fresh output path, so unfinished work lies in a folder of our own, named by what
is computed (step, settings, inputs, code) and not by who asked for it.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from cappy.config import code_version, fingerprint
from cappy.errors import FolderError
from cappy.files import make_private, open_lock
from cappy.records.folder import Manifest, disk_errors, publish

WAIT_SECONDS = 10.0


@contextlib.contextmanager
def claim(work: Path, step: str, config: Mapping[str, Any], parents: Sequence[str] = ()) -> Iterator[Path]:
    """The folder of this work under `work`, held by this process alone until the block ends or the process dies.

    FolderError if another living process holds it for more than `WAIT_SECONDS` (a killed one lets go by itself).
    """
    with held(work / step / work_key(step, config, parents)) as folder:
        yield folder


def work_key(step: str, config: Mapping[str, Any], parents: Sequence[str] = ()) -> str:
    """The name of a piece of work: a hash of step, config, the manifest hashes of the parents and the code."""
    return fingerprint(step, dict(config), list(parents), code_version())[:24]


@contextlib.contextmanager
def held(folder: Path, patience: float = WAIT_SECONDS) -> Iterator[Path]:
    """The folder, made where it is missing and held by this process alone; FolderError after `patience` seconds.

    It has the texts of instructions and responses, so its owner alone may enter it. Files in it have the usual rights:
    those that are published are the same files.
    """
    with disk_errors(folder):
        make_private(folder)
        lock = open_lock(folder / ".lock")
    with lock:
        _lock(lock, folder, patience)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield folder


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
                raise FolderError(f"{folder}: process {holder} is doing this very work; {remedy}") from None
            time.sleep(0.1)
        else:
            return
