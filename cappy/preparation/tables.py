"""CSV and Parquet files: the same fields as JSON Lines, one column each."""

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cappy.errors import RecordError, shown
from cappy.preparation.lines import lines, readable
from cappy.preparation.rows import Rows

BATCH_ROWS = 256
MAX_CELL_CHARACTERS = 10_000_000
MAX_RECORD_CHARACTERS = 64 * 2**20
MAX_ROW_BYTES = 64 * 2**20
"""Of a row of Parquet as values: a file of a thousand bytes can hold rows of gigabytes."""
MAX_BATCH_VALUES = 2**22


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
        with readable(path):
            parquet = pq.ParquetFile(path, read_dictionary=_text_columns(path))
        with parquet:
            for batch in parquet.iter_batches(batch_size=_batch_rows(parquet.metadata)):
                for part in _small(batch):
                    for row in part.to_pylist():
                        number += 1
                        yield f"{path}: row {number}", row
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:  # Thrift's errors are OSError
        reason = shown((str(error).splitlines() or [type(error).__name__])[0])
        raise RecordError(f"{path}: row {number + 1}: cannot be read as Parquet ({reason}); write it again") from error


def _text_columns(path: Path) -> list[str]:
    """The columns of texts: read as a dictionary, a text that stands in all rows is held once."""
    with pq.ParquetFile(path) as parquet:
        columns = (parquet.schema.column(index) for index in range(len(parquet.schema)))
        return [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]


def _batch_rows(metadata: pq.FileMetaData) -> int:
    """Rows that are decoded at once: fewer where lists are long."""
    rows = BATCH_ROWS
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        values = max((group.column(column).num_values for column in range(group.num_columns)), default=0)
        if values > MAX_BATCH_VALUES:
            rows = min(rows, max(1, MAX_BATCH_VALUES * group.num_rows // values))
    return rows


def _small(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """The batch in parts that are no larger than a row may be; RecordError's ValueError for a larger row."""
    size = sum(map(_value_bytes, batch.columns))
    if size <= MAX_ROW_BYTES:
        yield batch
    elif len(batch) == 1:
        raise ValueError(f"a row of {size:,} bytes, a row may have {MAX_ROW_BYTES:,}")
    else:
        half = len(batch) // 2
        yield from _small(batch.slice(0, half))
        yield from _small(batch.slice(half))


def _value_bytes(array: pa.Array) -> int:
    """About what the values take once they are Python's, a text of a dictionary as often as it stands there."""
    if pa.types.is_dictionary(array.type):
        lengths = pc.take(pc.binary_length(array.dictionary), array.indices)
        return (pc.sum(lengths).as_py() or 0) + 8 * len(array)
    if pa.types.is_struct(array.type):
        return sum(map(_value_bytes, array.flatten())) + 8 * len(array)
    if pa.types.is_map(array.type):
        within = slice(array.offsets[0].as_py(), array.offsets[-1].as_py())
        return _value_bytes(array.keys[within]) + _value_bytes(array.items[within]) + 8 * len(array)
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        return _value_bytes(array.flatten()) + 8 * len(array)
    return int(array.nbytes) + 8 * len(array)


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The first line and the cells of each record, blank lines left out."""
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    start, held = 1, 0

    def texts() -> Iterator[str]:
        nonlocal held
        for number, text in lines(path):
            held += len(text)
            if held > MAX_RECORD_CHARACTERS:
                limit = f"{MAX_RECORD_CHARACTERS:,} characters"
                raise RecordError(f"{path}:{start}: a row of more than {limit} (line {number}); mend its quotes")
            yield text

    reader = csv.reader(texts(), strict=True)
    try:
        for cells in reader:
            held = 0
            if cells:
                yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise RecordError(f"{path}:{start}: is not CSV ({error}); mend its quotes") from error


def _header(where: str, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise RecordError(f"{where}: the header names {shown(twice)} twice; rename one of the columns")
    return names
