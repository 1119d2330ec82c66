"""Client for Vertex AI Pipelines, through google-cloud-aiplatform; logs of the steps come from Cloud Logging."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cappy.errors import ConfigError
from cappy.redaction import redact
from pipelines.clients import RunState, State, TaskState, step_name
from pipelines.recipe import Vertex, refuse_missing_address

if TYPE_CHECKING:
    from google.auth.transport.requests import AuthorizedSession
    from google.cloud.aiplatform_v1.types import PipelineTaskDetail

STATES: Mapping[str, State] = {
    "PENDING": "waiting",
    "QUEUED": "waiting",
    "RUNNING": "running",
    "CANCEL_PENDING": "running",
    "CANCELLING": "running",
    "PAUSED": "waiting",
    "SUCCEEDED": "done",
    "SKIPPED": "cached",  # PipelineTaskDetail: skipped due to a cache hit.
    "NOT_TRIGGERED": "skipped",
    "FAILED": "failed",
    "CANCELLED": "cancelled",
}
"""Vertex AI's PipelineState (without its prefix) and PipelineTaskDetail.State -> ours."""
LOGGING = "https://logging.googleapis.com"
PAGE_SIZE = 1000
REMEDIES = {
    401: "log in with `gcloud auth application-default login`",
    403: "grant yourself roles/aiplatform.user, and roles/iam.serviceAccountUser on the steps' service account",
    404: "check project, region and the run's id",
    429: "the quota is used up; wait, or request more in the console (IAM, Quotas)",
}


class VertexClient:
    """Client of Vertex AI Pipelines in one project and region."""

    def __init__(self, config: Vertex) -> None:
        refuse_missing_address(config)
        try:
            from google.cloud import aiplatform

            from cappy.google_cloud import check_reachable
        except ModuleNotFoundError as missing:
            raise ConfigError(f"vertex: needs {missing.name}; pip install 'cappy-scorer[gcp]'") from missing
        self._config = config
        # The SDK logs a traceback for a bucket without read access, and continues.
        logging.getLogger("google.cloud.aiplatform.pipeline_jobs").setLevel(logging.CRITICAL)
        with self._translate_errors():
            aiplatform.init(project=config.project, location=config.region, **_endpoint_options(config))
            # Load credentials before using the network, so that a missing login is reported first, even offline.
            _ = aiplatform.initializer.global_config.credentials
            check_reachable(config.region, config.endpoint)
        self._sdk = aiplatform

    def submit(self, package: Path, arguments: Mapping[str, object], name: str) -> RunState:
        """Creates a pipeline job with `name` as its id."""
        with self._translate_errors():
            job = self._sdk.PipelineJob(
                display_name=name,
                template_path=str(package),
                job_id=name,
                pipeline_root=f"{self._config.bucket}/pipeline",
                parameter_values=dict(arguments),
            )
            job.submit(service_account=self._config.service_account or None, network=self._config.network or None)
        return RunState(run=name, state="waiting", url=self._url(name))

    def get_state(self, run: str) -> RunState:
        """The state of the job and of each task."""
        with self._translate_errors():
            job = self._sdk.PipelineJob.get(run)
        resource = job.gca_resource
        tasks = tuple(task for task in map(_task_state, resource.job_detail.task_details) if task)
        return RunState(
            run=run,
            state=_state(resource.state.name),
            url=self._url(run),
            tasks=tasks,
            error=redact(resource.error.message) if resource.error else "",
        )

    def logs(self, run: str, step: str) -> Iterator[tuple[str, str]]:
        """Yields log lines of the steps' containers, oldest first, from Cloud Logging (needs role logging.viewer)."""
        with self._translate_errors():
            details = self._sdk.PipelineJob.get(run).gca_resource.job_detail.task_details
        jobs = {
            detail.executor_detail.container_detail.main_job.rpartition("/")[2]: step_name(detail.task_name)
            for detail in details
            if detail.executor_detail.container_detail.main_job
        }
        selected_jobs = {job: name for job, name in jobs.items() if step in ("", name)}
        if selected_jobs:
            yield from self._read_entries(selected_jobs)

    def cancel(self, run: str) -> None:
        """Asks Vertex AI to cancel the job."""
        with self._translate_errors():
            self._sdk.PipelineJob.get(run).cancel()

    def _read_entries(self, jobs: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        job_ids = " OR ".join(f'"{job}"' for job in jobs)
        body = {
            "resourceNames": [f"projects/{self._config.project}"],
            "filter": f'resource.type="ml_job" AND resource.labels.job_id=({job_ids})',
            "orderBy": "timestamp asc",
            "pageSize": PAGE_SIZE,
        }
        while True:
            with self._translate_errors():
                answer = self._session().post(f"{self._logging_address}/v2/entries:list", json=body, timeout=60)
            if answer.status_code != 200:
                remedy = "grant yourself roles/logging.viewer, or open the run's page"
                raise ConfigError(f"vertex: Cloud Logging answered {answer.status_code}; {remedy}")
            values = answer.json()
            for entry in values.get("entries", ()):
                job = entry["resource"]["labels"].get("job_id", "")
                text = entry.get("textPayload") or entry.get("jsonPayload", {}).get("message", "")
                yield from ((job, f"{jobs.get(job, '')}: {redact(line)}") for line in text.splitlines())
            if not values.get("nextPageToken"):
                return
            body["pageToken"] = values["nextPageToken"]

    @property
    def _logging_address(self) -> str:
        return self._config.endpoint or LOGGING

    def _session(self) -> "AuthorizedSession":
        from google.auth.transport import requests

        open_session: Callable[..., AuthorizedSession] = requests.AuthorizedSession
        return open_session(self._sdk.initializer.global_config.credentials)

    def _url(self, run: str) -> str:
        path = f"locations/{self._config.region}/runs/{run}?project={self._config.project}"
        return f"https://console.cloud.google.com/vertex-ai/{path}"

    def _translate_errors(self) -> contextlib.AbstractContextManager[None]:
        """Translates errors of the service, the credentials and the network to errors with a remedy."""
        from cappy.google_cloud import translate_errors

        return translate_errors("pipeline", self._config.project, self._config.region, REMEDIES)


def _endpoint_options(config: Vertex) -> dict[str, str]:
    """Options for a custom endpoint, which must accept REST."""
    return {"api_endpoint": config.endpoint, "api_transport": "rest"} if config.endpoint else {}


def _task_state(task: "PipelineTaskDetail") -> TaskState | None:
    """The state of a task; None for nodes of the graph itself, which run no container."""
    if not task.executor_detail.container_detail.main_job and task.state.name not in ("SKIPPED", "NOT_TRIGGERED"):
        return None
    start, end = task.start_time, task.end_time
    seconds = (end - start).total_seconds() if start and end and end > start else 0.0
    return TaskState(
        step=step_name(task.task_name),
        state=_state(task.state.name),
        seconds=seconds,
        error=redact(task.error.message) if task.error else "",
    )


def _state(name: str) -> State:
    return STATES.get(name.removeprefix("PIPELINE_STATE_"), "waiting")
