"""Where each step is, read from records and progress files alone; and how that reads."""

import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from wording import assert_names

from cappy.progress import ProgressState
from cappy.runs import StepRecord, record_path
from pipelines import states
from pipelines.states import StepState, StepTable, describe_progress, log_section, read_states

STEPS = {"preparation": "f1", "annotation": "f2", "registration": "f3", "deployment": "f4"}


def record(work: Path, fingerprint: str, run: str, status: str = "done") -> None:
    made = StepRecord(
        step="any", fingerprint=fingerprint, run=run, status=status, started=0, seconds=2, config={}, target="/made"
    )
    path = record_path(work, fingerprint)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(made)))


def progress(folder: Path, step: str, done: int) -> None:
    now = time.time()
    state = ProgressState(done=done, total=10, unit="rows", resumed=0, started=now - 2, updated=now)
    (folder / f"{step}.json").write_text(json.dumps(asdict(state)))


def seen(folder: Path, *, alive: bool = True, succeeded: bool = False) -> list[str]:
    last = read_states(STEPS, work=folder, progress=folder, run="mine", alive=alive, succeeded=succeeded)
    return [state.state for state in last]


def test_the_first_step_runs_before_it_says_a_word(tmp_path: Path) -> None:
    assert seen(tmp_path) == ["running", "waiting", "waiting", "waiting"]


def test_a_step_before_one_that_works_came_from_the_cache(tmp_path: Path) -> None:
    record(tmp_path, "f1", "an older run")
    progress(tmp_path, "annotation", 4)
    assert seen(tmp_path) == ["cached", "running", "waiting", "waiting"]


def test_after_a_finished_step_the_next_one_runs(tmp_path: Path) -> None:
    record(tmp_path, "f1", "mine")
    assert seen(tmp_path) == ["done", "running", "waiting", "waiting"]


def test_after_a_failure_nothing_runs(tmp_path: Path) -> None:
    record(tmp_path, "f1", "mine", status="failed")
    assert seen(tmp_path) == ["failed", "waiting", "waiting", "waiting"]


def test_a_step_whose_process_is_gone_has_failed(tmp_path: Path) -> None:
    record(tmp_path, "f1", "mine")
    progress(tmp_path, "annotation", 4)
    assert seen(tmp_path, alive=False) == ["done", "failed", "waiting", "waiting"]


def test_what_a_finished_run_did_not_call_for_is_skipped(tmp_path: Path) -> None:
    record(tmp_path, "f1", "older")
    record(tmp_path, "f2", "older")
    record(tmp_path, "f3", "mine")
    assert seen(tmp_path, alive=False, succeeded=True) == ["cached", "cached", "done", "skipped"]


def test_a_skipped_step_has_no_folder_although_an_older_run_left_one(tmp_path: Path) -> None:
    record(tmp_path, "f3", "mine")
    record(tmp_path, "f4", "older")
    last = read_states(STEPS, work=tmp_path, progress=tmp_path, run="mine", alive=False, succeeded=True)
    assert (last[-1].state, last[-1].target) == ("skipped", None)


def test_a_running_step_tells_done_of_total_rate_and_time_left() -> None:
    state = ProgressState(done=400, total=1000, unit="rows", resumed=100, started=0.0, updated=10.0)
    line = describe_progress(StepState(step="sampling", state="running", progress=state))
    assert_names(line, "400 of 1,000 rows", "100 resumed", "30 rows/s", "20 s left")


def test_the_log_of_a_step_is_its_own(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.write_text("start\nExecuting task \x1b[96m'a'\x1b[0m\n    of a\nExecuting task \x1b[96m'b'\x1b[0m\n    of b\n")
    assert log_section(log, "a") == ["Executing task 'a'", "of a"]
    assert log_section(log, "b")[-1] == "of b"


def test_a_step_that_began_twice_has_all_its_lines(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.write_text(
        "Executing task 'scoring'\nExecuting task 'scoring'\n    a line\nExecuting task 'gathering'\n    other\n"
    )
    assert log_section(log, "scoring")[-1] == "a line"
    assert log_section(log, "tracking", whole=False) == []


def test_the_first_line_about_a_running_step_comes_soon_with_its_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(states, "FIRST_PLAIN_SECONDS", 0.0)
    note = "last error: 429 slow down"
    progress = ProgressState(done=0, total=9, unit="instances", resumed=0, started=0.0, updated=1.0, note=note)
    running = [StepState(step="sampling", state="running", progress=progress)]
    with StepTable("cappy adapt", tmp_path / "run.log", show=True) as table:
        for _ in range(100):
            table.update(running)
    _, line = capsys.readouterr().err.splitlines()
    assert line.startswith("cappy adapt: sampling: running, 0 of 9 instances")
    assert note in line
