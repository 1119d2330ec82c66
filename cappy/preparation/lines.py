"""Text files, unpacked and decoded as they are read, by lines or by pieces; every error names file:line."""

import codecs
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from cappy.errors import RecordError
from cappy.preparation.packing import DAMAGED, unpacked

MAX_LINE_BYTES = 64 * 2**20
PIECE = 2**16
_BOM = b"\xef\xbb\xbf"
_WIDE = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Encodings by the bytes that a file of them begins with; UTF-32's begin with UTF-16's, so they stand first."""


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers and texts of a file's lines, ends of line kept; see `packing` for what is unpacked.

    UTF-8, and UTF-16 and UTF-32 where the file begins with their mark. RecordError for a line that is none of them or
    longer than `MAX_LINE_BYTES`, and for a damaged archive.
    """
    encoding = encoding_of(path)
    if encoding != "utf-8-sig":
        yield from _wide_lines(path, encoding)
        return
    with unpacked(path) as file:
        number = 1
        while raw := _next_line(file, path, number):
            yield number, _decoded(raw.removeprefix(_BOM) if number == 1 else raw, path, number)
            number += 1


def pieces(path: Path, errors: str = "strict", size: int = PIECE) -> Iterator[str]:
    """The text of a file in pieces of `size` characters, whatever its lines; RecordError as for `lines`."""
    encoding, number = encoding_of(path), 1
    with unpacked(path) as file, io.TextIOWrapper(file, encoding=encoding, errors=errors, newline="\n") as text:
        while piece := _read(lambda: text.read(size), path, number, encoding):
            yield piece
            number += piece.count("\n")


def encoding_of(path: Path) -> str:
    """The encoding by the first bytes, once unpacked; RecordError for UTF-16 that lacks its mark."""
    with unpacked(path) as file:
        try:
            first = file.read(4)
        except (MemoryError, *DAMAGED):
            return "utf-8-sig"  # whoever reads on names the line
    marked = next((name for mark, name in _WIDE.items() if first.startswith(mark)), None)
    if marked is None and len(first) == 4 and any(first) and b"\0\0" in (first[::2], first[1::2]):
        name = "UTF-16LE" if first[1] == 0 else "UTF-16BE"
        remedy = f"save it as UTF-8: iconv -f {name} -t UTF-8 {path.name} > NEW"
        raise RecordError(f"{path}: is {name} without the mark at its beginning; {remedy}")
    return marked or "utf-8-sig"


def _wide_lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    with unpacked(path) as file, io.TextIOWrapper(file, encoding=encoding, newline="\n") as text:
        number = 1
        while line := _read(lambda: text.readline(MAX_LINE_BYTES + 1), path, number, encoding):
            if len(line) > MAX_LINE_BYTES:
                raise _too_long(path, number)
            yield number, line
            number += 1


def _read(read: Callable[[], str], path: Path, number: int, encoding: str) -> str:
    try:
        return read()
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise RecordError(f"{path}:{number}: is not {name} from there on; {_as_utf8(path)}") from error
    except MemoryError as error:
        raise _too_much_memory(path, number) from error
    except DAMAGED as error:
        raise _damaged(path, number, error) from error


def _next_line(file: IO[bytes], path: Path, number: int) -> bytes:
    try:
        raw = file.readline(MAX_LINE_BYTES + 1)
    except MemoryError as error:
        raise _too_much_memory(path, number) from error
    except DAMAGED as error:
        raise _damaged(path, number, error) from error
    if len(raw) > MAX_LINE_BYTES:
        raise _too_long(path, number)
    return raw


def _decoded(raw: bytes, path: Path, number: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        where = f"{path}:{number}: is not UTF-8 (byte {error.start + 1} of the line)"
        raise RecordError(f"{where}; {_as_utf8(path)}") from error


def _as_utf8(path: Path) -> str:
    return f"save it as UTF-8: iconv -f WINDOWS-1252 -t UTF-8 {path.name} > NEW"


def _too_much_memory(path: Path, number: int) -> RecordError:
    remedy = "pack it with less memory (xz -6), or as gzip"
    return RecordError(f"{path}:{number}: the compressed file needs too much memory to unpack; {remedy}")


def _damaged(path: Path, number: int, error: BaseException) -> RecordError:
    reason = str(error).rstrip(".")
    return RecordError(
        f"{path}:{number}: the compressed file is truncated or damaged ({reason}); fetch or pack it again"
    )


def _too_long(path: Path, number: int) -> RecordError:
    return RecordError(f"{path}:{number}: the line is longer than {MAX_LINE_BYTES:,} bytes; write one row per line")
