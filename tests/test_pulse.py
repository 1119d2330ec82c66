"""Has it a pulse: the whole of `cappy adapt` on a handful of built-in instances, killed on the way, then run again."""

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

from cappy.progress import read_state
from cappy.steps import STEP_SPECS

pytestmark = [pytest.mark.pulse, pytest.mark.timeout(600)]

SMALL = {
    "preparation.num_per_family": 2,
    "sampling.part_rows": 4,
    "finetuning.epochs": 2,
    "finetuning.batch_instances": 2,
    "finetuning.checkpoint_seconds": 0,
}
COMMAND = [
    *(sys.executable, "-c", "from cappy.cli import main; main()", "adapt", "--json"),
    *(word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")),
]
WAIT_SECONDS = 240.0


def parts(folder: Path, step: str) -> dict[str, int]:
    """Finished parts of a step's work -> when each was written, in nanoseconds."""
    notes = folder.glob(f".cappy/work/{step}/*/.part-*.json")
    return {str(note): note.stat().st_mtime_ns for note in notes}


def checkpoints(folder: Path) -> list[int]:
    """The updates of the loop that finished checkpoints hold."""
    return [int(path.name) for path in folder.glob(".cappy/work/finetuning/*/.checkpoints/0*")]


def written(folder: Path) -> dict[str, int]:
    """Every file below -> when it was written, in nanoseconds."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def kill_when(folder: Path, condition: Callable[[], bool], what: str) -> None:
    """Starts the command, kills it with SIGKILL as soon as the condition holds, and sees that nothing goes on."""
    log = folder / "killed.log"
    with log.open("wb") as output:
        process = subprocess.Popen(COMMAND, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        wait_until(condition, what, seconds=WAIT_SECONDS, process=process, details=log.read_text)
        assert process.poll() is None, log.read_text()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    time.sleep(1.0)
    before = written(folder)
    time.sleep(1.0)
    assert written(folder) == before, "an orphan goes on writing"


def test_a_run_killed_twice_finishes_without_doing_finished_work_again(tmp_path: Path) -> None:
    kill_when(tmp_path, lambda: len(parts(tmp_path, "sampling")) >= 2, "two sampled parts")
    killed_with = parts(tmp_path, "sampling")
    kill_when(tmp_path, lambda: len(checkpoints(tmp_path)) > 0, "a checkpoint of finetuning")
    # Two generations are kept, and after SIGTERM the step may have written the second.
    sampled, update = parts(tmp_path, "sampling"), min(checkpoints(tmp_path))
    assert len(sampled) > len(killed_with)
    assert {name: sampled[name] for name in killed_with} == killed_with, "a finished part was done again"

    second = subprocess.run(COMMAND, cwd=tmp_path, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert parts(tmp_path, "sampling") == sampled, "a finished part was done again"
    result = json.loads(second.stdout)
    finetuned = read_state(Path(result["log"]).with_name("finetuning.json"))
    assert finetuned is not None
    assert 0 < update <= finetuned.resumed < finetuned.done, "finetuning began anew"
    assert {"random", "longest", "likelihood_mean", "mbr", "scorer", "oracle"} <= set(result["selectors"])
    assert result["decision"] in ("promote", "hold")
    assert result["reasons"]
    assert (tmp_path / result["report"]).read_text().lstrip().lower().startswith("<!doctype html")
    assert result["serve"].startswith("cappy serve --scorer models:/cappy@")

    third = subprocess.run(COMMAND, cwd=tmp_path, capture_output=True, text=True)
    assert third.returncode == 0, third.stderr
    again = json.loads(third.stdout)
    assert set(again["from_cache"]) >= {"preparation", "sampling", "annotation", "finetuning", "evaluation"}
    assert again["version"] == result["version"], "the same scorer is not registered twice"
    _check_tracking(tmp_path, result["run"], again["run"])


def _check_tracking(folder: Path, *runs: str) -> None:
    """Every step is a nested run of its pipeline's run; those that the cache answered say so."""
    from cappy.registry.client import connect

    with connect(f"sqlite:///{folder}/.cappy/mlflow.db") as client:
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        for number, run in enumerate(runs):
            (parent,) = (
                result
                for result in client.search_runs(experiments, f"tags.`cappy.run` = '{run}'")
                if "mlflow.parentRunId" not in result.data.tags
            )
            nested = client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
            steps = {result.info.run_name.split()[0]: result for result in nested}
            assert set(steps) <= set(STEP_SPECS)
            assert set(steps) >= {"preparation", "sampling", "annotation", "finetuning", "evaluation", "registration"}
            cached = {name for name, result in steps.items() if result.data.tags.get("cappy.cached") == "true"}
            assert "sampling" in cached, "the second killed run had finished it"
            assert ("finetuning" in cached) == (number > 0)
            assert "registration" not in cached
            assert float(steps["evaluation"].data.metrics["num_instances"]) > 0


def test_pretrain_ends_with_a_registered_scorer_that_adapt_can_start_from(tmp_path: Path) -> None:
    small = {
        "preparation.num_per_family": 30,
        "preparation.families": '["tense_change", "sentiment"]',
        "sampling.strategy": "sampling8",
        "pretraining.epochs": 0.5,
        "pretraining.layers": 1,
    }
    command = [*COMMAND[:3], "pipeline", "run", "pretrain", "--json"]
    words = [word for name, value in small.items() for word in ("--set", f"{name}={value}")]
    done = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["version"], result["alias"]) == ("models:/cappy-pretrained/1", "challenger")
    assert result["serve"] == "cappy serve --scorer models:/cappy-pretrained/1"
    pair = ["--instruction", "Is it good?", "--response", "yes"]
    scored = subprocess.run(
        [*COMMAND[:3], "score", "--scorer", result["version"], *pair], cwd=tmp_path, capture_output=True, text=True
    )
    assert 0 < float(scored.stdout) < 1, scored.stderr
