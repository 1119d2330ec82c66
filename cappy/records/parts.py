"""Work done part by part: what is finished stays finished, and several processes may share what is left."""

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
Count = Callable[[Sequence[Instance]], Mapping[str, int]]
Again = Callable[[Mapping[str, int]], bool]
"""Whether a part with these counts, which an earlier start finished, is to be done again."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The finished parts in order, and what was counted in all of them."""

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
    taken: int
    resumed: bool


def count_nothing(_: Sequence[Instance]) -> Mapping[str, int]:
    """Counts nothing."""
    return {}


def never_redo(_: Mapping[str, int]) -> bool:
    """What is finished stays finished."""
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

    Parts that an earlier start finished, and that still have their sha256, are not done again. `count` sees the
    instances of each part before they are written; its numbers are kept with the part.
    """

    def one(index: int, part: list[Instance]) -> _PartResult:
        return _process_part(folder, index, len(part), lambda: part, transform, count)

    return _collect(map(one, itertools.count(), batched(instances, part_rows)), total, progress)


def process_folder(
    source: Path,
    folder: Path,
    transform: Transform,
    *,
    rows: range,
    part_rows: int,
    progress: Progress,
    count: Count = count_nothing,
    again: Again = never_redo,
    workers: int = 1,
) -> Parts:
    """`process` over these rows of a finished folder, in `workers` processes; each reads the rows of its own parts.

    The result does not depend on `workers`. With more than one, `transform`, `count` and `again` must be picklable.
    """
    starts = range(rows.start, rows.stop, part_rows)
    spans = [range(start, min(start + part_rows, rows.stop)) for start in starts]
    one = partial(_process_rows, source, folder, transform, count, again)
    if min(workers, len(spans)) <= 1:
        return _collect(map(one, range(len(spans)), spans), len(rows), progress)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(spans)), mp_context=context, initializer=_init_worker) as pool:
        try:
            return _collect(pool.map(one, range(len(spans)), spans), len(rows), progress)
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
        done += part.taken
        resumed += part.taken if part.resumed else 0
        progress(done, total, resumed=resumed)
    return Parts(files=tuple(files), counts=dict(counts))


def _process_rows(
    source: Path, folder: Path, transform: Transform, count: Count, again: Again, index: int, rows: range
) -> _PartResult:
    return _process_part(folder, index, len(rows), lambda: list(read(source, rows=rows)), transform, count, again)


def _process_part(
    folder: Path,
    index: int,
    taken: int,
    instances: Callable[[], list[Instance]],
    transform: Transform,
    count: Count,
    again: Again = never_redo,
) -> _PartResult:
    if (finished := _read_finished(folder, index)) is not None and not again(finished[1]):
        return _PartResult(*finished, taken=taken, resumed=True)
    done = list(transform(instances()))
    counts = dict(count(done))
    file = write_part(folder, index, done)
    write_bytes(_note_path(folder, index), json.dumps({**asdict(file), "counts": counts}).encode())
    return _PartResult(file, counts, taken=taken, resumed=False)


def _read_finished(folder: Path, index: int) -> tuple[File, Mapping[str, int]] | None:
    note = _note_path(folder, index)
    if not note.is_file():
        return None
    try:
        values = json.loads(note.read_text())
        counts = values.pop("counts")
        file = File(**values)
    except (ValueError, TypeError, KeyError):
        return None
    path = folder / file.name
    return (file, counts) if path.is_file() and sha256_of(path) == file.sha256 else None


def _note_path(folder: Path, index: int) -> Path:
    return folder / f".part-{index:05d}.json"


def _init_worker() -> None:
    """A worker leaves Ctrl-C to the parent, and ends when the parent does, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with, args=(parent.sentinel,), daemon=True).start()


def _exit_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
