"""Files that other users cannot tamper with: locks, atomically replaced files, private folders.

A folder of work may lie on a volume that several people write to. So nothing here is opened through a symbolic link
that someone else put there, and no name of a temporary file can be foreseen.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from cappy.errors import FolderError

PRIVATE_FILE = 0o600
PRIVATE_FOLDER = 0o700
REMOVED = ".removed-"
_PUBLIC_FILE = 0o666
"""Less the umask."""
_SAFELY = os.O_CLOEXEC | os.O_NOFOLLOW
_REMEDY = "delete it, and run the same command again"


@contextlib.contextmanager
def hold_lock(path: Path, patience: float = -1) -> Iterator[None]:
    """Holds a lock file until the block or the process ends, however that ends; the file says which process holds it.

    Waits `patience` seconds, or as long as it takes if negative; filelock.Timeout where another one holds it then. File
    and folder are made for their owner alone where they are missing; FolderError as for `open_lock`. A
    disk without locks of the kernel's is an OSError: a lock by a file's being there would not fall with its process.
    """
    while True:
        make_private(path.parent)
        taken: list[os.stat_result] = []
        lock = _file_lock(path, patience, taken)
        try:
            lock.acquire()
        except FileNotFoundError:  # Its folder was removed in the meantime.
            continue
        except Timeout:
            raise
        except OSError as error:
            _refuse_odd(path, error)
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(taken[0], path.stat()):
                break
        lock.release()  # Another one removed the file while this process waited for it.
    try:
        yield
    finally:
        lock.release()


def _file_lock(path: Path, patience: float, taken: list[os.stat_result]) -> FileLock:
    """The lock, which puts what it is the lock of into `taken` once it is held."""

    def sign(descriptor: int) -> None:
        _sign(descriptor, path)
        taken.append(os.fstat(descriptor))

    return FileLock(
        path, timeout=patience, mode=PRIVATE_FILE, thread_local=False, fallback_to_soft=False, on_acquired=sign
    )


def lock_holder(path: Path) -> str:
    """The number of the process that holds a lock file; "unknown" where it says none."""
    with open_lock(path) as file:
        return file.read(20).strip() or "unknown"


def open_lock(path: Path) -> IO[str]:
    """Opens a lock file for reading and writing, and makes it, for its owner alone, where it is missing.

    FolderError where the path is a symbolic link, no regular file, or one that has another name too: who takes the lock
    writes to it. It may belong to another user, since a volume's locks are those of all who work there.
    """
    try:
        # O_NONBLOCK: opening a pipe would wait for its other end.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | _SAFELY, PRIVATE_FILE)
    except OSError as error:
        _refuse_odd(path, error)
        raise
    try:
        _check(descriptor, path)
    except FolderError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "r+", encoding="utf-8")


def lock_shared(path: Path) -> IO[str]:
    """A lock file that is held by all who use its folder, and keeps whoever would remove that away until it is closed.

    File and folder are made where they are missing. Its time says when the folder was used last.
    """
    while True:
        make_private(path.parent)
        lock = open_lock(path)
        fcntl.flock(lock, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                with contextlib.suppress(OSError):  # A mounted bucket may keep no such times.
                    os.utime(path)
                return lock
        lock.close()  # Removed in the meantime.


def _sign(descriptor: int, path: Path) -> None:
    """Writes the process's number into a lock file that it has just taken."""
    _check(descriptor, path)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)


def _refuse_odd(path: Path, error: OSError) -> None:
    """FolderError where a lock file could not be opened because it is none."""
    if path.is_symlink():
        raise FolderError(f"{path}: is a symbolic link, and a lock file must not be one; {_REMEDY}") from error
    if error.errno in (errno.EISDIR, errno.ENXIO):
        raise FolderError(f"{path}: is not a regular file, and a lock must be one; {_REMEDY}") from error


def _check(descriptor: int, path: Path) -> None:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        kind = "has another name too (a hard link)" if stat.S_ISREG(status.st_mode) else "is not a regular file"
        raise FolderError(f"{path}: {kind}, and a lock file must not; {_REMEDY}")


@contextlib.contextmanager
def atomic_write(path: Path, *, private: bool = False) -> Iterator[IO[bytes]]:
    """A new file under a hidden name, which takes the place of `path` when the block ends well.

    A private one can be read by its owner alone, whatever the umask.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFELY
    descriptor = os.open(temporary, flags, PRIVATE_FILE if private else _PUBLIC_FILE)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def make_private(folder: Path) -> None:
    """Creates a folder with mode 0700, whatever the umask; an existing one keeps its mode."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder with all that is in it, under a hidden name first.

    Whoever comes meanwhile finds none and makes one of their own; what a killed removal leaves is named `REMOVED...`.
    """
    gone = folder.with_name(f"{REMOVED}{secrets.token_hex(8)}")
    folder.rename(gone)
    shutil.rmtree(gone)


def refuse_links(folder: Path, name: str) -> None:
    """FolderError where a folder between `folder` and the file `name` in it is a symbolic link: it would lead out."""
    path = folder
    for part in Path(name).parts[:-1]:
        path /= part
        if path.is_symlink():
            raise FolderError(f"{path}: is a symbolic link, which leads out of the folder; delete it, and run again")
