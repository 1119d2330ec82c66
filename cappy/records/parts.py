"""Processes instances part by part, optionally in several processes; an interrupted run keeps its finished parts."""

import itertools
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

from cappy.progress import Progress
from cappy.records.folder import File, batched, sha256_of, write_bytes, write_part
from cappy.records.instance import Instance
from cappy.records.reading import read

Transform = Callable[[list[Instance]], Iterable[Instance]]
"""Processes the instances of a part."""
Count = Callable[[Sequence[Instance]], Mapping[str, int]]
"""Counts properties of the processed instances of a part, by name."""
ShouldRedo = Callable[[Mapping[str, int]], bool]
"""Whether to redo a part that an earlier process finished, from its counts."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The finished parts in order, and the sums of their counts."""

    files: tuple[File, ...]
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Instances in all parts."""
        return sum(file.rows for file in self.files)

    @property
    def candidates(self) -> int:
        """Candidates in all parts."""
        return sum(file.candidates for file in self.files)


@dataclass(frozen=True, slots=True)
class _PartResult:
    file: File
    counts: Mapping[str, int]
    num_rows: int
    resumed: bool


def count_nothing(_: Sequence[Instance]) -> Mapping[str, int]:
    """Counts nothing."""
    return {}


def never_redo(_: Mapping[str, int]) -> bool:
    """Keeps every finished part."""
    return False


def process(
    instances: Iterable[Instance],
    folder: Path,
    transform: Transform,
    *,
    part_rows: int,
    progress: Progress,
    total: int | None = None,
    count: Count = count_nothing,
) -> Parts:
    """Runs `transform` over parts of `part_rows` instances and writes each result as a part of `folder`.

    Parts that an earlier process finished are kept if their sha256 matches. `count` gets the instances of each part
    before they are written; its counts are stored with the part.
    """

    def process_part(index: int, part: list[Instance]) -> _PartResult:
        return _process_part(folder, index, len(part), lambda: part, transform, count)

    return _collect(map(process_part, itertools.count(), batched(instances, part_rows)), total, progress)


def process_folder(
    source: Path,
    folder: Path,
    transform: Transform,
    *,
    rows: range,
    part_rows: int,
    progress: Progress,
    count: Count = count_nothing,
    redo: ShouldRedo = never_redo,
    workers: int = 1,
) -> Parts:
    """Like `process`, for a range of rows of a finished folder, in `workers` processes that each read their own rows.

    Finished parts for which `redo` is true are processed again. The result does not depend on `workers`. With more than
    one, `transform`, `count` and `redo` must be picklable.
    """
    starts = range(rows.start, rows.stop, part_rows)
    spans = [range(start, min(start + part_rows, rows.stop)) for start in starts]
    process_rows = partial(_process_rows, source, folder, transform, count, redo)
    if min(workers, len(spans)) <= 1:
        return _collect(map(process_rows, range(len(spans)), spans), len(rows), progress)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(spans)), mp_context=context, initializer=_init_worker) as pool:
        try:
            return _collect(pool.map(process_rows, range(len(spans)), spans), len(rows), progress)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _collect(parts: Iterable[_PartResult], total: int | None, progress: Progress) -> Parts:
    files: list[File] = []
    counts: Counter[str] = Counter()
    done = resumed = 0
    progress(done, total)
    for part in parts:
        files.append(part.file)
        counts.update(part.counts)
        done += part.num_rows
        resumed += part.num_rows if part.resumed else 0
        progress(done, total, resumed=resumed)
    return Parts(files=tuple(files), counts=dict(counts))


def _process_rows(
    source: Path, folder: Path, transform: Transform, count: Count, redo: ShouldRedo, index: int, rows: range
) -> _PartResult:
    return _process_part(folder, index, len(rows), lambda: list(read(source, rows=rows)), transform, count, redo)


def _process_part(
    folder: Path,
    index: int,
    num_rows: int,
    instances: Callable[[], list[Instance]],
    transform: Transform,
    count: Count,
    redo: ShouldRedo = never_redo,
) -> _PartResult:
    if (finished := _read_finished_part(folder, index)) is not None and not redo(finished[1]):
        return _PartResult(*finished, num_rows=num_rows, resumed=True)
    results = list(transform(instances()))
    counts = dict(count(results))
    file = write_part(folder, index, results)
    write_bytes(_counts_path(folder, index), json.dumps({**asdict(file), "counts": counts}).encode())
    return _PartResult(file, counts, num_rows=num_rows, resumed=False)


def _read_finished_part(folder: Path, index: int) -> tuple[File, Mapping[str, int]] | None:
    """The file of a finished part and its counts; None if it is not finished, or damaged."""
    path = _counts_path(folder, index)
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
        counts = values.pop("counts")
        file = File(**values)
    except (ValueError, TypeError, KeyError):
        return None
    part = folder / file.name
    return (file, counts) if part.is_file() and sha256_of(part) == file.sha256 else None


def _counts_path(folder: Path, index: int) -> Path:
    return folder / f".part-{index:05d}.json"


def _init_worker() -> None:
    """Makes a worker ignore Ctrl-C, which the parent handles, and exit when the parent exits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after_parent, args=(parent.sentinel,), daemon=True).start()


def _exit_after_parent(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
