"""CSV, Parquet and Arrow files: the same fields as JSON Lines, one column each."""

import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cappy.errors import RecordError, shown
from cappy.preparation.lines import lines
from cappy.preparation.packing import plain, readable
from cappy.preparation.rows import Rows, column_names

SEPARATORS = (",", ";", "\t", "|")
TABBED = (".tsv", ".tab")
_RETURN = re.compile(r"(?<=\r)(?![\r]*\n|\Z)")
_ROWS_TO_FIT = 6
BATCH_ROWS = 256
MAX_CELL_CHARACTERS = 10_000_000
MAX_RECORD_CHARACTERS = 64 * 2**20
MAX_ROW_BYTES = 64 * 2**20
"""Of a row of Parquet as values: a file of a thousand bytes can hold rows of gigabytes."""
MAX_BATCH_BYTES = 256 * 2**20
MAX_BATCH_VALUES = 2**22


def read_csv(path: Path) -> Rows:
    """The rows of a CSV file with a header, blank cells as None; each stands at the line where it begins.

    Cells are parted by tabs in a .tsv file, and else by what `separator` finds.
    """
    header: list[str] | None = None
    for number, cells in _records(path, separator(path)):
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
            parquet, dictionaries = pq.ParquetFile(path), _dictionaries(path)
        with parquet, dictionaries:
            for group in range(parquet.num_row_groups):
                rows = _batch_rows(parquet, dictionaries, group)
                for batch in parquet.iter_batches(batch_size=rows, row_groups=[group]):
                    for part in small(batch):
                        for row in part.to_pylist():
                            number += 1
                            yield f"{path}: row {number}", row
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:  # Thrift's errors are OSError
        reason = shown((str(error).splitlines() or [type(error).__name__])[0])
        raise RecordError(f"{path}: row {number + 1}: cannot be read as Parquet ({reason}); write it again") from error


def _dictionaries(path: Path) -> pq.ParquetFile:
    """The file with texts as a dictionary, where one that stands in every row is held once; slower to read."""
    with pq.ParquetFile(path) as parquet:
        columns = [parquet.schema.column(index) for index in range(len(parquet.schema))]
    texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    return pq.ParquetFile(path, read_dictionary=texts)


def _batch_rows(parquet: pq.ParquetFile, dictionaries: pq.ParquetFile, group: int) -> int:
    """Rows of a group that are decoded at once: fewer where lists are long, or texts of its dictionaries."""
    found = parquet.metadata.row_group(group)
    values = max((found.column(index).num_values for index in range(found.num_columns)), default=0)
    rows: int = max(1, min(BATCH_ROWS, MAX_BATCH_VALUES * found.num_rows // max(values, 1)))
    first = next(dictionaries.iter_batches(batch_size=1, row_groups=[group]), None)
    longest = max(map(_longest, first.columns), default=0) if first is not None else 0
    return max(1, min(rows, MAX_BATCH_BYTES // max(longest, 1)))


def _longest(array: pa.Array) -> int:
    """The bytes of the longest text of a dictionary."""
    if pa.types.is_dictionary(array.type):
        return int(pc.max(pc.binary_length(array.dictionary)).as_py() or 0)
    return max(map(_longest, _inner(array)), default=0)


def small(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """The batch in parts that are no larger than a row may be; RecordError's ValueError for a larger row."""
    size = sum(map(_value_bytes, batch.columns))
    if size <= MAX_ROW_BYTES:
        yield batch
    elif len(batch) == 1:
        raise ValueError(f"a row of {size:,} bytes, a row may have {MAX_ROW_BYTES:,}")
    else:
        half = len(batch) // 2
        yield from small(batch.slice(0, half))
        yield from small(batch.slice(half))


def _value_bytes(array: pa.Array) -> int:
    """About what the values take once they are Python's."""
    inner = _inner(array)
    return (sum(map(_value_bytes, inner)) if inner else int(array.nbytes)) + 8 * len(array)


def _inner(array: pa.Array) -> list[pa.Array]:
    """What a nested array holds; nothing for another."""
    if pa.types.is_struct(array.type):
        return list(array.flatten())
    if pa.types.is_map(array.type):
        within = slice(array.offsets[0].as_py(), array.offsets[-1].as_py())
        return [array.keys[within], array.items[within]]
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        return [array.flatten()]
    return []


def separator(path: Path) -> str:
    """What parts the cells: the comma, unless another one fits the first rows and the comma does not.

    One fits where it parts the header into several cells, and each of the first rows into as many.
    """
    if plain(path).suffix.lower() in TABBED:
        return "\t"
    found: dict[str, int] = {}
    for mark in SEPARATORS:
        try:
            counts = [len(cells) for _, cells in itertools.islice(_records(path, mark), _ROWS_TO_FIT)]
        except RecordError:
            continue
        if counts and counts[0] > 1 and len(set(counts)) == 1:
            found[mark] = counts[0]
    if not found:  # Not even the rows of one separator are alike: the reader says which is not.
        found = {mark: len(_header_cells(path, mark)) for mark in SEPARATORS}
    return "," if found.get(",", 0) > 1 else max(found, key=lambda mark: found[mark])


def _header_cells(path: Path, mark: str) -> list[str]:
    try:
        return next((cells for _, cells in _records(path, mark)), [])
    except RecordError:
        return []


def _records(path: Path, mark: str = ",") -> Iterator[tuple[int, list[str]]]:
    """The first line and the cells of each record, blank lines left out."""
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    start, held = 1, 0

    def texts() -> Iterator[str]:
        nonlocal held
        for number, text in enumerate((part for _, line in lines(path) for part in _ended_by_returns(line)), start=1):
            held += len(text)
            if held > MAX_RECORD_CHARACTERS:
                limit = f"{MAX_RECORD_CHARACTERS:,} characters"
                raise RecordError(f"{path}:{start}: a row of more than {limit} (line {number}); mend its quotes")
            yield text

    reader = csv.reader(texts(), strict=True, delimiter=mark)
    try:
        for cells in reader:
            held = 0
            if cells:
                yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise RecordError(f"{path}:{start}: is not CSV ({error}); mend its quotes") from error


def _ended_by_returns(line: str) -> Sequence[str]:
    """A line in parts at the carriage returns that end lines in it, as old programs for the Mac write them."""
    return _RETURN.split(line) if "\r" in line[:-2] else (line,)


def _header(where: str, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise RecordError(f"{where}: the header names {column_names([twice])} twice; rename one of the columns")
    return names
