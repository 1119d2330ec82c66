"""Logs pipeline runs to MLflow: one parent run, and one nested run per step, each created once."""

import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from mlflow.entities import Metric, Param, RunTag

from cappy.config import DEFAULT_WORK, decode
from cappy.errors import CappyError
from cappy.google_cloud import fill_environment
from cappy.records.folder import MANIFEST
from cappy.registry.client import MlflowClient, connect, experiment_id, metric_key
from cappy.registry.models import RUN_TAG
from cappy.runs import PROGRESS_VARIABLE, RUN_PACKAGE_FILE, StepRecord, read_record
from cappy.steps import TRAINING_STEPS
from cappy.training.meter import TRAINING_LOG, read_curves

STEP_TAG = "cappy.step"
PIPELINE = "pipeline"
MAX_PARAM_CHARACTERS = 500
MAX_METRICS_PER_REQUEST = 1000
"""Metrics that MLflow accepts in one request."""


def track_run(fingerprints: Mapping[str, str], settings: str, *, run: str, state: str, created: str = "") -> None:
    """Tracks a pipeline run in the exit step of an orchestrator.

    `worker.launch` is not used here, so the secrets, such as MLflow's password, are read here. A CappyError ends the
    process with one line on stderr and status 1.
    """
    values = decode(settings)
    try:
        fill_environment()
        track(
            fingerprints,
            run=run,
            work=Path(values.get("work", DEFAULT_WORK)),
            tracking_uri=values.get("tracking_uri", ""),
            experiment=values.get("experiment", "cappy"),
            succeeded=state == "SUCCEEDED",
            created=_seconds(created),
        )
    except CappyError as error:
        sys.stderr.write(f"cappy tracking: {error}\n")
        raise SystemExit(1) from error


def track(
    fingerprints: Mapping[str, str],
    *,
    run: str,
    work: Path,
    tracking_uri: str = "",
    experiment: str = "cappy",
    succeeded: bool = True,
    created: float = 0.0,
) -> None:
    """Logs parameters, metrics, manifest and report of every step that has a record, and whether it was cached.

    `created`, in seconds of `time.time`, decides about steps that did not know their run: older ones were cached.
    """
    with connect(tracking_uri) as client:
        experiment_key = experiment_id(client, experiment, tracking_uri)
        parent = pipeline_run(client, experiment_key, run)
        for step, fingerprint in fingerprints.items():
            record = read_record(work, fingerprint)
            if record is None:
                continue
            executed = record.run == run if record.run else record.started >= created
            # A failed step of an earlier run says nothing about this one.
            if executed or record.status == "done":
                nested = step_run(client, experiment_key, run, step)
                _log_step(client, nested, record, cached=not executed)
                if step == "evaluation":
                    client.log_batch(parent, metrics=_metrics(record.metrics, record.started))
        run_folder = os.environ.get(PROGRESS_VARIABLE)
        if run_folder is not None:
            package_path = Path(run_folder) / RUN_PACKAGE_FILE
            if package_path.is_file():
                client.log_artifact(parent, str(package_path))
        if os.environ.get("MLFLOW_RUN_ID") != parent:
            client.set_terminated(parent, "FINISHED" if succeeded else "FAILED")


def attach(texts: Mapping[str, str], *, run: str, tracking_uri: str, facts: Mapping[str, str]) -> None:
    """Logs texts and facts to the MLflow run of a pipeline run, which is created if it is missing."""
    with connect(tracking_uri) as client:
        parent = pipeline_run(client, experiment_id(client, "cappy", tracking_uri), run)
        for name, text in texts.items():
            client.log_text(parent, text, name)
        for name, value in facts.items():
            client.set_tag(parent, f"cappy.{name}", value)


def pipeline_run(client: MlflowClient, experiment: str, run: str) -> str:
    """The id of a pipeline run's MLflow run: the one with its tag, else the one in MLFLOW_RUN_ID, else a new one."""
    run_id = _find_run(client, experiment, run, PIPELINE)
    if run_id is not None:
        return run_id
    injected = os.environ.get("MLFLOW_RUN_ID")
    tags = {RUN_TAG: run, STEP_TAG: PIPELINE}
    if injected:
        for name, value in tags.items():
            client.set_tag(injected, name, value)
        return injected
    return str(client.create_run(experiment, tags=tags, run_name=run).info.run_id)


def step_run(client: MlflowClient, experiment: str, run: str, step: str) -> str:
    """The id of a step's nested MLflow run, created if it is missing; without a pipeline run it has no parent."""
    if not run:
        return str(client.create_run(experiment, tags={STEP_TAG: step}, run_name=step).info.run_id)
    run_id = _find_run(client, experiment, run, step)
    if run_id is not None:
        return run_id
    parent = pipeline_run(client, experiment, run)
    tags = {"mlflow.parentRunId": parent, RUN_TAG: run, STEP_TAG: step}
    return str(client.create_run(experiment, tags=tags, run_name=step).info.run_id)


def _find_run(client: MlflowClient, experiment: str, run: str, step: str) -> str | None:
    query = f"tags.`{RUN_TAG}` = '{run}' and tags.`{STEP_TAG}` = '{step}'"
    runs = client.search_runs([experiment], filter_string=query, max_results=1)
    return str(runs[0].info.run_id) if runs else None


def _log_step(client: MlflowClient, run_id: str, record: StepRecord, *, cached: bool) -> None:
    params = [Param(name, str(value)[:MAX_PARAM_CHARACTERS]) for name, value in record.config.items()]
    tags = {"cappy.fingerprint": record.fingerprint, "cappy.manifest": record.manifest_hash}
    tags |= {"cappy.cached": "true", "cappy.cached_from": record.run} if cached else {"cappy.cached": "false"}
    tags |= {"cappy.error": record.error[:MAX_PARAM_CHARACTERS]} if record.error else {}
    # Parameters that are logged already are not overwritten: folders of a cached step differ between runs.
    logged_params = client.get_run(run_id).data.params
    client.log_batch(
        run_id,
        metrics=_metrics({**record.metrics, "seconds": 0.0 if cached else record.seconds}, record.started),
        params=[param for param in params if param.key not in logged_params],
        tags=[RunTag(name, value) for name, value in tags.items()],
    )
    _log_files(client, run_id, record)
    _log_curve(client, run_id, record)
    status = "FINISHED" if record.status == "done" else "FAILED"
    client.set_terminated(run_id, status, end_time=_milliseconds(record.started + record.seconds))


def _log_files(client: MlflowClient, run_id: str, record: StepRecord) -> None:
    """Logs the manifest, and the report of an evaluation, if the step's folder is accessible here."""
    folder = Path(record.target)
    if not (folder / MANIFEST).is_file():
        return
    client.log_artifact(run_id, str(folder / MANIFEST))
    if record.step == "evaluation":
        client.log_artifacts(run_id, str(folder), "report")


def _log_curve(client: MlflowClient, run_id: str, record: StepRecord) -> None:
    """Logs loss, learning rate, speed and the mean label of the picked responses of a training step, by update."""
    if record.step not in TRAINING_STEPS:
        return
    points = read_curves(Path(record.target), Path(str(record.config["work"])), record.manifest_hash)
    if points:
        client.log_artifact(run_id, str(Path(record.target) / TRAINING_LOG))
    time = _milliseconds(record.started)
    curve = [
        Metric(f"training_{name}", float(value), time, int(point["update"]))
        for point in points
        for name, value in point.items()
        if name != "update"
    ]
    for start in range(0, len(curve), MAX_METRICS_PER_REQUEST):
        client.log_batch(run_id, metrics=curve[start : start + MAX_METRICS_PER_REQUEST])


def _metrics(values: Mapping[str, float], started: float) -> list[Metric]:
    # Repeated calls use the same timestamp: MLflow drops duplicate points.
    return [Metric(metric_key(name), float(value), _milliseconds(started), 0) for name, value in values.items()]


def _seconds(created: str) -> float:
    """The time of `time.time` of an ISO 8601 text; 0 if it is not one."""
    try:
        time = datetime.fromisoformat(created)
    except ValueError:
        return 0.0
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)
