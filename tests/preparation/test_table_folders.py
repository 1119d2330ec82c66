"""Folders of data files: shards of a table, and what datasets' save_to_disk wrote (B7)."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from wording import assert_names, raises_naming

from cappy.errors import ConfigError, FolderError
from cappy.records import Instance, Manifest

Prepare = Callable[..., tuple[Manifest, list[Instance]]]
ROWS = [{"instruction": f"Say {number}.", "reference": str(number)} for number in range(12)]
OTHERS = [{"instruction": f"Tell {number}.", "reference": str(number)} for number in range(12)]


def shards(folder: Path, rows: list[dict[str, str]], names: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        size = -(-len(rows) // len(names))
        pq.write_table(pa.Table.from_pylist(rows[index * size : (index + 1) * size]), folder / name)
    return folder


def said(result: list[Instance]) -> list[str]:
    return [one.instruction for one in result]


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        ["part-00000-1a2b-c000.snappy.parquet", "part-00001-1a2b-c000.snappy.parquet"],
        ["0.parquet", "1.parquet", "2.parquet"],
    ],
)
def test_b7_a_folder_of_parquet_shards_is_one_table(prepare: Prepare, tmp_path: Path, names: list[str]) -> None:
    folder = shards(tmp_path / "quiz", ROWS, names)
    (folder / "_SUCCESS").touch()
    (folder / ".part-0.parquet.crc").write_bytes(b"x")
    (folder / "README.md").write_text("A dataset.")
    manifest, result = prepare(folder)
    assert said(result) == [row["instruction"] for row in ROWS]
    assert {one.task for one in result} == {"quiz"}
    assert len(manifest.parents) == len(names)


def test_b7_files_of_other_formats_are_one_table_too(prepare: Prepare, tmp_path: Path) -> None:
    for suffix in ("jsonl", "json"):
        folder = tmp_path / suffix
        folder.mkdir()
        for index in range(2):
            text = "".join(json.dumps(row) + "\n" for row in ROWS[index * 6 : index * 6 + 6])
            (folder / f"{index}.{suffix}").write_text(text)
        assert said(prepare(folder)[1]) == [row["instruction"] for row in ROWS]


def test_b7_of_several_splits_the_one_that_is_named_is_read(
    prepare: Prepare, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "quiz"
    shards(folder / "data", ROWS, ["train-00000-of-00001.parquet"])
    shards(folder / "data", OTHERS, ["test-00000-of-00001.parquet"])
    with caplog.at_level(logging.WARNING):
        assert said(prepare(folder)[1]) == [row["instruction"] for row in ROWS]
    assert_names(caplog.text, "split train", "not test", "--split")
    assert said(prepare(folder, split="test")[1]) == [row["instruction"] for row in OTHERS]
    with raises_naming(ConfigError, str(folder), "no split 'dev'", "test, train", "--split"):
        prepare(folder, split="dev")


WRITERS: dict[str, Callable[[Path, list[dict[str, str]]], object]] = {
    "jsonl": lambda path, rows: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
    "json": lambda path, rows: path.write_text(json.dumps(rows)),
    "csv": lambda path, rows: path.write_text(
        "instruction,reference\n" + "".join(f"{row['instruction']},{row['reference']}\n" for row in rows)
    ),
    "parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
}
NAMES = [
    ("train.{}", "test.{}", "test"),
    ("train.{}", "validation.{}", "validation"),
    ("TRAIN.{}", "dev.{}", "dev"),
    ("quiz_train.{}", "quiz_test.{}", "test"),
    ("quiz-train-v2.{}", "quiz-val-v2.{}", "val"),
    ("train/0.{}", "test/0.{}", "test"),
    ("train/data-00000-of-00001.{}", "test/data-00000-of-00001.{}", "test"),
    ("train-00000-of-00001.{}", "test-00000-of-00001.{}", "test"),
]


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize(("train", "other", "split"), NAMES)
def test_b7_splits_that_files_or_folders_name_are_reported_apart_in_every_format(
    prepare: Prepare,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    suffix: str,
    train: str,
    other: str,
    split: str,
) -> None:
    for name, rows in ((train, ROWS), (other, OTHERS)):
        path = tmp_path / "quiz" / name.format(suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[suffix](path, rows)
    with caplog.at_level(logging.WARNING):
        assert said(prepare(tmp_path / "quiz")[1]) == [row["instruction"] for row in ROWS]
    (line,) = (record.getMessage() for record in caplog.records if "--split" in record.getMessage())
    assert_names(line, f"{tmp_path / 'quiz'}: ", "split train", f"not {split}")
    assert said(prepare(tmp_path / "quiz", split=split)[1]) == [row["instruction"] for row in OTHERS]


def test_b7_a_file_whose_name_tells_no_split_does_not_pool_the_others(prepare: Prepare, tmp_path: Path) -> None:
    folder = tmp_path / "quiz"
    folder.mkdir()
    for name in ("train.csv", "test.csv", "more.csv"):
        WRITERS["csv"](folder / name, ROWS)
    with raises_naming(FolderError, f"{folder}: ", "(test, train)", "more.csv", "--source"):
        prepare(folder)
    (folder / "test.csv").unlink()
    WRITERS["csv"](folder / "more.csv", OTHERS)
    assert len(prepare(folder)[1]) == 24, "one split alone is the whole"
    (folder / "more.csv").unlink()
    (folder / "train.csv").rename(folder / "test.csv")
    assert len(prepare(folder)[1]) == 12


def test_b7_half_a_folder_is_refused(prepare: Prepare, tmp_path: Path) -> None:
    folder = shards(tmp_path / "quiz", ROWS, ["train-00000-of-00003.parquet", "train-00002-of-00003.parquet"])
    with raises_naming(FolderError, str(folder), "shard 1 of 3"):
        prepare(folder)
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.csv").write_text("instruction,reference\na,b\n")
    (tmp_path / "mixed" / "b.jsonl").write_text('{"instruction": "a", "reference": "b"}\n')
    with raises_naming(FolderError, str(tmp_path / "mixed"), "(.csv, .jsonl)", "give one"):
        prepare(tmp_path / "mixed")


def test_b7_a_dataset_that_was_saved_to_disk_is_read(prepare: Prepare, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "whole", num_shards=3)
    manifest, result = prepare(tmp_path / "whole")
    assert said(result) == [row["instruction"] for row in ROWS]
    assert (len(manifest.parents), {one.task for one in result}) == (3, {"whole"})
    saved.shuffle(seed=1).select(range(5)).save_to_disk(tmp_path / "few")
    assert len(prepare(tmp_path / "few")[1]) == 5
    one = tmp_path / "whole" / "data-00000-of-00003.arrow"
    assert said(prepare(one, test=0, validation=0)[1]) == [row["instruction"] for row in ROWS[:4]]
    with raises_naming(ConfigError, str(tmp_path / "whole"), "--split 'test'", "leave --split out"):
        prepare(tmp_path / "whole", split="test")
    one.unlink()
    with raises_naming(FolderError, "data-00000-of-00003.arrow: is missing"):
        prepare(tmp_path / "whole")


def test_b7_a_dictionary_of_splits_that_was_saved_to_disk_is_read_by_split(
    prepare: Prepare, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    datasets = pytest.importorskip("datasets")
    made = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(OTHERS)}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "both")
    with caplog.at_level(logging.WARNING):
        manifest, result = prepare(tmp_path / "both")
    assert said(result) == [row["instruction"] for row in ROWS]
    assert_names(manifest.facts["notes"]["splits"], "split train", "not test", "--split")
    assert said(prepare(tmp_path / "both", split="test")[1]) == [row["instruction"] for row in OTHERS]
    with raises_naming(ConfigError, str(tmp_path / "both"), "no split 'dev'", "train, test", "--split"):
        prepare(tmp_path / "both", split="dev")


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", ""])
def test_b7_a_folder_names_no_file_outside_of_it(prepare: Prepare, tmp_path: Path, name: str) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with raises_naming(FolderError, str(tmp_path / "saved"), f"'{name}'", "outside"):
        prepare(tmp_path / "saved")


def test_b7_a_damaged_arrow_file_is_one_line(prepare: Prepare, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (path,) = (tmp_path / "saved").glob("*.arrow")
    whole = path.read_bytes()
    from cappy.errors import RecordError

    for cut in (whole[:4], whole[: len(whole) // 2], b"\xff" * 64, b"ARROW1\0\0" + b"x" * 20):
        path.write_bytes(cut)
        with raises_naming(RecordError, str(path), "as Arrow"):
            prepare(path)
