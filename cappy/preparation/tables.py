"""Reads CSV, Parquet and Arrow files as rows; the columns are named like the fields of JSON Lines."""

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
from cappy.preparation.text_files import read_lines, strip_compression_suffix, translate_read_errors

_SEPARATORS = (",", ";", "\t", "|")
TAB_SUFFIXES = (".tsv", ".tab")
_CARRIAGE_RETURN = re.compile(r"(?<=\r)(?![\r]*\n|\Z)")
_DETECTION_ROWS = 6
_BATCH_ROWS = 256
_MAX_CELL_CHARACTERS = 10_000_000
_MAX_RECORD_CHARACTERS = 64 * 2**20
_MAX_ROW_BYTES = 64 * 2**20
"""Largest decoded row of Parquet or Arrow: a file of a thousand bytes can decode to rows of gigabytes."""
_MAX_BATCH_BYTES = 256 * 2**20
_MAX_BATCH_VALUES = 2**22
ARROW_FILE = b"ARROW1"
ARROW_STREAM = b"\xff\xff\xff\xff"
_DICTIONARY, _BATCH = 2, 3
"""Types of Arrow messages, from `MessageHeader` in Message.fbs."""


def read_csv(path: Path) -> Rows:
    """Yields the rows of a CSV file with a header, each with the line where it begins; blank cells are None.

    The separator is a tab in .tsv and .tab files, and detected in other files. Raises RecordError for a row that is not
    CSV or has more or fewer cells than the header.
    """
    header: list[str] | None = None
    for number, cells in _read_records(path, _detect_separator(path)):
        where = f"{path}:{number}"
        if header is None:
            header = _parse_header(where, cells)
        elif len(cells) != len(header):
            remedy = "quote cells that contain commas, quotes or line ends"
            raise RecordError(f"{where}: has {len(cells)} cells, the header has {len(header)}; {remedy}")
        else:
            yield where, {name: cell if cell.strip() else None for name, cell in zip(header, cells, strict=True)}


def read_parquet(path: Path) -> Rows:
    """Yields the rows of a Parquet file; raises RecordError if it is damaged or a row has more than 64 MiB."""
    number = 0
    try:
        with translate_read_errors(path):
            parquet, dictionary_encoded = pq.ParquetFile(path), _open_with_dictionaries(path)
        with parquet, dictionary_encoded:
            for group in range(parquet.num_row_groups):
                rows = _choose_batch_rows(parquet, dictionary_encoded, group)
                for batch in parquet.iter_batches(batch_size=rows, row_groups=[group]):
                    for part in _split_batch(batch):
                        for row in part.to_pylist():
                            number += 1
                            yield f"{path}: row {number}", row
    except (pa.ArrowException, ValueError, OverflowError, OSError) as error:  # Thrift's errors are OSError
        reason = quote((str(error).splitlines() or [type(error).__name__])[0])
        raise RecordError(f"{path}: row {number + 1}: cannot be read as Parquet ({reason}); write it again") from error


def read_arrow(path: Path) -> Rows:
    """Yields the rows of an Arrow file or stream, which is memory-mapped.

    Raises RecordError if it is damaged, if a row has more than 64 MiB, or if it has compressed buffers, whose size in
    memory is only known once they are decompressed.
    """
    number = 0
    try:
        with translate_read_errors(path):
            source = pa.memory_map(str(path))
        with source:
            for batch in _read_batches(source):
                batch.validate(full=True)
                for start in range(0, len(batch), _BATCH_ROWS):
                    for part in _split_batch(batch.slice(start, _BATCH_ROWS)):
                        for row in part.to_pylist():
                            number += 1
                            yield f"{path}: row {number}", row
    except _CompressedError as error:
        command = (
            'python -c "import pyarrow.feather as f, pyarrow.parquet as p; '
            f"p.write_table(f.read_table('{path.name}'), '{path.stem}.parquet')\""
        )
        raise RecordError(f"{path}: is compressed Arrow (Feather); convert it to Parquet: {command}") from error
    except (pa.ArrowException, ValueError, OverflowError, OSError, struct.error) as error:
        reason = quote((str(error).splitlines() or [type(error).__name__])[0])
        raise RecordError(f"{path}: row {number + 1}: cannot be read as Arrow ({reason}); write it again") from error


def _open_with_dictionaries(path: Path) -> pq.ParquetFile:
    """Opens the file with dictionary-encoded texts: slower to read, but a text repeated in all rows is stored once."""
    with pq.ParquetFile(path) as parquet:
        columns = [parquet.schema.column(index) for index in range(len(parquet.schema))]
    text_columns = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    return pq.ParquetFile(path, read_dictionary=text_columns)


def _choose_batch_rows(parquet: pq.ParquetFile, dictionary_encoded: pq.ParquetFile, group: int) -> int:
    """The number of rows of a row group to decode at once: fewer if its lists or its dictionaries' texts are long."""
    row_group = parquet.metadata.row_group(group)
    values = max((row_group.column(index).num_values for index in range(row_group.num_columns)), default=0)
    rows: int = max(1, min(_BATCH_ROWS, _MAX_BATCH_VALUES * row_group.num_rows // max(values, 1)))
    first = next(dictionary_encoded.iter_batches(batch_size=1, row_groups=[group]), None)
    longest = max(map(_max_text_bytes, first.columns), default=0) if first is not None else 0
    return max(1, min(rows, _MAX_BATCH_BYTES // max(longest, 1)))


def _max_text_bytes(array: pa.Array) -> int:
    """Bytes of the longest text in a dictionary array."""
    if pa.types.is_dictionary(array.type):
        return int(pc.max(pc.binary_length(array.dictionary)).as_py() or 0)
    return max(map(_max_text_bytes, _child_arrays(array)), default=0)


def _split_batch(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Splits a batch into parts of at most `_MAX_ROW_BYTES`; raises ValueError for a single larger row."""
    size = sum(map(_estimate_bytes, batch.columns))
    if size <= _MAX_ROW_BYTES:
        yield batch
    elif len(batch) == 1:
        raise ValueError(f"a row has {size:,} bytes, the limit is {_MAX_ROW_BYTES:,}")
    else:
        middle = len(batch) // 2
        yield from _split_batch(batch.slice(0, middle))
        yield from _split_batch(batch.slice(middle))


def _estimate_bytes(array: pa.Array) -> int:
    """Approximate bytes of an array's values as Python objects."""
    inner = _child_arrays(array)
    return (sum(map(_estimate_bytes, inner)) if inner else int(array.nbytes)) + 8 * len(array)


def _child_arrays(array: pa.Array) -> list[pa.Array]:
    """The child arrays of a nested array; empty for any other."""
    if pa.types.is_struct(array.type):
        return list(array.flatten())
    if pa.types.is_map(array.type):
        entries = slice(array.offsets[0].as_py(), array.offsets[-1].as_py())
        return [array.keys[entries], array.items[entries]]
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        return [array.flatten()]
    return []


def _detect_separator(path: Path) -> str:
    """The cell separator: the comma, unless another one fits the first rows and the comma does not.

    A separator fits if it splits the header into several cells, and each of the first rows into the same number.
    """
    if strip_compression_suffix(path).suffix.lower() in TAB_SUFFIXES:
        return "\t"
    num_columns: dict[str, int] = {}
    for separator in _SEPARATORS:
        try:
            counts = [len(cells) for _, cells in itertools.islice(_read_records(path, separator), _DETECTION_ROWS)]
        except RecordError:
            continue
        if counts and counts[0] > 1 and len(set(counts)) == 1:
            num_columns[separator] = counts[0]
    if not num_columns:  # No separator fits: the reader will report the first row whose number of cells differs.
        num_columns = {separator: len(_read_header_cells(path, separator)) for separator in _SEPARATORS}
    return "," if num_columns.get(",", 0) > 1 else max(num_columns, key=lambda separator: num_columns[separator])


def _read_header_cells(path: Path, separator: str) -> list[str]:
    try:
        return next((cells for _, cells in _read_records(path, separator)), [])
    except RecordError:
        return []


def _read_records(path: Path, separator: str = ",") -> Iterator[tuple[int, list[str]]]:
    """Yields the number of the first line and the cells of each record; skips blank lines."""
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    first_line, num_characters = 1, 0

    def read_parts() -> Iterator[str]:
        nonlocal num_characters
        for number, text in enumerate(
            (part for _, line in read_lines(path) for part in _split_at_returns(line)), start=1
        ):
            num_characters += len(text)
            if num_characters > _MAX_RECORD_CHARACTERS:
                limit = f"{_MAX_RECORD_CHARACTERS:,} characters"
                raise RecordError(
                    f"{path}:{first_line}: the row has more than {limit} (up to line {number}); fix its quotes"
                )
            yield text

    reader = csv.reader(read_parts(), strict=True, delimiter=separator)
    try:
        for cells in reader:
            num_characters = 0
            if cells:
                yield first_line, cells
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise RecordError(f"{path}:{first_line}: is not CSV ({error}); fix its quotes") from error


def _split_at_returns(line: str) -> Sequence[str]:
    """Splits a line at bare carriage returns, which end lines in files of old Mac programs."""
    return _CARRIAGE_RETURN.split(line) if "\r" in line[:-2] else (line,)


def _parse_header(where: str, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    repeated = next((name for name, count in Counter(names).items() if count > 1), None)
    if repeated is not None:
        raise RecordError(f"{where}: the header names {column_names([repeated])} twice; rename one of the columns")
    return names


class _CompressedError(ValueError):
    """A record batch has compressed buffers."""


def _read_batches(source: pa.MemoryMappedFile) -> Iterator[pa.RecordBatch]:
    """Yields the batches of an Arrow file or stream; raises _CompressedError if any has compressed buffers."""
    head = source.read(len(ARROW_FILE))
    source.seek(8 if head == ARROW_FILE else 0)  # The file format is eight bytes, then the stream format.
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
    """Whether the flatbuffer of a message describes compressed buffers (Arrow format, Message.fbs)."""
    message = _table_offset(metadata, 0)
    kind, header = _field_offset(metadata, message, 1), _field_offset(metadata, message, 2)
    if kind is None or header is None:
        return False
    batch = _table_offset(metadata, header)
    if metadata[kind] == _DICTIONARY:
        data = _field_offset(metadata, batch, 1)
        if data is None:
            return False
        batch = _table_offset(metadata, data)
    elif metadata[kind] != _BATCH:
        return False
    return _field_offset(metadata, batch, 3) is not None


def _table_offset(data: bytes, offset: int) -> int:
    return offset + int(struct.unpack_from("<I", data, offset)[0])


def _field_offset(data: bytes, table: int, index: int) -> int | None:
    """The offset of a field of a flatbuffer table, or None if the field is absent."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if 4 + 2 * index >= struct.unpack_from("<H", data, vtable)[0]:
        return None
    offset = struct.unpack_from("<H", data, vtable + 4 + 2 * index)[0]
    return table + int(offset) if offset else None
