"""Reads text files by lines or pieces, decompressing and decoding on the fly; errors name the file and the line.

It reads gzip, xz, bzip2, Zstandard, and a zip archive of one file. Files are decompressed as they are read, so a small
file that would fill a disk when expanded needs only the memory of one buffer.
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
PIECE_CHARACTERS = 2**16
_BOM = b"\xef\xbb\xbf"
_BOM_ENCODINGS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Encodings by their byte order mark; those of UTF-32 come first because they begin with those of UTF-16."""

COMPRESSION_SUFFIXES = (".gz", ".xz", ".bz2", ".zst", ".zip")
_GZIP, _XZ, _BZIP2, _ZSTANDARD, _ZIP = b"\x1f\x8b", b"\xfd7zXZ\x00", b"BZh", b"\x28\xb5\x2f\xfd", b"PK\x03\x04"
_HEAD_BYTES = 512
_DAMAGE_ERRORS = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile, OSError)
"""Errors that the decompressors raise for damaged bytes."""

_PANDAS_COMMAND = """python -c "import pandas; pandas.{read}('{name}').to_parquet('rows.parquet')\""""
_UNSUPPORTED_FORMATS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\xd0\xcf\x11\xe0", "an Excel workbook", "libreoffice --headless --convert-to csv {name}"),
    (0, b"SQLite format 3\x00", "a SQLite database", "sqlite3 -header -csv {name} 'SELECT * FROM TABLE' > rows.csv"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x {name}"),
    (0, b"Rar!\x1a", "a RAR archive", "unrar x {name}"),
    (257, b"ustar", "a tar archive", "tar -xf {name}"),
    (0, b"ORC", "an ORC file", _PANDAS_COMMAND.replace("{read}", "read_orc")),
    (0, b"\x89HDF", "an HDF5 file", _PANDAS_COMMAND.replace("{read}", "read_hdf")),
    (0, b"FEA1", "a Feather file of version 1", _PANDAS_COMMAND.replace("{read}", "read_feather")),
    (0, b"Obj\x01", "an Avro file", "avro-tools tojson {name} > rows.jsonl"),
    (0, b"%PDF", "a PDF document", "pdftotext {name}"),
)


@contextlib.contextmanager
def translate_read_errors(path: Path) -> Iterator[None]:
    """Turns an OSError on opening a source file into a ConfigError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{path}: cannot be read ({reason}); fix that or choose another --source") from error


def strip_compression_suffix(path: Path) -> Path:
    """The path without a suffix such as .gz."""
    return path.with_suffix("") if path.suffix in COMPRESSION_SUFFIXES else path


def is_compressed(path: Path) -> bool:
    """Whether a file begins with the magic bytes of a supported compression format."""
    return read_head(path).startswith((_GZIP, _XZ, _BZIP2, _ZSTANDARD, _ZIP))


def read_head(path: Path) -> bytes:
    """The first bytes of a file, not decompressed."""
    with translate_read_errors(path), path.open("rb") as file:
        return file.read(_HEAD_BYTES)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the lines of a file with their numbers from 1, line ends included.

    The encoding is UTF-8, or UTF-16 or UTF-32 if the file begins with their byte order mark. Raises RecordError for a
    line that cannot be decoded or is longer than `MAX_LINE_BYTES`, and for a damaged archive.
    """
    encoding = _detect_encoding(path)
    if encoding != "utf-8-sig":
        yield from _read_utf16_or_utf32_lines(path, encoding)
        return
    with _open_decompressed(path) as file:
        number = 1
        while raw := _read_line(file, path, number):
            yield number, _decode(raw.removeprefix(_BOM) if number == 1 else raw, path, number)
            number += 1


def read_pieces(path: Path, errors: str = "strict", size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Yields the text of a file in pieces of `size` characters; raises RecordError like `read_lines`."""
    encoding, number = _detect_encoding(path), 1
    with (
        _open_decompressed(path) as file,
        io.TextIOWrapper(file, encoding=encoding, errors=errors, newline="\n") as text,
    ):
        while piece := _read_text(lambda: text.read(size), path, number, encoding):
            yield piece
            number += piece.count("\n")


def _detect_encoding(path: Path) -> str:
    """The encoding by the first decompressed bytes; raises RecordError for UTF-16 without a byte order mark."""
    with _open_decompressed(path) as file:
        try:
            first_bytes = file.read(4)
        except (MemoryError, *_DAMAGE_ERRORS):
            return "utf-8-sig"  # reading the lines will raise the error, with the line number
    encoding = next((name for mark, name in _BOM_ENCODINGS.items() if first_bytes.startswith(mark)), None)
    if (
        encoding is None
        and len(first_bytes) == 4
        and any(first_bytes)
        and b"\0\0" in (first_bytes[::2], first_bytes[1::2])
    ):
        name = "UTF-16LE" if first_bytes[1] == 0 else "UTF-16BE"
        remedy = f"save it as UTF-8: iconv -f {name} -t UTF-8 {path.name} > NEW"
        raise RecordError(f"{path}: is {name} without a byte order mark; {remedy}")
    return encoding or "utf-8-sig"


def _read_utf16_or_utf32_lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    with _open_decompressed(path) as file, io.TextIOWrapper(file, encoding=encoding, newline="\n") as text:
        number = 1
        while line := _read_text(lambda: text.readline(MAX_LINE_BYTES + 1), path, number, encoding):
            if len(line) > MAX_LINE_BYTES:
                raise _line_length_error(path, number)
            yield number, line
            number += 1


def _read_text(read: Callable[[], str], path: Path, number: int, encoding: str) -> str:
    try:
        return read()
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise RecordError(f"{path}:{number}: is not {name} from this line on; {_utf8_remedy(path)}") from error
    except MemoryError as error:
        raise _memory_error(path, number) from error
    except _DAMAGE_ERRORS as error:
        raise _damage_error(path, number, error) from error


def _read_line(file: IO[bytes], path: Path, number: int) -> bytes:
    try:
        raw = file.readline(MAX_LINE_BYTES + 1)
    except MemoryError as error:
        raise _memory_error(path, number) from error
    except _DAMAGE_ERRORS as error:
        raise _damage_error(path, number, error) from error
    if len(raw) > MAX_LINE_BYTES:
        raise _line_length_error(path, number)
    return raw


def _decode(raw: bytes, path: Path, number: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        where = f"{path}:{number}: is not UTF-8 (byte {error.start + 1} of the line)"
        raise RecordError(f"{where}; {_utf8_remedy(path)}") from error


def _utf8_remedy(path: Path) -> str:
    return f"save it as UTF-8: iconv -f WINDOWS-1252 -t UTF-8 {path.name} > NEW"


def _memory_error(path: Path, number: int) -> RecordError:
    remedy = "compress it with less memory (xz -6), or with gzip"
    return RecordError(f"{path}:{number}: decompressing the file needs too much memory; {remedy}")


def _damage_error(path: Path, number: int, error: BaseException) -> RecordError:
    reason = str(error).rstrip(".")
    return RecordError(
        f"{path}:{number}: the compressed file is truncated or damaged ({reason}); fetch or compress it again"
    )


def _line_length_error(path: Path, number: int) -> RecordError:
    return RecordError(f"{path}:{number}: the line is longer than {MAX_LINE_BYTES:,} bytes; write one row per line")


@contextlib.contextmanager
def _open_decompressed(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file for reading bytes, decompressed if its first bytes are those of a compression format.

    Raises RecordError for an archive of several files, and for a format that is not text.
    """
    with translate_read_errors(path):
        raw = path.open("rb")
    with contextlib.ExitStack() as stack:
        stack.enter_context(raw)
        _refuse_unsupported(path, raw.peek(_HEAD_BYTES)[:_HEAD_BYTES])
        decompressed = _decompress(path, raw, stack)
        if decompressed is not raw:
            _refuse_unsupported(path, _peek(decompressed))
        yield decompressed


def _peek(file: IO[bytes]) -> bytes:
    """The first decompressed bytes; empty if they are damaged, since reading the lines reports that."""
    try:
        return file.peek(_HEAD_BYTES)[:_HEAD_BYTES]  # type: ignore[attr-defined,no-any-return] # all decompressors have it
    except (MemoryError, *_DAMAGE_ERRORS):
        return b""


def _decompress(path: Path, raw: io.BufferedReader, stack: contextlib.ExitStack) -> IO[bytes]:
    first_bytes = raw.read(_HEAD_BYTES)
    raw.seek(0)
    if first_bytes.startswith(_GZIP):
        gzip_file = gzip.GzipFile(fileobj=raw)
        stack.callback(gzip_file.close)
        return gzip_file  # type: ignore[return-value] # GzipFile has the methods of IO[bytes]
    if first_bytes.startswith(_XZ):
        return stack.enter_context(lzma.open(raw, "rb"))
    if first_bytes.startswith(_BZIP2) and first_bytes[4:10] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"):
        return stack.enter_context(bz2.open(raw, "rb"))
    if first_bytes.startswith(_ZSTANDARD):
        return stack.enter_context(_Zstandard(pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")))
    if first_bytes.startswith(_ZIP):
        return stack.enter_context(_open_only_member(path, raw, stack))
    return raw


class _Zstandard(io.BufferedReader):
    """A line reader over a pyarrow stream; damaged bytes raise EOFError, as in the other decompressors."""

    def readline(self, size: int | None = -1, /) -> bytes:
        try:
            return super().readline(size)
        except OSError as error:
            raise EOFError(str(error)) from error


def _open_only_member(path: Path, raw: IO[bytes], stack: contextlib.ExitStack) -> IO[bytes]:
    try:
        archive = stack.enter_context(zipfile.ZipFile(raw))
        names = [info.filename for info in archive.infolist() if not info.is_dir()]
        if "[Content_Types].xml" in names:
            _refuse(path, "an Excel workbook or another Office document", _UNSUPPORTED_FORMATS[0][3])
        members = [name for name in names if _is_data(name)]
        if len(members) != 1:
            names_text = ", ".join(sorted(members)[:5]) or "nothing"
            problem = f"is a zip archive of {len(members)} files ({quote(names_text, 120)})"
            raise RecordError(f"{path}: {problem}; extract it and give one of them: unzip {path.name} -d FOLDER")
        return archive.open(members[0])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise RecordError(
            f"{path}: cannot be decompressed ({quote(str(error))}); extract it first: unzip {path.name}"
        ) from error


def _is_data(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return not any(part.startswith((".", "__MACOSX")) for part in parts)


def _refuse_unsupported(path: Path, first_bytes: bytes) -> None:
    for offset, magic, description, command in _UNSUPPORTED_FORMATS:
        # A text may begin with ORC too, such as the CSV header ORCID.
        if first_bytes[offset : offset + len(magic)] == magic and (magic != b"ORC" or path.suffix == ".orc"):
            _refuse(path, description, command)
    if first_bytes[:1] == b"\x80" and first_bytes[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise RecordError(f"{path}: is a pickle, which is never loaded; save its rows as JSON Lines or Parquet")


def _refuse(path: Path, description: str, command: str) -> None:
    raise RecordError(f"{path}: is {description}; convert it to text: {command.replace('{name}', path.name)}")
