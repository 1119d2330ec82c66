"""A worker starts a step, tells how far it is, leaves a record, and never outlives its parent."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from waiting import wait_until
from wording import assert_names

from cappy.config import encode
from cappy.progress import FileProgress, LogProgress, ProgressState, read_state
from cappy.records import read_manifest
from cappy.runs import (
    ACCELERATORS_VARIABLE,
    PARENT_VARIABLE,
    PROGRESS_VARIABLE,
    TIMEOUT_VARIABLE,
    progress_path,
    read_record,
    record_path,
)
from cappy.steps import STEP_SPECS
from cappy.worker import check_accelerators, config_class, hold_parent_lock, launch, runner


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file that the preparation step can read."""
    path = tmp_path / "in.jsonl"
    rows = ({"instruction": f"Add {number}.", "reference": "1"} for number in range(6))
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("step", STEP_SPECS)
def test_every_step_has_a_config_of_its_name_and_a_run(step: str) -> None:
    assert config_class(step).__name__ == f"{step.capitalize()}Config"
    assert callable(runner(step))


def test_a_launched_step_does_its_work_and_leaves_a_record(source: Path, tmp_path: Path) -> None:
    word = encode({"seed": 3, "work": str(tmp_path / "w")})
    manifest = launch("preparation", word, fingerprint="f", run="r", source=str(source), target=str(tmp_path / "t"))
    assert read_manifest(tmp_path / "t") == manifest
    record = read_record(tmp_path / "w", "f")
    assert record is not None
    assert (record.step, record.fingerprint, record.run, record.status) == ("preparation", "f", "r", "done")
    assert (record.manifest_hash, record.target, record.error) == (manifest.hash, str(tmp_path / "t"), "")
    assert record.metrics == manifest.metrics
    assert (record.config["seed"], record.config["source"]) == (3, str(source))
    assert record.seconds >= 0
    assert read_record(tmp_path / "w", "g") is None


def test_values_given_by_name_stand_above_the_encoded_ones(source: Path, tmp_path: Path) -> None:
    word = encode({"seed": 3, "work": str(tmp_path / "w")})
    assert launch("preparation", word, source=str(source), target=str(tmp_path / "t"), seed=4).seed == 4


def test_an_error_that_a_person_can_mend_is_one_line_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    word = encode({"work": str(tmp_path / "w")})
    with pytest.raises(SystemExit) as ended:
        launch("preparation", word, fingerprint="f", source=str(tmp_path / "none"), target=str(tmp_path / "t"))
    assert ended.value.code == 1
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.startswith(f"cappy preparation: {tmp_path / 'none'}: ")
    assert written.err.count("\n") == 1
    record = read_record(tmp_path / "w", "f")
    assert record is not None
    assert (record.status, record.manifest_hash) == ("failed", "")
    assert f"cappy preparation: {record.error}\n" == written.err


def test_a_defect_keeps_its_traceback_and_leaves_a_record(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(config: object, progress: object) -> None:
        raise ZeroDivisionError("by us")

    monkeypatch.setattr("cappy.preparation.step.run", broken)
    with pytest.raises(ZeroDivisionError):
        launch("preparation", fingerprint="f", source=str(source), target=str(tmp_path / "t"), work=str(tmp_path / "w"))
    record = read_record(tmp_path / "w", "f")
    assert record is not None
    assert (record.status, record.error) == ("failed", "ZeroDivisionError: by us")


def test_a_record_without_a_fingerprint_is_named_by_the_process(source: Path, tmp_path: Path) -> None:
    launch("preparation", source=str(source), target=str(tmp_path / "t"), work=str(tmp_path / "w"))
    assert record_path(tmp_path / "w", f"preparation-{os.getpid()}").is_file()


def test_a_launched_step_tells_its_progress_to_a_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PROGRESS_VARIABLE, str(tmp_path))
    launch("preparation", source=str(source), target=str(tmp_path / "t"), work=str(tmp_path / "w"))
    state = read_state(tmp_path / "preparation.json")
    assert state is not None
    assert (state.done, state.total, state.unit) == (6, 6, "instances")


PARENT = """
import os, subprocess, sys
from pathlib import Path
from cappy.worker import hold_parent_lock
hold_parent_lock(Path(sys.argv[1]))
child = subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1]])
print(child.pid, flush=True)
child.wait()
"""
CHILD = """
import os, sys, time
from cappy import runs, worker
os.environ[runs.PARENT_VARIABLE] = sys.argv[1]
def endless(config, progress):
    from pathlib import Path
    Path(sys.argv[1] + ".started").touch()
    time.sleep(60)
worker.runner = lambda step: endless
worker.launch("preparation", target=sys.argv[1] + ".t", work=sys.argv[1] + ".w")
"""


def alive(pid: int) -> bool:
    """Whether the process runs; one that ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="tells the living from the dead by /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_step_dies_with_its_parent_however_it_ends(tmp_path: Path, how: signal.Signals) -> None:
    lock = tmp_path / "lock"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, lock, CHILD], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent:
        child = int(parent.stdout.readline())
        wait_until(Path(f"{lock}.started").exists, "the step's start", seconds=20)
        time.sleep(0.3)
        assert alive(child), "the step must live as long as its parent"
        os.kill(parent.pid, how)
        wait_until(lambda: not alive(child), "the step's end", seconds=20)
    assert PARENT_VARIABLE not in os.environ


TIDY = CHILD.replace("import os, sys, time", "import os, signal, sys, time").replace(
    "    time.sleep(60)",
    """    def tidy(number, frame):
        Path(sys.argv[1] + ".tidied").touch()
        os._exit(0)
    signal.signal(signal.SIGTERM, tidy)
    Path(sys.argv[1] + ".listens").touch()
    time.sleep(60)""",
)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="tells the living from the dead by /proc")
def test_a_step_whose_parent_was_killed_may_tidy_up_first(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, lock, TIDY], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent:
        child = int(parent.stdout.readline())
        wait_until(Path(f"{lock}.listens").exists, "the step to listen", seconds=20)
        os.kill(parent.pid, signal.SIGKILL)
        wait_until(lambda: not alive(child), "the step's end", seconds=20)
    assert Path(f"{lock}.tidied").exists()


def test_the_parents_lock_is_not_inherited_by_its_children(tmp_path: Path) -> None:
    descriptor = hold_parent_lock(tmp_path / "lock")
    try:
        assert not os.get_inheritable(descriptor)
    finally:
        os.close(descriptor)


def test_rates_count_only_what_this_start_did() -> None:
    state = ProgressState(done=60, total=100, unit="rows", resumed=40, started=10.0, updated=20.0)
    assert (state.per_second, state.seconds_left) == (2.0, 20.0)


@pytest.mark.parametrize(
    ("done", "total", "updated", "left"),
    [(5, None, 20.0, None), (0, 10, 20.0, None), (5, 10, 10.0, None), (12, 10, 20.0, 0.0)],
)
def test_the_time_left_is_known_only_with_a_total_and_a_rate(
    done: int, total: int | None, updated: float, left: float | None
) -> None:
    state = ProgressState(done=done, total=total, unit="rows", resumed=0, started=10.0, updated=updated)
    assert state.seconds_left == left


def test_progress_in_a_log_is_a_line_at_the_start_now_and_then_and_at_the_end() -> None:
    lines: list[str] = []
    progress = LogProgress(lines.append, seconds=3600)
    for done in range(4, 11):
        progress(done, 10, unit="updates", resumed=3, note="loss 1")
    assert [line.partition(",")[0] for line in lines] == ["4 of 10 updates (3 resumed)", "10 of 10 updates (3 resumed)"]
    assert lines[0].endswith("loss 1")


def test_progress_in_a_file_is_written_at_most_five_times_a_second_and_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    progress = FileProgress(path)
    assert read_state(path) is None
    progress(0, 1_000, unit="pairs", resumed=0)
    for done in range(1, 50):
        progress(done, 1_000, unit="pairs")
    state = read_state(path)
    assert state is not None
    assert (state.done, state.total, state.unit) == (0, 1_000, "pairs")
    progress(1_000, 1_000, unit="pairs", resumed=400)
    state = read_state(path)
    assert state is not None
    assert (state.done, state.resumed) == (1_000, 400)
    assert state.updated >= state.started
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.json"]


@pytest.mark.parametrize("word", ["{}", encode({"seed": "x"})])
def test_wrong_settings_are_one_line_and_status_1_before_anything_is_done(
    tmp_path: Path, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        launch("preparation", word, target=str(tmp_path / "t"), work=str(tmp_path / "w"))
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("cappy preparation: ")
    assert not (tmp_path / "t").exists()


def test_shards_of_a_step_leave_a_record_and_progress_each(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PROGRESS_VARIABLE, str(tmp_path))
    word = encode({"work": str(tmp_path / "w")})
    for shard in ("0/2", "1/2"):
        target = tmp_path / shard.replace("/", "-")
        launch("preparation", word, fingerprint="f", part=shard, run="r", source=str(source), target=str(target))
    assert {read_record(tmp_path / "w", f"f-{shard}") is not None for shard in ("0/2", "1/2")} == {True}
    assert read_record(tmp_path / "w", "f") is None
    assert read_state(progress_path(tmp_path, "preparation", "f-1/2")) is not None
    assert progress_path(tmp_path, "preparation", "f-0/2") != progress_path(tmp_path, "preparation", "f-1/2")


def test_a_step_that_takes_too_long_is_asked_to_end_and_says_why(tmp_path: Path) -> None:
    program = "import sys, time\nfrom cappy.worker import _start_timeout\n_start_timeout('sampling')\ntime.sleep(30)"
    environment = {**os.environ, TIMEOUT_VARIABLE: "0.2"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGTERM
    assert done.stderr.count("\n") == 1
    assert_names(done.stderr, "cappy sampling: ", "0.2 seconds", "more hours")


@pytest.mark.parametrize("kind", ["nvidia-l4", "tpu-v5e"])
def test_a_step_whose_accelerators_are_not_there_ends_at_its_start(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ACCELERATORS_VARIABLE, f"{kind}:2")
    monkeypatch.setattr(f"cappy.worker._count_{'tpus' if kind.startswith('tpu') else 'gpus'}", lambda: 1)
    with pytest.raises(SystemExit) as ended:
        launch("preparation", "", source="builtin", target=str(tmp_path / "target"))
    assert ended.value.code == 1
    assert_names(capsys.readouterr().err, "cappy preparation: ", f"2 {kind}", "sees 1", "image")
    assert not (tmp_path / "target").exists()
    monkeypatch.setenv(ACCELERATORS_VARIABLE, f"{kind}:1")
    check_accelerators()
