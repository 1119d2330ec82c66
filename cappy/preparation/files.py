"""A file as rows, whatever its format: by what it begins with, and by the suffix of its name."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cappy.errors import RecordError
from cappy.preparation import arrow
from cappy.preparation.arrow import read_arrow
from cappy.preparation.jsonlines import read_json_lines
from cappy.preparation.packing import SUFFIXES, head, plain
from cappy.preparation.rows import Rows
from cappy.preparation.tables import TABBED, read_csv, read_parquet

Reader = Callable[[Path], Rows]

READERS: Mapping[str, Reader] = {
    ".csv": read_csv,
    **dict.fromkeys(TABBED, read_csv),
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
}
"""Reader by the suffix of the name; every other file is JSON Lines."""
BINARY: Mapping[Reader, str] = {read_parquet: "Parquet", read_arrow: "Arrow"}
_MAGIC: Mapping[bytes, Reader] = {b"PAR1": read_parquet, arrow.FILE: read_arrow, arrow.STREAM: read_arrow}
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")


def reader_of(path: Path) -> Reader:
    """What reads the file; RecordError for a packed table that is not read by lines."""
    begin = head(path)
    found = next((reader for magic, reader in _MAGIC.items() if begin.startswith(magic)), None)
    found = found or READERS.get(plain(path).suffix.lower(), read_json_lines)
    if found in BINARY and path.suffix in SUFFIXES:
        raise RecordError(f"{path}: is a packed {BINARY[found]} file, which is packed within; unpack it first")
    return found


def read_file(path: Path) -> Rows:
    """The rows of a dataset's file: cells of CSV that are whole numbers are numbers, as templates count with them."""
    read = reader_of(path)
    for where, values in read(path):
        yield where, {name: _number(value) for name, value in values.items()} if read is read_csv else values


def _number(cell: Any) -> Any:
    return int(cell) if isinstance(cell, str) and _WHOLE.fullmatch(cell) else cell
