"""Tracking: one parent, one nested run per step, the same however often it is logged."""

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


def record(env: Any, step: str, fingerprint: str, run: str, status: str = "done", error: str = "") -> None:
    folder = env.folder / "artifacts" / fingerprint
    if status == "done":
        write(folder, [Instance(instance_id="1", instruction="Add.", references=("2",))], step=step)
    actual = StepRecord(
        step=step,
        fingerprint=fingerprint,
        run=run,
        status=status,
        started=time.time() - 5,
        seconds=2.5,
        config={"seed": 3, "source": "long" * 1000, "work": str(env.folder / "work")},
        target=str(folder),
        manifest_hash="abc",
        metrics={"rougeL_scorer": 0.5},
        error=error,
    )
    path = record_path(env.folder / "work", fingerprint)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(actual)))


def track(
    env: Any, fingerprints: dict[str, str], run: str, state: str = "SUCCEEDED", created: str = ""
) -> dict[str, Any]:
    """The MLflow runs of a pipeline run by step, after it was tracked."""
    from mlflow import MlflowClient

    settings = encode({"work": str(env.folder / "work"), "tracking_uri": env.uri})
    track_run(fingerprints, settings, run=run, state=state, created=created)
    client = MlflowClient(tracking_uri=env.uri)
    experiment = client.get_experiment_by_name("cappy")
    result = client.search_runs([experiment.experiment_id], filter_string=f"tags.`cappy.run` = '{run}'")
    by_step = {each.data.tags["cappy.step"]: each for each in result}
    assert len(by_step) == len(result)
    return by_step


def test_every_step_is_a_nested_run_with_what_it_did(env: Any) -> None:
    record(env, "preparation", "f1", "run-1")
    record(env, "evaluation", "f2", "run-1")
    runs = track(env, {"preparation": "f1", "evaluation": "f2", "promotion": "never ran"}, "run-1")
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


def test_a_training_step_has_its_curves_once(env: Any) -> None:
    record(env, "finetuning", "f1", "run-1")
    points = [
        {"update": update, "loss": 1 / update, "rate": 1e-4, "pairs_per_second": 40.0, "padding_share": 0.0}
        for update in range(1, 601)
    ]
    write_log(env.folder / "artifacts" / "f1", [{"update": 600, "loss": 0.1, "pick": 0.7}], points, [])
    write_speed(env.folder / "work", "abc", points)
    from mlflow import MlflowClient

    for _ in range(2):
        run = track(env, {"finetuning": "f1"}, "run-1")["finetuning"]
        client = MlflowClient(tracking_uri=env.uri)
        loss = client.get_metric_history(run.info.run_id, "training_loss")
        assert [point.step for point in loss] == list(range(1, 601))
        assert loss[3].value == 0.25
        assert len(client.get_metric_history(run.info.run_id, "training_pairs_per_second")) == 600
        (pick,) = client.get_metric_history(run.info.run_id, "training_pick")
        assert (pick.step, pick.value) == (600, 0.7)


def test_reported_twice_it_is_there_once(env: Any) -> None:
    record(env, "preparation", "f1", "run-1")
    first = track(env, {"preparation": "f1"}, "run-1")
    second = track(env, {"preparation": "f1"}, "run-1")
    assert {step: run.info.run_id for step, run in first.items()} == {
        step: run.info.run_id for step, run in second.items()
    }
    from mlflow import MlflowClient

    history = MlflowClient(tracking_uri=env.uri).get_metric_history(first["preparation"].info.run_id, "seconds")
    assert len(history) == 1


def test_a_step_that_did_not_know_its_run_belongs_to_it_if_it_started_later(env: Any) -> None:
    """As on Vertex AI, where only the exit step knows the run."""
    record(env, "preparation", "f1", run="")
    record(env, "sampling", "f2", run="", status="failed", error="no memory")
    now = time.time()

    def iso(seconds: float) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))

    fingerprints = {"preparation": "f1", "sampling": "f2"}
    runs = track(env, fingerprints, "job-1", created=iso(now - 60))
    assert runs["preparation"].data.tags["cappy.cached"] == "false"
    assert runs["sampling"].info.status == "FAILED"
    later = track(env, fingerprints, "job-2", created=iso(now + 60))
    assert later["preparation"].data.tags["cappy.cached"] == "true"
    assert "sampling" not in later


def test_a_step_from_the_cache_is_marked_with_the_run_that_did_it(env: Any) -> None:
    record(env, "preparation", "f1", "run-1")
    runs = track(env, {"preparation": "f1"}, "run-2")
    assert runs["preparation"].data.tags["cappy.cached"] == "true"
    assert runs["preparation"].data.tags["cappy.cached_from"] == "run-1"
    assert runs["preparation"].data.metrics["seconds"] == 0.0


def test_a_failed_step_is_a_failed_run_with_its_line(env: Any) -> None:
    record(env, "preparation", "f1", "run-1", status="failed", error="notes.jsonl:3: reference is empty")
    runs = track(env, {"preparation": "f1"}, "run-1", state="FAILED")
    assert runs["preparation"].info.status == "FAILED"
    assert runs["preparation"].data.tags["cappy.error"] == "notes.jsonl:3: reference is empty"
    assert runs["pipeline"].info.status == "FAILED"


def test_an_injected_run_is_joined_and_left_open(env: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from cappy.registry.client import connect, experiment_id

    with connect(env.uri) as client:
        outer = client.create_run(experiment_id(client, "cappy", env.uri)).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", outer)
    record(env, "preparation", "f1", "run-1")
    runs = track(env, {"preparation": "f1"}, "run-1")
    assert runs["pipeline"].info.run_id == outer
    assert runs["pipeline"].info.status == "RUNNING"


def test_mlflow_away_ends_the_exit_step_with_one_line(env: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        track_run({}, encode({"tracking_uri": "http://127.0.0.1:9"}), run="run-1")
    assert ended.value.code == 1
    actual = capsys.readouterr().err
    assert_names(actual, "cappy tracking: http://127.0.0.1:9", "--tracking-uri")
    assert actual.count("\n") == 1


def artifacts(env: Any, run_id: str) -> dict[str, str]:
    """The text files of an MLflow run at its top."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=env.uri)
    names = [result.path for result in client.list_artifacts(run_id) if not result.is_dir]
    return {name: Path(client.download_artifacts(run_id, name)).read_text() for name in names}


def test_the_exit_step_keeps_the_compiled_pipeline_of_a_local_run(
    env: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pipeline.yaml").write_text("name: adapt\n")
    monkeypatch.setenv("CAPPY_PROGRESS", str(tmp_path))
    record(env, "preparation", "f1", "run-1")
    assert artifacts(env, track(env, {"preparation": "f1"}, "run-1")["pipeline"].info.run_id) == {
        "pipeline.yaml": "name: adapt\n"
    }


def test_what_a_submitter_attaches_and_what_steps_tell_are_one_run(env: Any) -> None:
    from cappy.registry import attach

    attach({"pipeline.yaml": "name: adapt\n"}, run="run-1", tracking_uri=env.uri, facts={"platform": "kubeflow"})
    record(env, "preparation", "f1", "run-1")
    parent = track(env, {"preparation": "f1"}, "run-1")["pipeline"]
    assert artifacts(env, parent.info.run_id) == {"pipeline.yaml": "name: adapt\n"}
    assert parent.data.tags["cappy.platform"] == "kubeflow"
    assert parent.info.status == "FINISHED"
