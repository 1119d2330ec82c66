"""Lines of text files, decompressed and decoded as they are read; every error names file:line."""

import contextlib
import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from cappy.errors import ConfigError, RecordError

MAX_LINE_BYTES = 64 * 2**20
_GZIP, _XZ, _BOM = b"\x1f\x8b", b"\xfd7zXZ\x00", b"\xef\xbb\xbf"


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers and texts of a file's lines, ends of line kept; gzip and xz are known by their first bytes.

    RecordError for a line that is not UTF-8 or longer than `MAX_LINE_BYTES`, and for a damaged archive.
    """
    with _opened(path) as file:
        number = 0
        while raw := _next_line(file, path, number + 1):
            number += 1
            yield number, _decoded(raw.removeprefix(_BOM) if number == 1 else raw, f"{path}:{number}")


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """A file that may not be opened becomes one line with its remedy."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{path}: cannot be read ({reason}); mend that or choose another --source") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    with readable(path):
        plain = path.open("rb")
    with plain:
        magic = plain.read(len(_XZ))
        plain.seek(0)
        if magic.startswith(_GZIP):
            with gzip.open(plain, "rb") as unzipped:
                yield unzipped  # type: ignore[misc] # a GzipFile reads as IO[bytes] does
        elif magic.startswith(_XZ):
            with lzma.open(plain, "rb") as unzipped:
                yield unzipped
        else:
            yield plain


def _next_line(file: IO[bytes], path: Path, number: int) -> bytes:
    try:
        raw = file.readline(MAX_LINE_BYTES + 1)
    except MemoryError as error:
        remedy = "pack it with less memory (xz -6), or as gzip"
        raise RecordError(f"{path}:{number}: the compressed file needs too much memory to unpack; {remedy}") from error
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        reason = str(error).rstrip(".")
        raise RecordError(
            f"{path}:{number}: the compressed file is truncated or damaged ({reason}); fetch or pack it again"
        ) from error
    if len(raw) > MAX_LINE_BYTES:
        raise RecordError(f"{path}:{number}: the line is longer than {MAX_LINE_BYTES:,} bytes; write one row per line")
    return raw


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise RecordError(f"{where}: is not UTF-8 (byte {error.start + 1} of the line); save it as UTF-8") from error
