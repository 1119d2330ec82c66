"""Folders of records that somebody else wrote: whatever is wrong with one is a line, never a traceback."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from wording import raises_naming

from cappy.errors import FolderError
from cappy.preparation.sources import open_source
from cappy.preparation.step import PreparationConfig
from cappy.records import Instance, Manifest, read, read_manifest, write
from cappy.records.folder import MAX_MANIFEST_BYTES, describe_files, verify, write_bytes, write_manifest

PART = {"name": "part-00000.parquet", "sha256": "0" * 64}


def manifest(**changes: Any) -> str:
    return json.dumps({"step": "sampling", "files": [], "parents": [], **changes})


ODD = {
    "deep": '{"step": ' + "[" * 100_000,
    "deep facts": manifest().replace("}", ', "facts": {"a": ' + "[" * 950 + "]" * 950 + "}}"),
    "half a character": manifest(facts={"a": "\ud800"}),
    "a schema that is a text": manifest(schema_version="9"),
    "rows that are a text": manifest(files=[{**PART, "rows": "9"}]),
    "negative rows": manifest(files=[{**PART, "rows": -5}]),
    "a hash that is a number": manifest(files=[{**PART, "sha256": 5}]),
    "a NUL": manifest(files=[{**PART, "name": "a\0"}]),
    "the folder": manifest(files=[{**PART, "name": "."}]),
    "a name twice": manifest(files=[PART, PART]),
    "a config that is a list": manifest(config=[1]),
    "facts that are null": manifest(facts=None),
    "parents that are numbers": manifest(parents=[1]),
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_a_manifest_of_other_types_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(FolderError, match="is not a manifest"):
        read_manifest(tmp_path)


def test_a_manifest_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    with raises_naming(FolderError, f"{tmp_path / 'manifest.json'}: ", "67,108,865 bytes"):
        read_manifest(tmp_path)


def test_a_name_too_long_for_the_disk_is_a_file_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(manifest(files=[{**PART, "name": "a" * 5_000}]))
    with raises_naming(FolderError, "a" * 100, "missing"):
        verify(tmp_path)


ALL = {"instance_id": ["a"], "references": [["y"]], "group_id": ["g"], "task": ["t"], "split": ["train"]}
TABLES = {
    "no id": {"instruction": ["x"]},
    "no column of ours": {"other": [1]},
    "numbers": {**ALL, "instruction": [1]},
    "texts for candidates": {**ALL, "instruction": ["x"], "candidates": ["x"]},
    "candidates without responses": {**ALL, "instruction": ["x"], "candidates": [[{"source": "llm"}]]},
    "responses that are numbers": {**ALL, "instruction": ["x"], "candidates": [[{"response": 5, "source": "llm"}]]},
}


@pytest.mark.parametrize("columns", TABLES.values(), ids=TABLES)
def test_a_part_of_other_columns_is_no_part(tmp_path: Path, columns: dict[str, Any]) -> None:
    pq.write_table(pa.table(columns), tmp_path / "part-00000.parquet")
    write_manifest(tmp_path, Manifest(step="sampling", files=describe_files(tmp_path)))
    with raises_naming(FolderError, f"{tmp_path / 'part-00000.parquet'}: ", "does not have the columns"):
        list(read(tmp_path))


def test_a_part_that_is_no_parquet_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "part-00000.parquet").write_bytes(b"PAR1xxxx")
    write_manifest(tmp_path, Manifest(step="sampling", files=describe_files(tmp_path)))
    with raises_naming(FolderError, f"{tmp_path / 'part-00000.parquet'}: ", "as Parquet"):
        list(read(tmp_path))


@pytest.mark.parametrize("shard", ["0/99999999999", "0/x", "7"])
def test_shards_that_a_manifest_invents_are_not_counted(tmp_path: Path, shard: str) -> None:
    from dataclasses import replace

    for name in ("a", "b"):
        instance = Instance(instance_id=name, group_id="g", task="t", split="train", instruction="x", references=("y",))
        result = write(tmp_path / name, [instance])
        write_manifest(tmp_path / name, replace(result, config={"shard": shard}))
    with pytest.raises(FolderError, match="not a shard"):
        open_source(PreparationConfig(source=str(tmp_path), target=tmp_path / "target"))


def test_a_link_that_waits_under_the_temporary_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / f".a.json.{os.getpid()}.tmp").symlink_to(tmp_path / "mine.txt")
    write_bytes(tmp_path / "a.json", b"{}")
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert (tmp_path / "a.json").read_bytes() == b"{}"
