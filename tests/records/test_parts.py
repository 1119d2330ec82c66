"""Parts of a folder may be read, shared out and worked on by several processes: each row once, the result the same."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting import wait_until
from wording import raises_naming

from cappy.errors import FolderError, RecordError
from cappy.progress import silent
from cappy.records import Instance, Manifest, read, read_batches, write
from cappy.records.folder import describe_files, write_manifest
from cappy.records.parts import process_folder
from cappy.records.work import Shard, parse_shard

FAKES = Path(__file__).parents[1] / "fakes"


def some(count: int) -> list[Instance]:
    return [Instance(instance_id=str(n), instruction=f"i{n}", references=("r",)) for n in range(count)]


def test_a_folder_of_something_else_is_one_line_that_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    write_manifest(tmp_path, Manifest(step="finetuning", files=describe_files(tmp_path)))
    for rows in (None, range(1)):
        with raises_naming(FolderError, str(tmp_path), "finetuning", "model.safetensors"):
            list(read(tmp_path, rows=rows))


def same(part: list[Instance]) -> list[Instance]:
    if any(instance.instance_id == "bad" for instance in part):
        raise RecordError("bad row")
    return part


def even(part: Sequence[Instance]) -> Mapping[str, int]:
    return {"even": sum(int(instance.instance_id) % 2 == 0 for instance in part)}


def slow(part: list[Instance]) -> Iterator[Instance]:
    time.sleep(60)
    yield from part


@pytest.mark.parametrize("part_rows", [1, 3, 7, 50])
@pytest.mark.parametrize("rows", [range(20), range(5), range(3, 4), range(4, 17), range(19, 20), range(6, 6)])
def test_a_range_of_rows_is_read_whatever_the_parts(tmp_path: Path, part_rows: int, rows: range) -> None:
    write(tmp_path / "f", some(20), part_rows=part_rows)
    assert list(read(tmp_path / "f", rows=rows)) == some(20)[rows.start : rows.stop]
    result = [name for batch in read_batches(tmp_path / "f", rows=rows) for name in batch["instance_id"].to_pylist()]
    assert result == [str(row) for row in rows]


def test_a_range_leaves_other_parts_unopened(tmp_path: Path) -> None:
    write(tmp_path / "f", some(20), part_rows=5)
    for name in ("part-00000.parquet", "part-00003.parquet"):
        (tmp_path / "f" / name).unlink()
    assert list(read(tmp_path / "f", rows=range(5, 15))) == some(20)[5:15]


@given(total=st.integers(0, 10_000), count=st.integers(1, 64))
def test_shards_hold_every_row_once_and_are_of_one_size(total: int, count: int) -> None:
    shards = [Shard(index, count).rows(total) for index in range(count)]
    assert [row for rows in shards for row in rows] == list(range(total))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert parse_shard(f"{count - 1}/{count}") == Shard(count - 1, count)
    assert [shard for shard in (Shard(index, count) for index in range(count)) if shard.holds(total)] == [
        Shard(total % count, count)
    ]


def test_a_finished_part_is_done_again_where_its_counts_say_so(tmp_path: Path) -> None:
    write(tmp_path / "in", some(6))
    done: list[str] = []

    def noted(part: list[Instance]) -> list[Instance]:
        done.extend(instance.instance_id for instance in part)
        return part

    def again(counts: Mapping[str, int]) -> bool:
        return counts["even"] == 2

    for _ in range(2):
        parts = process_folder(
            tmp_path / "in", tmp_path / "work", noted, rows=range(6), part_rows=3, progress=silent, count=even,
            redo=again,
        )  # fmt: skip
        assert parts.counts == {"even": 3}
    # Rows 0 to 2 hold two even ones.
    assert done == ["0", "1", "2", "3", "4", "5", "0", "1", "2"]


def test_workers_write_what_one_process_writes(tmp_path: Path) -> None:
    write(tmp_path / "f", some(20), part_rows=6)
    messages: list[int] = []

    def progress(done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = "") -> None:
        messages.append(done)

    results = []
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        folder.mkdir()
        results.append(
            process_folder(
                tmp_path / "f",
                folder,
                same,
                rows=range(1, 19),
                part_rows=4,
                progress=progress,
                count=even,
                workers=workers,
            )
        )
    assert results[0] == results[1]
    assert (results[0].rows, results[0].counts) == (18, {"even": 9})
    assert messages == [0, 4, 8, 12, 16, 18] * 2


def test_a_bad_row_in_a_worker_is_the_error_and_finished_parts_are_kept(tmp_path: Path) -> None:
    rows = some(8)
    rows[5] = Instance(instance_id="bad", instruction="b", references=("r",))
    write(tmp_path / "f", rows)
    (tmp_path / "w").mkdir()
    with pytest.raises(RecordError, match="^bad row$"):
        process_folder(tmp_path / "f", tmp_path / "w", same, rows=range(8), part_rows=2, progress=silent, workers=2)
    assert (tmp_path / "w/part-00000.parquet").is_file()
    assert not (tmp_path / "w/part-00002.parquet").exists()


HOLD = """
import sys
from pathlib import Path
from cappy.progress import silent
from cappy.records.parts import process_folder
from test_parts import slow
if __name__ == "__main__":
    source, folder = map(Path, sys.argv[1:])
    print("started", flush=True)
    process_folder(source, folder, slow, rows=range(8), part_rows=2, progress=silent, workers=2)
"""


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    write(tmp_path / "f", some(8))
    (tmp_path / "w").mkdir()
    script = tmp_path / "hold.py"
    script.write_text(HOLD)
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{FAKES}"}
    with subprocess.Popen([sys.executable, script, tmp_path / "f", tmp_path / "w"], env=environment) as parent:
        wait_until(lambda: len(_children(parent.pid)) >= 3, "three children", process=parent)
        workers = _children(parent.pid)
        parent.send_signal(signal.SIGKILL)
    assert workers
    wait_until(lambda: not any(map(_alive, workers)), f"the end of {workers}", seconds=30)


def _children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
