"""Files that are small on the disk and large in memory, or slow to read: refused before either."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from wording import raises_naming

from cappy.errors import RecordError
from cappy.preparation.bigbench import is_task, read_task
from cappy.preparation.tables import read_csv, read_parquet
from cappy.preparation.text_files import lines


def test_a_text_that_stands_in_every_row_is_held_once(tmp_path: Path) -> None:
    path, text = tmp_path / "rows.parquet", "a" * 2**24
    table = pa.table({"instruction": pa.DictionaryArray.from_arrays(pa.array([0] * 2_000), [text])})
    pq.write_table(table, path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 2_000
    before = pa.total_allocated_bytes()
    _, first = next(rows := read_parquet(path))
    assert len(first["instruction"]) == len(text)
    assert pa.total_allocated_bytes() - before < 20 * len(text)
    rows.close()


@pytest.mark.parametrize("kind", [pa.string(), pa.int8(), pa.null()])
def test_a_row_of_millions_of_values_is_refused(tmp_path: Path, kind: Any) -> None:
    path = tmp_path / "rows.parquet"
    values = pa.ListArray.from_arrays(pa.array([0, 10_000_000], pa.int32()), pa.nulls(10_000_000, kind))
    pq.write_table(pa.table({"choices": values}), path, compression="zstd")
    with raises_naming(RecordError, f"{path}: row 1: ", "as Parquet", "bytes, a row may have 67,108,864"):
        list(read_parquet(path))


def test_a_table_that_is_larger_than_a_row_may_be_comes_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table({"text": [str(index) * 1_000_000 for index in range(10)] * 10, "tags": [["a", None], None] * 50})
    pq.write_table(table, path)
    assert [row for _, row in read_parquet(path)] == table.to_pylist()


def test_a_date_that_python_has_not_is_one_line(tmp_path: Path) -> None:
    pq.write_table(pa.table({"day": pa.array([2**31 - 1], pa.date32())}), tmp_path / "rows.parquet")
    with pytest.raises(RecordError, match="row 1: cannot be read as Parquet"):
        list(read_parquet(tmp_path / "rows.parquet"))


def test_a_header_of_a_hundred_thousand_columns_is_read_at_once(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(",".join(f"c{index}" for index in range(100_000)) + "\n")
    assert list(read_csv(tmp_path / "rows.csv")) == []


def test_a_row_of_many_large_cells_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv.gz"
    with gzip.open(path, "wb", 1) as file:
        file.write(b"a,b\n")
        for _ in range(12):
            file.write(b'"' + b"a\n" * 3 * 2**20 + b'",')
        file.write(b"b\n")
    with raises_naming(RecordError, "rows.csv.gz:2: ", "more than 67,108,864 characters", "quotes"):
        list(read_csv(path))


def test_an_archive_that_asks_for_too_much_memory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lzma

    def refuse(*_: Any) -> bytes:
        raise MemoryError

    (tmp_path / "rows.jsonl.xz").write_bytes(lzma.compress(b"{}\n"))
    monkeypatch.setattr(lzma.LZMAFile, "readline", refuse)
    with pytest.raises(RecordError, match="needs too much memory to unpack"):
        list(lines(tmp_path / "rows.jsonl.xz"))


EXAMPLE = {"input": "x", "target_scores": {"a": 1, "b": 0}}
TASKS = {
    "a prefix that is a number": json.dumps({"task_prefix": 5, "examples": [EXAMPLE]}),
    "a prefix that is null": json.dumps({"choice_prefix": None, "examples": [EXAMPLE]}),
    "scores of two types": json.dumps({"examples": [{**EXAMPLE, "target_scores": {"a": 1, "b": "x"}}]}),
    "half a character": json.dumps({"examples": [{"input": "\ud800", "target": "a"}]}),
}


@pytest.mark.parametrize("text", TASKS.values(), ids=TASKS)
def test_a_task_of_other_types_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "task.json").write_text(text)
    with pytest.raises(RecordError, match=r"examples\[0\]: "):
        read_task(tmp_path / "task.json", 0)


def test_a_task_that_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "task.json").write_bytes(b"\xff{")
    with pytest.raises(RecordError, match="is not JSON"):
        read_task(tmp_path / "task.json", 0)


def test_a_file_of_gigabytes_is_not_read_to_see_whether_it_is_a_task(tmp_path: Path) -> None:
    with (tmp_path / "rows.json").open("wb") as file:
        file.truncate(20 * 2**30)
    assert not is_task(tmp_path / "rows.json")
