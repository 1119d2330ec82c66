"""Files that are packed: gzip, xz, bzip2, Zstandard, or a zip archive of one file, unpacked as they are read.

Nothing is unpacked ahead of what is asked for, so a small file that would fill a disk costs a buffer.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

import pyarrow as pa

from cappy.errors import ConfigError, RecordError, shown

SUFFIXES = (".gz", ".xz", ".bz2", ".zst", ".zip")
_GZIP, _XZ, _BZIP2, _ZSTANDARD, _ZIP = b"\x1f\x8b", b"\xfd7zXZ\x00", b"BZh", b"\x28\xb5\x2f\xfd", b"PK\x03\x04"
_HEAD_BYTES = 512
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile, OSError)
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


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked where its first bytes say that it is packed.

    RecordError for an archive of several files, and for a format that holds no text.
    """
    with readable(path):
        raw = path.open("rb")
    with contextlib.ExitStack() as stack:
        stack.enter_context(raw)
        _refuse_other(path, raw.peek(_HEAD_BYTES)[:_HEAD_BYTES])
        found = _unpacker(path, raw, stack)
        if found is not raw:
            _refuse_other(path, _peek(found))
        yield found


def _peek(file: IO[bytes]) -> bytes:
    """The first bytes of what is packed; none where it is damaged, which whoever reads on finds."""
    try:
        return file.peek(_HEAD_BYTES)[:_HEAD_BYTES]  # type: ignore[attr-defined,no-any-return] # all unpackers have it
    except (MemoryError, *DAMAGED):
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
            what = f"is a zip archive of {len(members)} files ({shown(held, 120)})"
            raise RecordError(f"{path}: {what}; unpack it and give one of them: unzip {path.name} -d FOLDER")
        return archive.open(members[0])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise RecordError(f"{path}: cannot be unpacked ({shown(str(error))}); unpack it: unzip {path.name}") from error


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
