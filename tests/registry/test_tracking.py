"""Tracking: one parent, one nested run per step, the same however often it is told."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from wording import assert_names

from cappy.config import encode
from cappy.records import Instance, write
from cappy.registry import track_run
from cappy.runs import StepRecord, record_path
from cappy.training.meter import write_log, write_speed


def record(room: Any, step: str, fingerprint: str, run: str, status: str = "done", error: str = "") -> None:
    folder = room.folder / "artifacts" / fingerprint
    if status == "done":
        write(folder, [Instance(instance_id="1", instruction="Add.", references=("2",))], step=step)
    told = StepRecord(
        step=step,
        fingerprint=fingerprint,
        run=run,
        status=status,
        started=time.time() - 5,
        seconds=2.5,
        config={"seed": 3, "source": "long" * 1000, "work": str(room.folder / "work")},
        target=str(folder),
        manifest_hash="abc",
        metrics={"rougeL_scorer": 0.5},
        error=error,
    )
    path = record_path(room.folder / "work", fingerprint)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(told)))


def track(room: Any, fingerprints: dict[str, str], run: str, state: str = "SUCCEEDED") -> dict[str, Any]:
    """The MLflow runs of a pipeline run by step, after it was tracked."""
    from mlflow import MlflowClient

    settings = encode({"work": str(room.folder / "work"), "tracking_uri": room.uri})
    track_run(fingerprints, settings, run=run, state=state)
    client = MlflowClient(tracking_uri=room.uri)
    experiment = client.get_experiment_by_name("cappy")
    found = client.search_runs([experiment.experiment_id], filter_string=f"tags.`cappy.run` = '{run}'")
    by_step = {each.data.tags["cappy.step"]: each for each in found}
    assert len(by_step) == len(found)
    return by_step


def test_every_step_is_a_nested_run_with_what_it_did(room: Any) -> None:
    record(room, "preparation", "f1", "run-1")
    record(room, "evaluation", "f2", "run-1")
    runs = track(room, {"preparation": "f1", "evaluation": "f2", "promotion": "never ran"}, "run-1")
    assert set(runs) == {"pipeline", "preparation", "evaluation"}
    parent, evaluation = runs["pipeline"], runs["evaluation"]
    assert evaluation.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert evaluation.data.params["seed"] == "3"
    assert evaluation.data.metrics == {"rougeL_scorer": 0.5, "seconds": 2.5}
    assert evaluation.data.tags["cappy.cached"] == "false"
    assert parent.data.metrics == {"rougeL_scorer": 0.5}
    assert parent.info.status == "FINISHED"
    files = {path.name for path in Path(evaluation.info.artifact_uri.removeprefix("file://")).rglob("*")}
    assert {"manifest.json", "report"} <= files


def test_a_training_step_has_its_curves_once(room: Any) -> None:
    record(room, "finetuning", "f1", "run-1")
    points = [
        {"update": update, "loss": 1 / update, "rate": 1e-4, "pairs_per_second": 40.0, "padding_share": 0.0}
        for update in range(1, 601)
    ]
    write_log(room.folder / "artifacts" / "f1", [{"update": 600, "loss": 0.1, "pick": 0.7}], points, [])
    write_speed(room.folder / "work", "abc", points)
    from mlflow import MlflowClient

    for _ in range(2):
        run = track(room, {"finetuning": "f1"}, "run-1")["finetuning"]
        client = MlflowClient(tracking_uri=room.uri)
        loss = client.get_metric_history(run.info.run_id, "training_loss")
        assert [point.step for point in loss] == list(range(1, 601))
        assert loss[3].value == 0.25
        assert len(client.get_metric_history(run.info.run_id, "training_pairs_per_second")) == 600
        (pick,) = client.get_metric_history(run.info.run_id, "training_pick")
        assert (pick.step, pick.value) == (600, 0.7)


def test_told_twice_it_is_there_once(room: Any) -> None:
    record(room, "preparation", "f1", "run-1")
    first = track(room, {"preparation": "f1"}, "run-1")
    second = track(room, {"preparation": "f1"}, "run-1")
    assert {step: run.info.run_id for step, run in first.items()} == {
        step: run.info.run_id for step, run in second.items()
    }
    from mlflow import MlflowClient

    history = MlflowClient(tracking_uri=room.uri).get_metric_history(first["preparation"].info.run_id, "seconds")
    assert len(history) == 1


def test_a_step_from_the_cache_is_marked_with_the_run_that_did_it(room: Any) -> None:
    record(room, "preparation", "f1", "run-1")
    runs = track(room, {"preparation": "f1"}, "run-2")
    assert runs["preparation"].data.tags["cappy.cached"] == "true"
    assert runs["preparation"].data.tags["cappy.cached_from"] == "run-1"
    assert runs["preparation"].data.metrics["seconds"] == 0.0


def test_a_failed_step_is_a_failed_run_with_its_line(room: Any) -> None:
    record(room, "preparation", "f1", "run-1", status="failed", error="notes.jsonl:3: reference is empty")
    runs = track(room, {"preparation": "f1"}, "run-1", state="FAILED")
    assert runs["preparation"].info.status == "FAILED"
    assert runs["preparation"].data.tags["cappy.error"] == "notes.jsonl:3: reference is empty"
    assert runs["pipeline"].info.status == "FAILED"


def test_an_injected_run_is_joined_and_left_open(room: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from cappy.registry.client import connect, experiment_id

    with connect(room.uri) as client:
        outer = client.create_run(experiment_id(client, "cappy", room.uri)).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", outer)
    record(room, "preparation", "f1", "run-1")
    runs = track(room, {"preparation": "f1"}, "run-1")
    assert runs["pipeline"].info.run_id == outer
    assert runs["pipeline"].info.status == "RUNNING"


def test_mlflow_away_ends_the_exit_step_with_one_line(room: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        track_run({}, encode({"tracking_uri": "http://127.0.0.1:9"}), run="run-1")
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert_names(told, "cappy tracking: http://127.0.0.1:9", "--tracking-uri")
    assert told.count("\n") == 1


def artifacts(room: Any, run_id: str) -> dict[str, str]:
    """The text files of an MLflow run at its top."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=room.uri)
    names = [found.path for found in client.list_artifacts(run_id) if not found.is_dir]
    return {name: Path(client.download_artifacts(run_id, name)).read_text() for name in names}


def test_the_exit_step_keeps_the_compiled_pipeline_of_a_local_run(
    room: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pipeline.yaml").write_text("name: adapt\n")
    monkeypatch.setenv("CAPPY_PROGRESS", str(tmp_path))
    record(room, "preparation", "f1", "run-1")
    assert artifacts(room, track(room, {"preparation": "f1"}, "run-1")["pipeline"].info.run_id) == {
        "pipeline.yaml": "name: adapt\n"
    }


def test_what_a_submitter_attaches_and_what_steps_tell_are_one_run(room: Any) -> None:
    from cappy.registry import attach

    attach({"pipeline.yaml": "name: adapt\n"}, run="run-1", tracking_uri=room.uri, facts={"platform": "kubeflow"})
    record(room, "preparation", "f1", "run-1")
    parent = track(room, {"preparation": "f1"}, "run-1")["pipeline"]
    assert artifacts(room, parent.info.run_id) == {"pipeline.yaml": "name: adapt\n"}
    assert parent.data.tags["cappy.platform"] == "kubeflow"
    assert parent.info.status == "FINISHED"
