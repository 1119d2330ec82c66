"""Local runs: what a person sees, what comes from the cache, and that nothing outlives its parent."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from waiting import wait_until
from wording import assert_names, raises_naming

from cappy.cli.pipeline import with_fresh
from cappy.config import decode
from cappy.errors import CappyError, ConfigError
from cappy.records import read, read_manifest
from cappy.runs import read_record
from pipelines.clients.local import LocalClient
from pipelines.local import RunOutcome, execute, run_recipe
from pipelines.recipe import check_recipe
from pipelines.submission import Submission

MakeUp = Callable[..., Submission]
TARGET = "made_pipeline:made_up"


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., RunOutcome]:
    """start(submission) runs it under tmp_path."""

    def started(submission: Submission, show: bool = False) -> RunOutcome:
        return execute(TARGET, submission, work=tmp_path / "work-python3", root=tmp_path / "root", show=show)

    return started


def test_a_second_run_comes_from_the_cache_and_another_fingerprint_runs_again(
    made_up: MakeUp, start: Callable[..., RunOutcome], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = start(made_up(), show=True)
    assert set(first.outputs) == set(first.seconds) == {"preparation", "annotation"}
    assert first.cached == frozenset()
    for folder in first.outputs.values():
        assert read_manifest(folder).rows == 1
    record = read_record(tmp_path / "work-python3", "1" * 8)
    assert record is not None
    assert record.run == first.run_id
    actual = capfd.readouterr()
    assert actual.out == ""
    assert str(first.log) in actual.err
    assert "preparation: done, 10 rows" in actual.err

    second = start(made_up(), show=True)
    assert second.run_id != first.run_id
    assert second.cached == {"preparation", "annotation"}
    assert second.outputs == first.outputs
    assert (tmp_path / "beat.state").read_text() == f"SUCCEEDED {second.run_id}"
    assert_names(capfd.readouterr().err, "annotation: ", "cache")

    assert start(made_up(two="3" * 8)).cached == {"preparation"}


def test_a_failing_step_says_its_own_line(made_up: MakeUp, start: Callable[..., RunOutcome], tmp_path: Path) -> None:
    with pytest.raises(CappyError) as caught:
        start(made_up(second={"fail": "mend"}))
    assert str(caught.value) == "annotation: notes.jsonl:3: reference is empty; give it a text"
    assert (tmp_path / "beat.state").read_text().startswith("FAILED")


def test_a_defect_shows_the_end_of_the_steps_own_log(
    made_up: MakeUp, start: Callable[..., RunOutcome], capfd: pytest.CaptureFixture[str]
) -> None:
    with raises_naming(CappyError, "preparation: ZeroDivisionError: a defect of ours", "run.log"):
        start(made_up(first={"fail": "defect"}), show=True)
    actual = capfd.readouterr().err
    assert "Traceback" in actual or 'raise ZeroDivisionError("a defect of ours")' in actual
    assert "farewell" not in actual


def test_a_killed_step_is_said_to_be_killed(made_up: MakeUp, start: Callable[..., RunOutcome]) -> None:
    with raises_naming(CappyError, "annotation: ", "killed"):
        start(made_up(second={"fail": "killed"}))


def test_a_folder_that_kfp_would_mangle_is_refused(made_up: MakeUp, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="python3"):
        execute(TARGET, made_up(), work=tmp_path / "work-python3", root=tmp_path / "python3.11" / "root", show=False)


def test_an_argument_that_kfp_would_mangle_is_refused(made_up: MakeUp, start: Callable[..., RunOutcome]) -> None:
    with pytest.raises(ConfigError, match=r"^one: .*'python3'"):
        start(made_up(one="python3"))


def test_two_runs_at_once_in_one_folder_do_not_disturb_each_other(
    made_up: MakeUp, start: Callable[..., RunOutcome], tmp_path: Path
) -> None:
    with _other_process(tmp_path, made_up(one="5" * 8, two="6" * 8, first={"seconds": 0.5})) as other:
        mine = start(made_up(first={"seconds": 0.5}))
        assert other.wait(30) == 0
    assert mine.cached == frozenset()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_the_process_that_started_the_run(
    made_up: MakeUp, tmp_path: Path, number: signal.Signals
) -> None:
    beat = tmp_path / "beat"
    with _other_process(tmp_path, made_up(first={"seconds": 60})) as parent:
        wait_until(beat.exists, "the first sign of the step", seconds=20)
        parent.send_signal(number)
        parent.wait(10)
        time.sleep(1.0)
        last = beat.read_text()
        time.sleep(0.5)
        assert beat.read_text() == last
    assert _processes(tmp_path) == []


def _processes(folder: Path) -> list[str]:
    """Command lines of living processes that have the folder in their environment."""
    result = []
    for process in Path("/proc").iterdir():
        try:
            environment, line = (process / "environ").read_bytes(), (process / "cmdline").read_bytes()
        except OSError:
            continue
        if str(folder / "beat").encode() in environment and line and process.name != str(os.getpid()):
            result.append(line.decode(errors="replace"))
    return result


class _other_process:  # noqa: N801 (read as a verb in a with statement)
    """The same run in a process of its own, ended at the end of the block."""

    def __init__(self, folder: Path, submission: Submission, *, background: bool = False) -> None:
        # What a script starts with an ampersand ignores SIGINT.
        ignored = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" if background else ""
        program = (
            f"{ignored}"
            "from pathlib import Path\n"
            "from pipelines.local import execute\n"
            "from pipelines.submission import Submission\n"
            f"execute({TARGET!r}, {submission!r}, work=Path({str(folder / 'work-python3')!r}), "
            f"root=Path({str(folder / 'root')!r}), show=False)\n"
        )
        self.process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)

    def __enter__(self) -> "subprocess.Popen[bytes]":
        return self.process

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.mark.parametrize("background", [False, True])
def test_another_terminal_sees_how_far_a_run_is_and_can_end_it(
    made_up: MakeUp, start: Callable[..., RunOutcome], tmp_path: Path, background: bool
) -> None:
    client = LocalClient(tmp_path / "root" / "runs")
    over = start(made_up())
    state = client.get_state(over.run_id)
    assert (state.state, [(task.step, task.state) for task in state.tasks]) == (
        "done",
        [("preparation", "done"), ("annotation", "done")],
    )
    assert any("annotation" in line for _, line in client.logs(over.run_id, "annotation"))
    with raises_naming(ConfigError, over.run_id, "has ended"):
        client.cancel(over.run_id)
    slow = made_up(one="7" * 8, first={"seconds": 60, "fail": "asked to end"})
    with _other_process(tmp_path, slow, background=background) as other:
        folder = tmp_path / "root" / "runs"
        (run,) = wait_until(
            lambda: {path.name for path in folder.iterdir()} - {over.run_id}, "the run's folder", seconds=30
        )
        request = folder / run / "request.json"
        wait_until(lambda: request.is_file() and client.get_state(run).state == "running", f"{run} to run", seconds=30)
        wait_until((tmp_path / "beat").exists, "the first sign of the step", seconds=30)
        client.cancel(run)
        assert other.wait(30) == -signal.SIGINT  # KeyboardInterrupt; the command line makes one line of it.
    assert (tmp_path / "beat.checkpoint").exists()
    assert _processes(tmp_path) == []
    assert client.get_state(run).state == "cancelled"
    with raises_naming(ConfigError, "nope: ", f"last one is {run}"):
        client.get_state("nope")


def test_shards_have_names_and_caches_of_their_own_and_an_edited_input_is_never_answered_from_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"Add {index} and 1.", "responses": ["2", "3"]} for index in range(4)]
    parameters = {"source": str(file), "scorer": "builtin:tiny"}
    work = str(tmp_path / "work")
    recipe = check_recipe({"pipeline": "batch_score", "shards": 2, "parameters": parameters, "work": work})

    def once() -> RunOutcome:
        file.write_text("\n".join(map(json.dumps, rows)))
        return run_recipe(recipe, root=tmp_path / "root", show=False)

    def gathered(outcome: RunOutcome) -> list[str]:
        return [instance.instruction for instance in read(outcome.outputs["gathering"])]

    first = once()
    shards = {f"scoring {index}/2" for index in range(2)}
    assert set(first.outputs) == {"preparation", *shards, "gathering"}
    assert gathered(first) == [row["instruction"] for row in rows]
    assert (first.folder / "pipeline.yaml").read_text().startswith("# PIPELINE DEFINITION")
    second = once()
    assert second.cached == set(first.outputs)
    assert second.outputs == first.outputs
    rows[0]["instruction"] = "Add 9 and 1."
    edited = once()
    assert edited.cached == frozenset()
    assert gathered(edited) == [row["instruction"] for row in rows]


def test_a_failed_shard_says_its_own_line_and_which_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "Add 1 and 1.", "responses": ["2"]}) + "\n")
    (tmp_path / "scorer").mkdir()
    (tmp_path / "scorer" / "notes.txt").write_text("no scorer")
    parameters = {"source": str(tmp_path / "rows.jsonl"), "scorer": str(tmp_path / "scorer")}
    work = str(tmp_path / "work")
    recipe = check_recipe({"pipeline": "batch_score", "shards": 2, "parameters": parameters, "work": work})
    with pytest.raises(CappyError) as caught:
        run_recipe(recipe, root=tmp_path / "root")
    assert str(caught.value).startswith(f"scoring 0/2: {tmp_path / 'scorer'}: ")
    assert_names(str(caught.value), "manifest.json", "config.json", "scorer")
    assert "whole log" not in str(caught.value)
    assert "Executing task" not in capfd.readouterr().err


def test_a_fresh_start_that_was_ended_goes_on_under_its_name_and_a_new_one_does_not_find_kfps_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps find by the name what they finished; see tests/records/test_work.py."""
    monkeypatch.chdir(tmp_path)
    cache, names, ends = tmp_path / "work/cache", [], iter([False, True, True, True])

    def played(request: object, submission: Submission, **rest: object) -> None:
        settings = [decode(str(submission.arguments[f"{step}_settings"])) for step in ("preparation", "scoring")]
        (name,) = {each.get("fresh", "") for each in settings}
        names.append((name, cache.exists(), submission.fingerprints["scoring"]))
        cache.mkdir(parents=True, exist_ok=True)
        if not next(ends):
            raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.local.execute", played)
    plain = check_recipe(
        {
            "pipeline": "batch_score",
            "parameters": {"source": "builtin", "scorer": "builtin:tiny"},
            "work": str(tmp_path / "work"),
        }
    )
    with pytest.raises(KeyboardInterrupt):
        run_recipe(with_fresh(plain))
    run_recipe(with_fresh(plain))
    run_recipe(with_fresh(plain))
    run_recipe(plain)
    first, again, new, last = names
    assert first == (first[0], False, first[2])
    assert again == (first[0], True, first[2]), "the same command once more"
    assert new[0] not in ("", first[0])
    assert not new[1]
    assert last[0] == ""
    assert last[2] not in (first[2], new[2]), "a plain run has records of its own"
    assert not list((tmp_path / "work/unfinished").iterdir())


def test_no_password_of_a_setting_is_written_down_with_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written: list[object] = []
    monkeypatch.setattr("pipelines.local.prepare", lambda *rest, **more: None)  # It would ask that address.
    monkeypatch.setattr("pipelines.local.execute", lambda request, *rest, **more: written.append(request))
    address = "http://anna:pw-4711@127.0.0.1:9"
    settings = {"registration": {"tracking_uri": address, "name": "mine"}}
    recipe = check_recipe({"pipeline": "adapt", "settings": settings, "tracking_uri": address, "work": str(tmp_path)})
    run_recipe(recipe)
    assert "pw-4711" not in str(written)
    assert "mine" in str(written)
