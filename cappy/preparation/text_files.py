"""Text files by lines or by pieces, unpacked and decoded as they are read; every error names file:line.

Unpacked are gzip, xz, bzip2, Zstandard, and a zip archive of one file, never ahead of what is asked for: a small file
that would fill a disk costs a buffer.
"""

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

import pyarrow as pa

from cappy.errors import ConfigError, RecordError, quote

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

SUFFIXES = (".gz", ".xz", ".bz2", ".zst", ".zip")
_GZIP, _XZ, _BZIP2, _ZSTANDARD, _ZIP = b"\x1f\x8b", b"\xfd7zXZ\x00", b"BZh", b"\x28\xb5\x2f\xfd", b"PK\x03\x04"
_HEAD_BYTES = 512
_DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile, OSError)
"""What the unpackers raise on damaged bytes."""

_BY_PANDAS = """python -c "import pandas; pandas.{read}('{name}').to_parquet('rows.parquet')\""""
_OTHERS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\xd0\xcf\x11\xe0", "an Excel workbook", "libreoffice --headless --convert-to csv {name}"),
    (0, b"SQLite format 3\x00", "a SQLite database", "sqlite3 -header -csv {name} 'SELECT * FROM TABLE' > rows.csv"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x {name}"),
    (0, b"Rar!\x1a", "a RAR archive", "unrar x {name}"),
    (257, b"ustar", "a tar archive", "tar -xf {name}"),
    (0, b"ORC", "an ORC file", _BY_PANDAS.replace("{read}", "read_orc")),
    (0, b"\x89HDF", "an HDF5 file", _BY_PANDAS.replace("{read}", "read_hdf")),
    (0, b"FEA1", "a Feather file of version 1", _BY_PANDAS.replace("{read}", "read_feather")),
    (0, b"Obj\x01", "an Avro file", "avro-tools tojson {name} > rows.jsonl"),
    (0, b"%PDF", "a PDF document", "pdftotext {name}"),
)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """A file that may not be opened becomes one line with its remedy."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{path}: cannot be read ({reason}); mend that or choose another --source") from error


def plain(path: Path) -> Path:
    """The name without what says that it is packed."""
    return path.with_suffix("") if path.suffix in SUFFIXES else path


def is_packed(path: Path) -> bool:
    """Whether a file begins as one that is unpacked does."""
    return head(path).startswith((_GZIP, _XZ, _BZIP2, _ZSTANDARD, _ZIP))


def head(path: Path) -> bytes:
    """The first bytes of a file as they lie on the disk."""
    with readable(path), path.open("rb") as file:
        return file.read(_HEAD_BYTES)


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers and texts of a file's lines, ends of line kept.

    UTF-8, and UTF-16 and UTF-32 where the file begins with their mark. RecordError for a line that is none of them or
    longer than `MAX_LINE_BYTES`, and for a damaged archive.
    """
    encoding = _detect_encoding(path)
    if encoding != "utf-8-sig":
        yield from _wide_lines(path, encoding)
        return
    with _open_unpacked(path) as file:
        number = 1
        while raw := _next_line(file, path, number):
            yield number, _decode(raw.removeprefix(_BOM) if number == 1 else raw, path, number)
            number += 1


def pieces(path: Path, errors: str = "strict", size: int = PIECE) -> Iterator[str]:
    """The text of a file in pieces of `size` characters, whatever its lines; RecordError as for `lines`."""
    encoding, number = _detect_encoding(path), 1
    with _open_unpacked(path) as file, io.TextIOWrapper(file, encoding=encoding, errors=errors, newline="\n") as text:
        while piece := _read(lambda: text.read(size), path, number, encoding):
            yield piece
            number += piece.count("\n")


def _detect_encoding(path: Path) -> str:
    """The encoding by the first bytes, once unpacked; RecordError for UTF-16 that lacks its mark."""
    with _open_unpacked(path) as file:
        try:
            first = file.read(4)
        except (MemoryError, *_DAMAGED):
            return "utf-8-sig"  # whoever reads on names the line
    marked = next((name for mark, name in _WIDE.items() if first.startswith(mark)), None)
    if marked is None and len(first) == 4 and any(first) and b"\0\0" in (first[::2], first[1::2]):
        name = "UTF-16LE" if first[1] == 0 else "UTF-16BE"
        remedy = f"save it as UTF-8: iconv -f {name} -t UTF-8 {path.name} > NEW"
        raise RecordError(f"{path}: is {name} without the mark at its beginning; {remedy}")
    return marked or "utf-8-sig"


def _wide_lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    with _open_unpacked(path) as file, io.TextIOWrapper(file, encoding=encoding, newline="\n") as text:
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
    except _DAMAGED as error:
        raise _damaged_file(path, number, error) from error


def _next_line(file: IO[bytes], path: Path, number: int) -> bytes:
    try:
        raw = file.readline(MAX_LINE_BYTES + 1)
    except MemoryError as error:
        raise _too_much_memory(path, number) from error
    except _DAMAGED as error:
        raise _damaged_file(path, number, error) from error
    if len(raw) > MAX_LINE_BYTES:
        raise _too_long(path, number)
    return raw


def _decode(raw: bytes, path: Path, number: int) -> str:
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


def _damaged_file(path: Path, number: int, error: BaseException) -> RecordError:
    reason = str(error).rstrip(".")
    return RecordError(
        f"{path}:{number}: the compressed file is truncated or damaged ({reason}); fetch or pack it again"
    )


def _too_long(path: Path, number: int) -> RecordError:
    return RecordError(f"{path}:{number}: the line is longer than {MAX_LINE_BYTES:,} bytes; write one row per line")


@contextlib.contextmanager
def _open_unpacked(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked where its first bytes say that it is packed.

    RecordError for an archive of several files, and for a format that holds no text.
    """
    with readable(path):
        raw = path.open("rb")
    with contextlib.ExitStack() as stack:
        stack.enter_context(raw)
        _refuse_other(path, raw.peek(_HEAD_BYTES)[:_HEAD_BYTES])
        unpacked = _unpacker(path, raw, stack)
        if unpacked is not raw:
            _refuse_other(path, _peek(unpacked))
        yield unpacked


def _peek(file: IO[bytes]) -> bytes:
    """The first bytes of what is packed; none where it is damaged, which whoever reads on finds."""
    try:
        return file.peek(_HEAD_BYTES)[:_HEAD_BYTES]  # type: ignore[attr-defined,no-any-return] # all unpackers have it
    except (MemoryError, *_DAMAGED):
        return b""


def _unpacker(path: Path, raw: io.BufferedReader, stack: contextlib.ExitStack) -> IO[bytes]:
    magic = raw.read(_HEAD_BYTES)
    raw.seek(0)
    if magic.startswith(_GZIP):
        packed = gzip.GzipFile(fileobj=raw)
        stack.callback(packed.close)
        return packed  # type: ignore[return-value] # a GzipFile reads as IO[bytes] does
    if magic.startswith(_XZ):
        return stack.enter_context(lzma.open(raw, "rb"))
    if magic.startswith(_BZIP2) and magic[4:10] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"):
        return stack.enter_context(bz2.open(raw, "rb"))
    if magic.startswith(_ZSTANDARD):
        return stack.enter_context(_Zstandard(pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")))
    if magic.startswith(_ZIP):
        return stack.enter_context(_only_member(path, raw, stack))
    return raw


class _Zstandard(io.BufferedReader):
    """A stream of pyarrow that is read by lines; damaged bytes are an EOFError, as of the other unpackers."""

    def readline(self, size: int | None = -1, /) -> bytes:
        try:
            return super().readline(size)
        except OSError as error:
            raise EOFError(str(error)) from error


def _only_member(path: Path, raw: IO[bytes], stack: contextlib.ExitStack) -> IO[bytes]:
    try:
        archive = stack.enter_context(zipfile.ZipFile(raw))
        names = [info.filename for info in archive.infolist() if not info.is_dir()]
        if "[Content_Types].xml" in names:
            _refuse(path, "an Excel workbook or another document of Office", _OTHERS[0][3])
        members = [name for name in names if _is_data(name)]
        if len(members) != 1:
            held = ", ".join(sorted(members)[:5]) or "nothing"
            what = f"is a zip archive of {len(members)} files ({quote(held, 120)})"
            raise RecordError(f"{path}: {what}; unpack it and give one of them: unzip {path.name} -d FOLDER")
        return archive.open(members[0])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise RecordError(f"{path}: cannot be unpacked ({quote(str(error))}); unpack it: unzip {path.name}") from error


def _is_data(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return not any(part.startswith((".", "__MACOSX")) for part in parts)


def _refuse_other(path: Path, first: bytes) -> None:
    for offset, magic, what, command in _OTHERS:
        # Three letters may begin a text too: a header of CSV such as ORCID.
        if first[offset : offset + len(magic)] == magic and (magic != b"ORC" or path.suffix == ".orc"):
            _refuse(path, what, command)
    if first[:1] == b"\x80" and first[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise RecordError(f"{path}: is a pickle, which is never loaded; write its rows as JSON Lines or Parquet")


def _refuse(path: Path, what: str, command: str) -> None:
    raise RecordError(f"{path}: is {what}; turn it into text: {command.replace('{name}', path.name)}")
