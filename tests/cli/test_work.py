"""`cappy explain` and `cappy clean`: what a work folder holds, told and removed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from wording import assert_names

from cappy.cli.tools import clean, explain
from cappy.errors import ConfigError, FolderError
from cappy.records.work import claim, lock_folder
from cappy.sampling.store import DRAWING_VERSION, CandidateStore, Origin
from cappy.steps import STEP_SPECS


def do(work: Path, **settings: Any) -> Path:
    with claim(work, "annotation", settings, ["i"]) as folder:
        (folder / "part-00000.parquet").write_bytes(b"x" * 1000)
    return folder


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[[], Any]:
    return lambda: json.loads(capsys.readouterr().out)


def test_explain_says_how_each_piece_differs_from_the_one_before(tmp_path: Path, printed: Callable[[], Any]) -> None:
    do(tmp_path, metric="rougeL", seed=0)
    do(tmp_path, metric="chrf", seed=0)
    explain("annotation", tmp_path, as_json=True)
    newest, oldest = printed()
    assert newest["differs"] == ['metric "rougeL" -> "chrf"']
    assert newest["settings"] == {"metric": "chrf", "seed": 0}
    assert oldest["differs"] == []
    assert newest["size_bytes"] > 1000


def test_explain_reads_as_text_and_refuses_what_is_no_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explain("annotation", tmp_path)
    assert "no work" in capsys.readouterr().out
    folder = do(tmp_path, metric="rougeL")
    do(tmp_path, metric="chrf")
    explain("annotation", tmp_path)
    assert_names(capsys.readouterr().out, str(folder), 'metric "rougeL" -> "chrf"', "0.0 MB")
    with pytest.raises(ConfigError, match="annotation"):
        explain("anotation", tmp_path)


def test_clean_lists_what_no_run_finds_and_removes_it_when_asked(
    tmp_path: Path, printed: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = STEP_SPECS["annotation"]
    monkeypatch.setitem(STEP_SPECS, "annotation", replace(spec, version=spec.version + 1))
    later = do(tmp_path, metric="rougeL")
    monkeypatch.undo()
    present = do(tmp_path, metric="rougeL")
    old = tmp_path / "sampling" / ("0" * 24)
    old.mkdir(parents=True)
    (old / "part-00000.parquet").write_bytes(b"x")
    with CandidateStore(tmp_path, Origin(generator="g", revision="r", version=0)):
        pass
    clean(tmp_path, as_json=True)
    rows = printed()
    (drawn,) = (tmp_path / "candidates").iterdir()
    assert {row["path"] for row in rows} == {str(later), str(old), str(drawn)}
    assert later.is_dir()
    clean(tmp_path, remove=True, as_json=True)
    assert printed() == [{**row, "removed": True} for row in rows]
    assert [present.is_dir(), later.exists(), old.exists(), drawn.exists()] == [True, False, False, False]
    clean(tmp_path, as_json=True)
    assert printed() == []


def test_clean_takes_along_what_is_old_where_days_are_given(tmp_path: Path, printed: Callable[[], Any]) -> None:
    folder = do(tmp_path, metric="rougeL")
    clean(tmp_path, older_than=1.0, as_json=True)
    assert printed() == []
    clean(tmp_path, older_than=0.0, as_json=True)
    assert [row["path"] for row in printed()] == [str(folder)]


def test_clean_leaves_work_that_a_process_holds(tmp_path: Path) -> None:
    with claim(tmp_path, "annotation", {"a": 1}) as folder:
        (folder / "key.json").unlink()
        with pytest.raises(FolderError, match=str(folder)):
            clean(tmp_path, remove=True)
        assert folder.is_dir()


def test_clean_keeps_what_is_in_use_and_removes_the_rest(tmp_path: Path, printed: Callable[[], Any]) -> None:
    used, other = (tmp_path / "sampling" / (digit * 24) for digit in "01")
    for folder in (used, other):
        folder.mkdir(parents=True)
    with lock_folder(used), pytest.raises(FolderError, match=used.name):
        clean(tmp_path, remove=True, as_json=True)
    assert {row["path"]: row["removed"] for row in printed()} == {str(used): False, str(other): True}
    assert (used.is_dir(), other.exists()) == (True, False)


def test_clean_lists_the_folders_of_jobs_and_what_fresh_starts_drew_for_work_that_is_gone(
    tmp_path: Path, printed: Callable[[], Any]
) -> None:
    job = tmp_path / "jobs" / f"cappy-finetuning-{'0' * 24}"
    job.mkdir(parents=True)
    for name in ("gone", "known"):
        with CandidateStore(tmp_path / "fresh" / name, Origin(generator="g", revision="r", version=DRAWING_VERSION)):
            pass
    with claim(tmp_path, "sampling", {"a": 1}, fresh="known"):
        pass
    clean(tmp_path, remove=True, as_json=True)
    (drawn,) = (row for row in printed() if row["step"] == "candidates")
    assert "/fresh/gone/" in drawn["path"]
    assert not job.exists()
    assert [path.name for path in (tmp_path / "fresh").iterdir()] == ["known"]
