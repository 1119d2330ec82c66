"""Arrow files, as `datasets` keeps them: a stream of record batches, or the file format of it."""

import struct
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from cappy.errors import RecordError, shown
from cappy.preparation.packing import readable
from cappy.preparation.rows import Rows
from cappy.preparation.tables import BATCH_ROWS, small

FILE = b"ARROW1"
STREAM = b"\xff\xff\xff\xff"
_DICTIONARY, _BATCH = 2, 3


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
                for start in range(0, len(batch), BATCH_ROWS):
                    for part in small(batch.slice(start, BATCH_ROWS)):
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
        reason = shown((str(error).splitlines() or [type(error).__name__])[0])
        raise RecordError(f"{path}: row {number + 1}: cannot be read as Arrow ({reason}); write it again") from error


class _CompressedError(ValueError):
    """A record batch has compressed buffers."""


def _batches(source: pa.MemoryMappedFile) -> Iterator[pa.RecordBatch]:
    head = source.read(len(FILE))
    source.seek(8 if head == FILE else 0)  # The file format is the stream format after eight bytes.
    for message in pa.ipc.MessageReader.open_stream(source):
        if message.type in ("record batch", "dictionary") and is_compressed(message.metadata.to_pybytes()):
            raise _CompressedError(source)
    if head == FILE:
        with pa.ipc.open_file(source) as file:
            for index in range(file.num_record_batches):
                yield file.get_batch(index)
    else:
        source.seek(0)
        with pa.ipc.open_stream(source) as stream:
            yield from stream


def is_compressed(metadata: bytes) -> bool:
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
