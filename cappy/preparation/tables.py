"""CSV and Parquet files: the same fields as JSON Lines, one column each."""

import csv
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cappy.errors import RecordError, shown
from cappy.preparation.lines import lines, readable
from cappy.preparation.rows import Rows

BATCH_ROWS = 256
MAX_CELL_CHARACTERS = 10_000_000


def read_csv(path: Path) -> Rows:
    """The rows of a CSV file with a header, blank cells as None; each stands at the line where it begins."""
    header: list[str] | None = None
    for number, cells in _records(path):
        where = f"{path}:{number}"
        if header is None:
            header = _header(where, cells)
        elif len(cells) != len(header):
            remedy = "quote cells that hold commas, quotes or line ends"
            raise RecordError(f"{where}: has {len(cells)} cells, the header has {len(header)}; {remedy}")
        else:
            yield where, {name: cell if cell.strip() else None for name, cell in zip(header, cells, strict=True)}


def read_parquet(path: Path) -> Rows:
    """The rows of a Parquet file, by column."""
    number = 0
    try:
        with readable(path), pq.ParquetFile(path) as parquet:
            for batch in parquet.iter_batches(batch_size=BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pa.ArrowException, UnicodeDecodeError) as error:
        reason = shown(str(error).splitlines()[0])
        raise RecordError(f"{path}: row {number + 1}: cannot be read as Parquet ({reason}); write it again") from error


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The first line and the cells of each record, blank lines left out."""
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    reader = csv.reader((text for _, text in lines(path)), strict=True)
    start = 1
    try:
        for cells in reader:
            if cells:
                yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise RecordError(f"{path}:{start}: is not CSV ({error}); mend its quotes") from error


def _header(where: str, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecordError(f"{where}: the header names {shown(twice)} twice; rename one of the columns")
    return names
