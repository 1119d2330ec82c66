"""Gathering: what shards wrote is one folder again, nothing lost, nothing rewritten, a damaged part refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from wording import raises_naming

from cappy.errors import ConfigError, FolderError
from cappy.records import Instance, read, read_manifest, write
from cappy.records.folder import write_manifest
from cappy.records.gathering import GatheringConfig, run


def shard(folder: Path, start: int, count: int, step: str = "annotation", **metrics: float) -> Path:
    instances = [
        Instance(instance_id=str(index), instruction=f"Say {index}.", references=("yes",))
        for index in range(start, start + count)
    ]
    manifest = write(folder, instances, step=step, part_rows=2)
    fields: dict[str, Any] = {
        "config": {"shard": str(start), "seed": 1},
        "seed": 7,
        "generators": {f"llm-{start}": f"revision-{start}"},
    }
    write_manifest(folder, replace(manifest, metrics={"rows": float(count), **metrics}, **fields))
    return folder


def gathered(tmp_path: Path, *sources: Path, target: str = "target") -> Path:
    run(GatheringConfig(source=sources, target=tmp_path / target, work=tmp_path / "work"))
    return tmp_path / target


def test_all_rows_are_there_in_the_order_of_the_shards(tmp_path: Path) -> None:
    one, two = shard(tmp_path / "a", 0, 3, mean=0.5), shard(tmp_path / "b", 3, 4, mean=0.25)
    target = gathered(tmp_path, one, two)
    assert [instance.instance_id for instance in read(target)] == [str(index) for index in range(7)]
    manifest = read_manifest(target)
    assert manifest.rows == 7
    assert manifest.parents == (read_manifest(one).hash, read_manifest(two).hash)
    assert manifest.metrics == {"rows": 7.0}, "counts add up, a mean of means says nothing"
    assert manifest.config == {"seed": 1}
    assert manifest.step == "annotation"
    assert manifest.seed == 7
    assert manifest.generators == {"llm-0": "revision-0", "llm-3": "revision-3"}
    assert {file.sha256 for file in manifest.files} == {
        file.sha256 for folder in (one, two) for file in read_manifest(folder).files
    }


def test_the_same_shards_give_the_same_hash(tmp_path: Path) -> None:
    one, two = shard(tmp_path / "a", 0, 3), shard(tmp_path / "b", 3, 4)
    first = read_manifest(gathered(tmp_path, one, two)).hash
    assert read_manifest(gathered(tmp_path, one, two, target="again")).hash == first
    assert read_manifest(gathered(tmp_path, two, one, target="other")).hash != first


def test_a_damaged_part_and_another_steps_folder_are_refused(tmp_path: Path) -> None:
    one, two = shard(tmp_path / "a", 0, 3), shard(tmp_path / "b", 3, 4)
    with pytest.raises(ConfigError, match="different steps"):
        gathered(tmp_path, one, shard(tmp_path / "c", 7, 1, step="sampling"))
    part = next(two.glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(FolderError, match="is damaged"):
        gathered(tmp_path, one, two)
    assert not (tmp_path / "target").exists()


def test_a_source_is_neither_the_target_nor_given_twice(tmp_path: Path) -> None:
    one, two = shard(tmp_path / "a", 0, 3), shard(tmp_path / "b", 3, 4)
    with raises_naming(ConfigError, str(one), "source itself"):
        gathered(tmp_path, one, two, target="a")
    with raises_naming(ConfigError, "two sources", "same work"):
        gathered(tmp_path, one, one)
    assert read_manifest(one).rows == 3
