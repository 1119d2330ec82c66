"""Files that other users cannot tamper with: locks, atomically replaced files, private folders.

A work folder may be on a volume that several people write to. So nothing here is opened through a symbolic link that
someone else created, and names of temporary files are unpredictable.
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
REMOVED_PREFIX = ".removed-"
_PUBLIC_FILE = 0o666
"""Mode of a file that is not private, before the umask is applied."""
_SAFE_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW
_REMEDY = "delete it and run the same command again"


@contextlib.contextmanager
def hold_lock(path: Path, timeout: float = -1) -> Iterator[None]:
    """Holds a lock file until the block or the process ends, even if it is killed; the file contains the process id.

    Waits at most `timeout` seconds for another process, or without limit if negative. A missing file or folder is
    created with access for its owner only. Raises filelock.Timeout if another process still holds the lock, FolderError
    like `open_lock`, and OSError on a file system without kernel locks: a lock that is only the existence of a file
    would outlive a killed process.
    """
    while True:
        make_private(path.parent)
        statuses: list[os.stat_result] = []
        lock = _file_lock(path, timeout, statuses)
        try:
            lock.acquire()
        except FileNotFoundError:  # The folder was removed in the meantime.
            continue
        except Timeout:
            raise
        except OSError as error:
            _refuse_irregular(path, error)
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(statuses[0], path.stat()):
                break
        lock.release()  # Another process removed the file while this one waited for it.
    try:
        yield
    finally:
        lock.release()


def _file_lock(path: Path, timeout: float, statuses: list[os.stat_result]) -> FileLock:
    """The lock; once it is acquired, the status of its file is appended to `statuses`."""

    def on_acquired(descriptor: int) -> None:
        _write_pid(descriptor, path)
        statuses.append(os.fstat(descriptor))

    return FileLock(
        path, timeout=timeout, mode=PRIVATE_FILE, thread_local=False, fallback_to_soft=False, on_acquired=on_acquired
    )


def lock_holder(path: Path) -> str:
    """The id of the process that holds a lock file; "unknown" if the file has none."""
    with open_lock(path) as file:
        return file.read(20).strip() or "unknown"


def open_lock(path: Path) -> IO[str]:
    """Opens a lock file for reading and writing; a missing one is created with access for its owner only.

    The file may belong to another user, because all users of a volume share its locks. Raises FolderError if the path
    is a symbolic link, not a regular file, or has a second hard link, since whoever acquires the lock writes to it.
    """
    try:
        # O_NONBLOCK: opening a pipe would block until its other end is opened.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | _SAFE_FLAGS, PRIVATE_FILE)
    except OSError as error:
        _refuse_irregular(path, error)
        raise
    try:
        _check_regular(descriptor, path)
    except FolderError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "r+", encoding="utf-8")


def lock_shared(path: Path) -> IO[str]:
    """Acquires a shared lock on a folder: nobody removes the folder until the returned file is closed.

    A missing file or folder is created. The file's modification time says when the folder was last used.
    """
    while True:
        make_private(path.parent)
        lock = open_lock(path)
        fcntl.flock(lock, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                with contextlib.suppress(OSError):  # A mounted bucket may not support setting times.
                    os.utime(path)
                return lock
        lock.close()  # Removed in the meantime.


def _write_pid(descriptor: int, path: Path) -> None:
    """Writes the process id into a lock file that this process has just acquired."""
    _check_regular(descriptor, path)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)


def _refuse_irregular(path: Path, error: OSError) -> None:
    """Raises FolderError if a lock file could not be opened because it is not a regular file."""
    if path.is_symlink():
        raise FolderError(f"{path}: a lock file must not be a symbolic link; {_REMEDY}") from error
    if error.errno in (errno.EISDIR, errno.ENXIO):
        raise FolderError(f"{path}: a lock file must be a regular file; {_REMEDY}") from error


def _check_regular(descriptor: int, path: Path) -> None:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        rule = "must not have a second hard link" if stat.S_ISREG(status.st_mode) else "must be a regular file"
        raise FolderError(f"{path}: a lock file {rule}; {_REMEDY}")


@contextlib.contextmanager
def atomic_write(path: Path, *, private: bool = False) -> Iterator[IO[bytes]]:
    """Opens a temporary file that replaces `path` if the block ends without an error.

    A private file is readable by its owner only, whatever the umask.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFE_FLAGS
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
    """Removes a folder and its contents after renaming it, so that other processes can create it again at once.

    A removal that is killed leaves a folder whose name starts with `REMOVED_PREFIX`.
    """
    temporary = folder.with_name(f"{REMOVED_PREFIX}{secrets.token_hex(8)}")
    folder.rename(temporary)
    shutil.rmtree(temporary)


def refuse_links(folder: Path, name: str) -> None:
    """Raises FolderError if a subfolder on the path from `folder` to its file `name` is a symbolic link."""
    path = folder
    for part in Path(name).parts[:-1]:
        path /= part
        if path.is_symlink():
            raise FolderError(f"{path}: is a symbolic link and may lead outside the folder; delete it and run again")
