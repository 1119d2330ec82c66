"""CSV, Parquet and Arrow files: the same fields as JSON Lines, one column each."""

import csv
import itertools
import re
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cappy.errors import RecordError, quote
from cappy.preparation.rows import Rows, column_names
from cappy.preparation.text_files import lines, plain, readable

_SEPARATORS = (",", ";", "\t", "|")
TABBED = (".tsv", ".tab")
_RETURN = re.compile(r"(?<=\r)(?![\r]*\n|\Z)")
_ROWS_TO_FIT = 6
_BATCH_ROWS = 256
_MAX_CELL_CHARACTERS = 10_000_000
_MAX_RECORD_CHARACTERS = 64 * 2**20
_MAX_ROW_BYTES = 64 * 2**20
"""Of a row of Parquet as values: a file of a thousand bytes can hold rows of gigabytes."""
_MAX_BATCH_BYTES = 256 * 2**20
_MAX_BATCH_VALUES = 2**22
ARROW_FILE = b"ARROW1"
ARROW_STREAM = b"\xff\xff\xff\xff"
_DICTIONARY, _BATCH = 2, 3


def read_csv(path: Path) -> Rows:
    """The rows of a CSV file with a header, blank cells as None; each stands at the line where it begins.

    Cells are parted by tabs in a .tsv file, and else by what `_separator` finds.
    """
    header: list[str] | None = None
    for number, cells in _records(path, _separator(path)):
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
                    for part in _small(batch):
                        for row in part.to_pylist():
                            number += 1
                            yield f"{path}: row {number}", row
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:  # Thrift's errors are OSError
        reason = quote((str(error).splitlines() or [type(error).__name__])[0])
        raise RecordError(f"{path}: row {number + 1}: cannot be read as Parquet ({reason}); write it again") from error


def read_arrow(path: Path) -> Rows:
    """The rows of an Arrow file, by column.

    The file is mapped and not read whole. RecordError for one that is damaged, and for one whose buffers are
    compressed: how much memory they take shows only once they have taken it.
    """
    number = 0
    try:
        with readable(path):
            source = pa.memory_map(str(path))
        with source:
            for batch in _batches(source):
                batch.validate(full=True)
                for start in range(0, len(batch), _BATCH_ROWS):
                    for part in _small(batch.slice(start, _BATCH_ROWS)):
                        for row in part.to_pylist():
                            number += 1
                            yield f"{path}: row {number}", row
    except _CompressedError as error:
        command = (
            'python -c "import pyarrow.feather as f, pyarrow.parquet as p; '
            f"p.write_table(f.read_table('{path.name}'), '{path.stem}.parquet')\""
        )
        raise RecordError(f"{path}: is compressed Arrow (Feather); turn it into Parquet: {command}") from error
    except (pa.ArrowException, ValueError, OverflowError, OSError, struct.error) as error:
        reason = quote((str(error).splitlines() or [type(error).__name__])[0])
        raise RecordError(f"{path}: row {number + 1}: cannot be read as Arrow ({reason}); write it again") from error


def _dictionaries(path: Path) -> pq.ParquetFile:
    """The file with texts as a dictionary, where one that stands in every row is held once; slower to read."""
    with pq.ParquetFile(path) as parquet:
        columns = [parquet.schema.column(index) for index in range(len(parquet.schema))]
    texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    return pq.ParquetFile(path, read_dictionary=texts)


def _batch_rows(parquet: pq.ParquetFile, dictionaries: pq.ParquetFile, group: int) -> int:
    """Rows of a group that are decoded at once: fewer where lists are long, or texts of its dictionaries."""
    row_group = parquet.metadata.row_group(group)
    values = max((row_group.column(index).num_values for index in range(row_group.num_columns)), default=0)
    rows: int = max(1, min(_BATCH_ROWS, _MAX_BATCH_VALUES * row_group.num_rows // max(values, 1)))
    first = next(dictionaries.iter_batches(batch_size=1, row_groups=[group]), None)
    longest = max(map(_longest, first.columns), default=0) if first is not None else 0
    return max(1, min(rows, _MAX_BATCH_BYTES // max(longest, 1)))


def _longest(array: pa.Array) -> int:
    """The bytes of the longest text of a dictionary."""
    if pa.types.is_dictionary(array.type):
        return int(pc.max(pc.binary_length(array.dictionary)).as_py() or 0)
    return max(map(_longest, _inner(array)), default=0)


def _small(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """The batch in parts that are no larger than a row may be; RecordError's ValueError for a larger row."""
    size = sum(map(_value_bytes, batch.columns))
    if size <= _MAX_ROW_BYTES:
        yield batch
    elif len(batch) == 1:
        raise ValueError(f"a row of {size:,} bytes, a row may have {_MAX_ROW_BYTES:,}")
    else:
        half = len(batch) // 2
        yield from _small(batch.slice(0, half))
        yield from _small(batch.slice(half))


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


def _separator(path: Path) -> str:
    """What parts the cells: the comma, unless another one fits the first rows and the comma does not.

    One fits where it parts the header into several cells, and each of the first rows into as many.
    """
    if plain(path).suffix.lower() in TABBED:
        return "\t"
    columns: dict[str, int] = {}
    for mark in _SEPARATORS:
        try:
            counts = [len(cells) for _, cells in itertools.islice(_records(path, mark), _ROWS_TO_FIT)]
        except RecordError:
            continue
        if counts and counts[0] > 1 and len(set(counts)) == 1:
            columns[mark] = counts[0]
    if not columns:  # Not even the rows of one separator are alike: the reader says which is not.
        columns = {mark: len(_header_cells(path, mark)) for mark in _SEPARATORS}
    return "," if columns.get(",", 0) > 1 else max(columns, key=lambda mark: columns[mark])


def _header_cells(path: Path, mark: str) -> list[str]:
    try:
        return next((cells for _, cells in _records(path, mark)), [])
    except RecordError:
        return []


def _records(path: Path, mark: str = ",") -> Iterator[tuple[int, list[str]]]:
    """The first line and the cells of each record, blank lines left out."""
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    start, held = 1, 0

    def texts() -> Iterator[str]:
        nonlocal held
        for number, text in enumerate((part for _, line in lines(path) for part in _split_at_returns(line)), start=1):
            held += len(text)
            if held > _MAX_RECORD_CHARACTERS:
                limit = f"{_MAX_RECORD_CHARACTERS:,} characters"
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


def _split_at_returns(line: str) -> Sequence[str]:
    """A line in parts at the carriage returns that end lines in it, as old programs for the Mac write them."""
    return _RETURN.split(line) if "\r" in line[:-2] else (line,)


def _header(where: str, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise RecordError(f"{where}: the header names {column_names([twice])} twice; rename one of the columns")
    return names


class _CompressedError(ValueError):
    """A record batch has compressed buffers."""


def _batches(source: pa.MemoryMappedFile) -> Iterator[pa.RecordBatch]:
    head = source.read(len(ARROW_FILE))
    source.seek(8 if head == ARROW_FILE else 0)  # The file format is the stream format after eight bytes.
    for message in pa.ipc.MessageReader.open_stream(source):
        if message.type in ("record batch", "dictionary") and _is_compressed(message.metadata.to_pybytes()):
            raise _CompressedError(source)
    if head == ARROW_FILE:
        with pa.ipc.open_file(source) as file:
            for index in range(file.num_record_batches):
                yield file.get_batch(index)
    else:
        source.seek(0)
        with pa.ipc.open_stream(source) as stream:
            yield from stream


def _is_compressed(metadata: bytes) -> bool:
    """Whether the flatbuffer of a message describes compressed buffers (Arrow's format, Message.fbs)."""
    message = _start(metadata, 0)
    kind, header = _field(metadata, message, 1), _field(metadata, message, 2)
    if kind is None or header is None:
        return False
    batch = _start(metadata, header)
    if metadata[kind] == _DICTIONARY:
        data = _field(metadata, batch, 1)
        if data is None:
            return False
        batch = _start(metadata, data)
    elif metadata[kind] != _BATCH:
        return False
    return _field(metadata, batch, 3) is not None


def _start(data: bytes, at: int) -> int:
    return at + int(struct.unpack_from("<I", data, at)[0])


def _field(data: bytes, table: int, index: int) -> int | None:
    """Where a field of a flatbuffer's table lies, or None where it is left out."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if 4 + 2 * index >= struct.unpack_from("<H", data, vtable)[0]:
        return None
    offset = struct.unpack_from("<H", data, vtable + 4 + 2 * index)[0]
    return table + int(offset) if offset else None
