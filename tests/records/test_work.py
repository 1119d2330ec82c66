"""Work is done once, part by part, by one process at a time, and survives being killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from wording import assert_names

from cappy.errors import FolderError
from cappy.files import remove_folder
from cappy.progress import silent
from cappy.records import File, Instance, Manifest, read
from cappy.records import work as work_module
from cappy.records.folder import describe_files
from cappy.records.parts import process
from cappy.records.work import (
    WorkFolder,
    begin,
    claim,
    finish,
    fresh_name,
    list_work_folders,
    lock_folder,
    mark_finished,
    read_key,
)
from cappy.steps import KEY, STEP_SPECS, work_key

HOLD = """
import sys, time
from pathlib import Path
from cappy.records import work
with work.claim(Path(sys.argv[1]), "annotation", {"a": 1}):
    print("held", flush=True)
    time.sleep(60)
"""


def instances(count: int = 10) -> Iterator[Instance]:
    for number in range(count):
        yield Instance(instance_id=str(number), instruction=f"i{number}", references=("r",))


class Counting:
    """A transform that remembers which instances it was given, and fails at one."""

    def __init__(self, fail_at: str = "") -> None:
        self.seen: list[str] = []
        self._fail_at = fail_at

    def __call__(self, part: list[Instance]) -> list[Instance]:
        for instance in part:
            if instance.instance_id == self._fail_at:
                raise RuntimeError("killed")
            self.seen.append(instance.instance_id)
        return part


def do(work: Path, transform: Counting, **known: Any) -> tuple[File, ...]:
    with claim(work, "annotation", {"a": 1}) as folder:
        progress = known.get("progress", silent)
        return process(instances(), folder, transform, part_rows=3, progress=progress, total=10).files


def test_a_second_start_does_the_unfinished_parts_only(tmp_path: Path) -> None:
    first, second, third = Counting(fail_at="7"), Counting(), Counting()
    with pytest.raises(RuntimeError):
        do(tmp_path, first)
    files = do(tmp_path, second)
    assert first.seen == list("0123456")
    assert second.seen == list("6789")
    assert do(tmp_path, third) == files
    assert third.seen == []
    assert [file.rows for file in files] == [3, 3, 3, 1]


@pytest.mark.parametrize("damage", ["part", "no part", "no note"])
def test_a_damaged_part_is_done_again_and_no_other(tmp_path: Path, damage: str) -> None:
    files = do(tmp_path, Counting())
    (folder,) = (tmp_path / "annotation").iterdir()
    part, note = folder / files[1].name, folder / ".part-00001.json"
    if damage == "part":
        part.write_bytes(part.read_bytes()[:-1])
    else:
        (part if damage == "no part" else note).unlink()
    again = Counting()
    assert do(tmp_path, again) == files
    assert again.seen == list("345")


def test_progress_tells_what_an_earlier_start_had_finished(tmp_path: Path) -> None:
    messages: list[tuple[int, int | None, int]] = []

    def progress(done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = "") -> None:
        messages.append((done, total, resumed))

    with pytest.raises(RuntimeError):
        do(tmp_path, Counting(fail_at="4"))
    do(tmp_path, Counting(), progress=progress)
    assert messages == [(0, 10, 0), (3, 10, 3), (6, 10, 3), (9, 10, 3), (10, 10, 3)]


def test_other_steps_settings_and_parents_are_other_work(tmp_path: Path) -> None:
    asked: list[tuple[str, dict[str, Any], list[str]]] = [
        ("annotation", {"a": 1}, []),
        ("annotation", {"a": 2}, []),
        ("annotation", {"a": 1}, ["p"]),
        ("annotation", {"a": 1}, ["p", "q"]),
        ("scoring", {"a": 1}, []),
    ]
    folders = []
    for step, config, parents in asked:
        with claim(tmp_path, step, config, parents) as folder:
            folders.append(folder)
    assert len(set(folders)) == len(asked)
    with claim(tmp_path, "annotation", {"a": 1}) as again:
        assert again == folders[0]


def test_finished_work_is_published_whole_with_the_manifest(tmp_path: Path) -> None:
    with claim(tmp_path / "w", "annotation", {}) as folder:
        files = process(instances(), folder, Counting(), part_rows=4, progress=silent).files
        manifest = finish(folder, tmp_path / "t", Manifest(step="step", files=files))
    assert list(read(tmp_path / "t")) == list(instances())
    assert manifest.rows == 10
    names = sorted(path.name for path in (tmp_path / "t").iterdir())
    assert names == ["manifest.json", *(f"part-0000{n}.parquet" for n in range(3))]


@contextmanager
def holder(work: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the work."""
    other = subprocess.Popen([sys.executable, "-c", HOLD, work], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    with other:
        try:
            assert other.stdout.readline() == "held\n"
            yield other
        finally:
            other.kill()


def test_a_second_process_waits_and_then_names_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_module, "WAIT_SECONDS", 0.5)
    with holder(tmp_path) as other:
        started = time.monotonic()
        with pytest.raises(FolderError) as error, claim(tmp_path, "annotation", {"a": 1}):
            pytest.fail("two processes hold the same work")
        assert time.monotonic() - started >= 0.5
        (folder,) = (tmp_path / "annotation").iterdir()
        remedy = "wait for it, or stop it and run the same command again"
        assert_names(str(error.value), str(folder), str(other.pid), remedy)
        with claim(tmp_path, "annotation", {"a": 2}):
            pass


def test_the_lock_falls_with_its_holder_however_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_module, "WAIT_SECONDS", 5.0)
    with holder(tmp_path) as other:
        os.kill(other.pid, signal.SIGKILL)
        with claim(tmp_path, "annotation", {"a": 1}) as folder:
            assert (folder / ".lock").read_text() == str(os.getpid())
    with pytest.raises(RuntimeError), claim(tmp_path, "annotation", {"a": 1}):
        raise RuntimeError
    with claim(tmp_path, "annotation", {"a": 1}):
        pass


def test_a_note_that_does_not_fit_its_part_does_the_part_again(tmp_path: Path) -> None:
    files = do(tmp_path, Counting())
    (folder,) = (tmp_path / "annotation").iterdir()
    note = folder / ".part-00000.json"
    note.write_text(json.dumps({"name": files[0].name, "sha256": "0" * 64}))
    again = Counting()
    assert do(tmp_path, again) == files
    assert again.seen == list("012")


def test_a_note_that_is_damaged_does_its_part_again(tmp_path: Path) -> None:
    files = do(tmp_path, Counting())
    (folder,) = (tmp_path / "annotation").iterdir()
    (folder / ".part-00000.json").write_text("{")
    assert do(tmp_path, Counting()) == files


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return lines


def test_the_log_says_what_differs_from_the_nearest_other_work_of_the_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def start(settings: dict[str, Any], inputs: list[str]) -> list[str]:
        with claim(tmp_path, "sampling", settings, inputs):
            return logged(caplog)

    settings: dict[str, Any] = {"temperature": 0.9, "part_rows": 64, "shard": ""}
    assert start(settings, ["i"]) == []
    assert start(settings, ["i"]) == []
    assert start({**settings, "part_rows": 32, "temperature": 0.5}, ["other"]) != []
    (line,) = start({**settings, "temperature": 1.0}, ["i"])
    assert "temperature 0.9 -> 1.0" in line
    assert "part-rows" not in line
    (line,) = start({**settings, "temperature": 1.0}, ["j"])
    assert "inputs" in line
    assert start({**settings, "shard": "0/2"}, ["i"]) == []  # A share of the same work is not worth a line.


def test_keys_of_another_step_in_the_same_folder_are_not_compared_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in ("pretraining", "finetuning"):  # As jobs lie, whatever their step.
        (tmp_path / step).mkdir()
        begin(tmp_path / step, work_key(step, {"epochs": len(step)}))
    assert logged(caplog) == []


def test_the_key_is_readable_beside_the_work_and_is_not_published(tmp_path: Path) -> None:
    with claim(tmp_path / "w", "annotation", {"metric": "rougeL"}, ["parent"]) as folder:
        (folder / "own.txt").write_text("x")
        assert [file.name for file in describe_files(folder)] == ["own.txt"]
        key = read_key(folder)
    assert key is not None
    assert (key.step, key.settings, key.inputs) == ("annotation", {"metric": "rougeL"}, ["parent"])
    assert key.version == STEP_SPECS["annotation"].version
    assert key.name == folder.name


def test_another_version_of_the_step_is_other_work_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = STEP_SPECS["annotation"]
    with claim(tmp_path, "annotation", {"a": 1}) as first:
        pass
    monkeypatch.setitem(STEP_SPECS, "annotation", replace(spec, version=spec.version + 1))
    with claim(tmp_path, "annotation", {"a": 1}) as second:
        pass
    assert first != second
    assert f"version {spec.version} -> {spec.version + 1}" in logged(caplog)[0]


def test_fresh_work_starts_anew_unless_a_fresh_start_was_not_finished(tmp_path: Path) -> None:
    def left(fresh: str, *, finished: bool = False) -> list[str]:
        with claim(tmp_path, "annotation", {"a": 1}, fresh=fresh) as folder:
            before = sorted(path.name for path in folder.iterdir() if path.name not in (KEY, ".lock"))
            (folder / f"of {fresh or 'an earlier run'}").mkdir(exist_ok=True)
            if finished:
                mark_finished(folder)
            return before

    assert left("") == []
    assert left("") == ["of an earlier run"]
    assert left("one") == []
    assert left("one") == ["of one"], "a further attempt of the same run"
    assert left("two") == ["of one"], "the same command again, after it was killed"
    assert left("", finished=True) == ["of one", "of two"]
    assert left("one") == ["of an earlier run", "of one", "of two"], "its own retry"
    assert left("three") == []


def test_the_name_of_a_fresh_start_is_detected_before_all_inputs_are_known(tmp_path: Path) -> None:
    def name(fresh: str, settings: dict[str, Any] | None = None) -> str:
        return fresh_name(tmp_path, "annotation", settings or {"a": [1]}, ["parent"], fresh)

    assert (name(""), name("one")) == ("", "one")
    with claim(tmp_path, "annotation", {"a": (1,)}, ["parent", "revision"], fresh="one") as folder:
        pass
    assert (name(""), name("two")) == ("one", "one")
    assert name("two", {"a": [2]}) == "two"
    mark_finished(folder)
    assert (name(""), name("two")) == ("one", "two")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"step": "annotation"}',
        '{"step": 1, "more": 2}',
        '{"step": "annotation", "version": 1, "settings": {}, "inputs": null}',
        '{"step": "annotation", "version": 1, "settings": [], "inputs": []}',
    ],
)
def test_a_key_that_cannot_be_read_vouches_for_nothing_and_is_written_anew(tmp_path: Path, text: str) -> None:
    with claim(tmp_path, "annotation", {"a": 1}) as folder:
        (folder / "part").touch()
    (folder / KEY).write_text(text)
    with claim(tmp_path, "annotation", {"b": 1}):
        pass
    with claim(tmp_path, "annotation", {"a": 1}):
        key = read_key(folder)
        assert not (folder / "part").exists()
    assert key is not None
    assert key.settings == {"a": 1}


def test_whoever_waits_for_work_that_is_removed_gets_a_folder_of_their_own(tmp_path: Path) -> None:
    """Four thousand files take a while to remove; none of what the waiting one writes may go with them."""
    (work_folder,) = make_work_folders(tmp_path, 4000)
    seen: list[list[str]] = []

    def wait() -> None:
        with claim(tmp_path, "annotation", {"a": 1}) as folder:
            (folder / "mine").touch()
            seen.append(sorted(path.name for path in folder.iterdir()))

    with lock_folder(work_folder.path):
        threads = [threading.Thread(target=wait) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        remove_folder(work_folder.path)
    for thread in threads:
        thread.join()
    assert seen == [sorted([KEY, ".lock", "mine"])] * 3


def make_work_folders(work: Path, files: int) -> list[WorkFolder]:
    with claim(work, "annotation", {"a": 1}) as folder:
        for number in range(files):
            (folder / f"f{number}").touch()
    return list(list_work_folders(work, "annotation"))


def test_work_of_before_there_were_keys_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = tmp_path / "annotation" / ("0" * 24)
    old.mkdir(parents=True)
    (old / ".part-00000.json").write_text("{}")
    with claim(tmp_path, "annotation", {"a": 1}) as folder:
        assert folder != old
    assert logged(caplog) == []
    assert [path.name for path in old.iterdir()] == [".part-00000.json"]
