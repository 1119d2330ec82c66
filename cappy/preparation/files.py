"""A file as rows, whatever its format: by the suffix of its name, under .gz or .xz too."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cappy.preparation.jsonlines import read_json_lines
from cappy.preparation.rows import Rows
from cappy.preparation.tables import read_csv, read_parquet

READERS: Mapping[str, Callable[[Path], Rows]] = {".csv": read_csv, ".parquet": read_parquet}
"""Reader by the suffix of the name; every other file is JSON Lines."""
_PACKED = (".gz", ".xz")
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")


def plain(path: Path) -> Path:
    """The name without what says that it is packed."""
    return path.with_suffix("") if path.suffix in _PACKED else path


def reader_of(path: Path) -> Callable[[Path], Rows]:
    """What reads the file."""
    return READERS.get(plain(path).suffix, read_json_lines)


def read_file(path: Path) -> Rows:
    """The rows of a dataset's file: cells of CSV that are whole numbers are numbers, as templates count with them."""
    read = reader_of(path)
    for where, values in read(path):
        yield where, {name: _number(value) for name, value in values.items()} if read is read_csv else values


def _number(cell: Any) -> Any:
    return int(cell) if isinstance(cell, str) and _WHOLE.fullmatch(cell) else cell
