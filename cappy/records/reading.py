"""Reads all rows of a finished folder, or a range: as instances or, for hot loops, as record batches."""

import bisect
import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cappy.errors import FolderError, quote
from cappy.records.folder import MANIFEST, PART_ROWS, File, read_manifest, verify_file
from cappy.records.instance import Instance, Split
from cappy.records.schema import find_schema_problem, from_batch


def read(folder: str | Path, *, splits: Sequence[Split] | None = None, rows: range | None = None) -> Iterator[Instance]:
    """Streams the instances of a finished folder, optionally only some splits and a range of rows.

    One batch at a time is in memory. Parts outside `rows` are not opened. Raises FolderError if the folder is
    unfinished or a part is damaged.
    """
    for batch in read_batches(folder, rows=rows):
        for instance in from_batch(batch):
            if splits is None or instance.split in splits:
                yield instance


def read_batches(
    folder: str | Path, *, columns: Sequence[str] | None = None, rows: range | None = None
) -> Iterator[pa.RecordBatch]:
    """Streams Arrow record batches, for loops that need a few columns of many rows.

    The sha256 of each part is checked before it is read. Raises FolderError like `read`.
    """
    if rows is None:
        for file in _parts(Path(folder)):
            with _open_part(verify_file(Path(folder), file)) as parquet:
                yield from parquet.iter_batches(batch_size=PART_ROWS, columns=columns)
        return
    files, ends = _rows_of_files(Path(folder), _stat_key(Path(folder) / MANIFEST))
    for index in range(bisect.bisect_right(ends, rows.start), len(files)):
        file, end = files[index], ends[index]
        start = end - file.rows
        if start >= rows.stop:
            return
        path = _verify_once(Path(folder), file, _stat_key(Path(folder) / file.name))
        with _open_part(path) as parquet:
            batches = parquet.iter_batches(batch_size=PART_ROWS, columns=columns)
            yield from _slice_batches(batches, max(rows.start - start, 0), min(rows.stop - start, file.rows))


@contextlib.contextmanager
def _open_part(path: Path) -> Iterator[pq.ParquetFile]:
    """Opens a part. Raises FolderError if it is not Parquet, or if its columns do not match the record schema."""
    remedy = "run the step that wrote the folder again"
    try:
        with pq.ParquetFile(path) as parquet:
            if problem := find_schema_problem(parquet.schema_arrow):
                raise FolderError(f"{path}: does not have the columns of a dataset part ({problem}); {remedy}")
            yield parquet
    except pa.ArrowException as error:
        reason = quote(str(error).splitlines()[0], 120)
        raise FolderError(f"{path}: cannot be read as Parquet ({reason}); {remedy}") from error


def _parts(folder: Path) -> tuple[File, ...]:
    """The parts of a folder of records. Raises FolderError if it contains other files."""
    manifest = read_manifest(folder)
    if other_files := [file.name for file in manifest.files if not file.name.endswith(".parquet")]:
        raise FolderError(
            f"{folder}: is the output of {manifest.step} ({other_files[0]}), not a folder of records; choose another "
            "folder"
        )
    return manifest.files


@functools.lru_cache(maxsize=4)
def _rows_of_files(folder: Path, cache_key: tuple[int, ...]) -> tuple[tuple[File, ...], list[int]]:
    """The files of a folder and the end row of each; cached, because shards read part by part."""
    files = _parts(folder)
    return files, list(itertools.accumulate(file.rows for file in files))


@functools.lru_cache(maxsize=64)
def _verify_once(folder: Path, file: File, cache_key: tuple[int, ...]) -> Path:
    return verify_file(folder, file)


def _stat_key(path: Path) -> tuple[int, ...]:
    """Inode, size and modification time, which change with the file; empty if there is no file."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _slice_batches(batches: Iterable[pa.RecordBatch], start: int, stop: int) -> Iterator[pa.RecordBatch]:
    """The rows `start` to `stop` (exclusive) of the batches."""
    batch_stop = 0
    for batch in batches:
        batch_start, batch_stop = batch_stop, batch_stop + len(batch)
        if batch_start >= stop:
            return
        first = max(start - batch_start, 0)
        rows = batch.slice(first, min(stop - batch_start, len(batch)) - first) if start < batch_stop else batch[:0]
        if len(rows):
            yield rows
