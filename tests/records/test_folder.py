"""A folder of records is finished and undamaged, or refused in one line."""

import errno
import json
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from wording import assert_names, raises_naming

from cappy.errors import FolderError
from cappy.records import Candidate, File, Instance, Manifest, read, read_batches, read_manifest, write
from cappy.records.folder import (
    describe_files,
    disk_errors,
    publish,
    rename_folder,
    verify,
    write_bytes,
    write_manifest,
    write_part,
)
from cappy.records.schema import SCHEMA_VERSION


def some(count: int, words: int = 1) -> Iterator[Instance]:
    for number in range(count):
        candidates = tuple(Candidate(response=f"{number} {index} " + "word " * words) for index in range(3))
        yield Instance(
            instance_id=str(number),
            instruction=f"Instruction {number}",
            references=("r",),
            split=("train", "validation", "test")[number % 3],
            candidates=candidates,
        )


def test_what_was_written_is_read_in_order_whatever_the_parts(tmp_path: Path) -> None:
    manifest = write(tmp_path / "f", some(10), part_rows=3, step="preparation")
    assert list(read(tmp_path / "f")) == list(some(10))
    assert read_manifest(tmp_path / "f") == manifest
    assert [file.rows for file in manifest.files] == [3, 3, 3, 1]
    assert (manifest.rows, manifest.candidates, manifest.step) == (10, 30, "preparation")


def test_splits_can_be_read_alone(tmp_path: Path) -> None:
    write(tmp_path / "f", some(9))
    assert [i.instance_id for i in read(tmp_path / "f", splits=["test"])] == ["2", "5", "8"]
    assert [i.instance_id for i in read(tmp_path / "f", splits=["train", "test"])] == ["0", "2", "3", "5", "6", "8"]
    assert list(read(tmp_path / "f", splits=[])) == []


def test_columns_can_be_read_alone(tmp_path: Path) -> None:
    write(tmp_path / "f", some(5), part_rows=2)
    batches = list(read_batches(tmp_path / "f", columns=["instance_id"]))
    assert [batch.schema.names for batch in batches] == [["instance_id"]] * 3
    assert [name for batch in batches for name in batch["instance_id"].to_pylist()] == list("01234")


def test_equal_work_has_an_equal_hash_and_other_work_another(tmp_path: Path) -> None:
    hashes = [write(tmp_path / name, some(5)).hash for name in ("a", "b")]
    assert hashes[0] == hashes[1] == read_manifest(tmp_path / "a").hash
    others = {write(tmp_path / "c", some(6)).hash, write(tmp_path / "d", some(5), step="s").hash}
    assert len({*others, hashes[0]}) == 3


def test_a_manifest_survives_the_round_trip() -> None:
    manifest = Manifest(
        step="s",
        files=(File(name="n", sha256="0" * 64, rows=2, candidates=3),),
        config={"a": [1, None]},
        code="c",
        seed=1,
        generators={"g": "r"},
        parents=("p",),
        metrics={"m": 0.1},
        facts={"f": {"x": "é"}},
    )
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert json.loads(manifest.to_json())["rows"] == 2


def test_a_finished_folder_is_never_overwritten(tmp_path: Path) -> None:
    before = write(tmp_path / "f", some(3))
    with raises_naming(FolderError, f"{tmp_path / 'f'}: is already finished", "choose another"):
        write(tmp_path / "f", some(4))
    assert verify(tmp_path / "f") == before


def test_a_missing_and_an_unfinished_folder_are_refused(tmp_path: Path) -> None:
    with raises_naming(FolderError, f"{tmp_path / 'none'}: no such folder"):
        next(read(tmp_path / "none"))
    folder = tmp_path / "half"
    write_part(folder, 0, list(some(2)))
    with raises_naming(FolderError, f"{folder}: ", "no manifest.json", "unfinished", "again"):
        next(read(folder))


def test_a_file_and_a_folder_of_folders_are_reported_apart(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with raises_naming(FolderError, f"{tmp_path / 'file'}: is a file", "give the folder"):
        read_manifest(tmp_path / "file")
    write(tmp_path / "shards/0", some(2))
    with raises_naming(FolderError, f"{tmp_path / 'shards'}: ", "folders of records", "cappy preparation --source"):
        read_manifest(tmp_path / "shards")


@pytest.mark.parametrize("damage", ["changed", "shortened", "missing"])
def test_a_damaged_part_is_refused_before_a_row_of_it_is_read(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "f"
    write(folder, some(4), part_rows=2)
    part = folder / "part-00001.parquet"
    data = bytearray(part.read_bytes())
    if damage == "changed":
        data[len(data) // 2] ^= 1
    part.write_bytes(data if damage == "changed" else data[:-1])
    if damage == "missing":
        part.unlink()
    result: list[Instance] = []
    what = "is missing" if damage == "missing" else "is damaged (sha256 "
    with raises_naming(FolderError, f"{part}: {what}", f"delete {folder}", "again"):
        result.extend(read(folder))
    assert result == [] or result == list(some(2))
    with pytest.raises(FolderError, match=r"part-00001\.parquet"):
        verify(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"step": "s"}', '{"files": [1]}', "\xff", '{"files": [], "x": 1}'])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    with raises_naming(FolderError, f"{tmp_path / 'manifest.json'}: is not a manifest", "again"):
        read_manifest(tmp_path)


def test_a_folder_of_a_newer_schema_is_refused(tmp_path: Path) -> None:
    newer = SCHEMA_VERSION + 1
    write_manifest(tmp_path, Manifest(step="s", files=(), schema_version=newer))
    path = tmp_path / "manifest.json"
    with raises_naming(FolderError, f"{path}: ", f"schema version {newer}", f"up to {SCHEMA_VERSION}", "update cappy"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["../stolen", "/etc/stolen", "sub/../../stolen", "..\\stolen"])
def test_a_manifest_names_nothing_outside_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "stolen").write_text("secret")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_manifest(folder, Manifest(step="s", files=(File(name=name, sha256="0"),)))
    for action in (read_manifest, verify, lambda where: list(read(where))):
        with raises_naming(FolderError, str(folder), "out of the folder"):
            action(folder)


def test_every_file_but_the_manifest_and_hidden_ones_is_described(tmp_path: Path) -> None:
    for name in ("b.txt", "sub/a.txt", ".hidden", "manifest.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [file.name for file in describe_files(tmp_path)] == ["b.txt", "sub/a.txt"]


def test_publishing_replaces_an_older_result_and_leaves_hidden_work_behind(tmp_path: Path) -> None:
    work, target = tmp_path / "work", tmp_path / "target"
    for count in (2, 3):
        file = write_part(work, 0, list(some(count)))
        (work / ".note").write_text("")
        publish(work, target, Manifest(step="s", files=(file,)))
        assert len(list(read(target))) == count
    assert sorted(path.name for path in target.iterdir()) == ["manifest.json", "part-00000.parquet"]


def test_publishing_leaves_no_part_of_an_older_result(tmp_path: Path) -> None:
    for name, parts in (("long", 2), ("short", 1)):
        files = tuple(write_part(tmp_path / name, index, list(some(2))) for index in range(parts))
        publish(tmp_path / name, tmp_path / "target", Manifest(step="s", files=files))
    assert sorted(path.name for path in (tmp_path / "target").iterdir()) == ["manifest.json", "part-00000.parquet"]


@pytest.mark.parametrize("name", ["file/folder", "x" * 300])
def test_a_target_that_cannot_be_a_folder_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError):
        publish(tmp_path, tmp_path / name, Manifest(step="s", files=()))


def test_publishing_over_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("mine")
    with raises_naming(FolderError, f"{tmp_path / 'target'}: is a file", "--target"):
        publish(tmp_path, tmp_path / "target", Manifest(step="s", files=()))
    assert (tmp_path / "target").read_text() == "mine"


def test_writing_a_file_again_leaves_what_was_published_from_it_alone(tmp_path: Path) -> None:
    write_bytes(tmp_path / "work", b"old")
    (tmp_path / "published").hardlink_to(tmp_path / "work")
    write_bytes(tmp_path / "work", b"new")
    assert ((tmp_path / "work").read_bytes(), (tmp_path / "published").read_bytes()) == (b"new", b"old")


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from cappy.errors import FolderError
from cappy.records.folder import write_bytes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
folder = Path(sys.argv[1])
write_bytes(folder / "small", b"x" * 1000)
try:
    write_bytes(folder / "large", b"x" * 1001)
except FolderError as error:
    print(error)
"""


def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, check=True)
    assert_names(done.stdout, f"{tmp_path / 'large'}: ", "disk", "free some space", "again")
    assert len(done.stdout.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_folder_that_may_not_be_written_is_named_with_its_remedy(number: int) -> None:
    with raises_naming(FolderError, "t: cannot be written", "--target", "permissions"), disk_errors(Path("t")):
        raise OSError(number, "refused")


def test_an_error_that_is_not_the_disks_keeps_its_kind() -> None:
    with pytest.raises(InterruptedError), disk_errors(Path("t")):
        raise InterruptedError


def test_memory_does_not_grow_with_rows(tmp_path: Path) -> None:
    def peak(rows: int) -> int:
        folder = tmp_path / str(rows)
        tracemalloc.start()
        try:
            write(folder, some(rows, words=5), part_rows=100)
            assert sum(1 for _ in read(folder)) == rows
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)
    assert peak(6_000) < 2 * peak(600)


def test_what_is_hidden_or_lies_in_a_hidden_folder_is_not_described(tmp_path: Path) -> None:
    for name in ("kept.json", "deep/kept.bin", ".hidden", ".checkpoints/1/model.safetensors", "manifest.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [file.name for file in describe_files(tmp_path)] == ["deep/kept.bin", "kept.json"]


@pytest.mark.parametrize("reached", range(4))
def test_a_folder_that_is_moved_file_by_file_is_whole_once_its_last_file_is_there(
    reached: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / ".tmp", tmp_path / "target"
    for name in ("a", "b/c", "last", "z"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    move = Path.replace
    moved: list[str] = []

    def no_folders(path: Path, new: Path) -> Path:
        raise OSError(errno.EMFILE, "Too many open files")

    def killed(path: Path, new: Path) -> Path:
        if len(moved) == reached:
            raise KeyboardInterrupt
        moved.append(path.name)
        return move(path, new)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", no_folders)
        patched.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            rename_folder(source, target, last="last")
        assert not (target / "last").exists()
        patched.setattr(Path, "replace", move)
        shutil.rmtree(source)
        source.mkdir()
        (source / "last").write_text("again")
        rename_folder(source, target, last="last")
    assert [path.name for path in target.iterdir()] == ["last"]
    assert not source.exists()


def test_a_folder_that_may_not_be_renamed_is_left_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()

    def refuse(path: Path, new: Path) -> Path:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        rename_folder(source, tmp_path / "target", last="a")
    assert source.is_dir()
