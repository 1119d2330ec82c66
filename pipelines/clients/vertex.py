"""Vertex AI Pipelines through google-cloud-aiplatform; what steps write is read from Cloud Logging."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cappy.errors import ConfigError
from cappy.redaction import redact
from pipelines.clients import RunState, State, TaskState, step_name
from pipelines.recipe import Vertex, refuse_nowhere

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
"""The last words of Vertex AI's PipelineState and PipelineTaskDetail.State -> ours."""
LOGGING = "https://logging.googleapis.com"
PAGE = 1000
REMEDIES = {
    401: "log in with `gcloud auth application-default login`",
    403: "grant yourself roles/aiplatform.user, and roles/iam.serviceAccountUser on the steps' service account",
    404: "check project, region and the run's id",
    429: "the quota is used up; wait, or ask for more in the console (IAM, Quotas)",
}


class VertexClient:
    """Vertex AI Pipelines of one project and region."""

    def __init__(self, place: Vertex) -> None:
        refuse_nowhere(place)
        try:
            from google.cloud import aiplatform

            from cappy.vertex import check_reachable
        except ModuleNotFoundError as missing:
            raise ConfigError(f"vertex: needs {missing.name}; pip install 'cappy-scorer[gcp]'") from missing
        self._place = place
        # The SDK tells a bucket that it may not look at with a traceback, and goes on.
        logging.getLogger("google.cloud.aiplatform.pipeline_jobs").setLevel(logging.CRITICAL)
        with self._translate_errors():
            aiplatform.init(project=place.project, location=place.region, **_elsewhere(place))
            # Asked for before the network is: who is not logged in reads that, online and offline.
            _ = aiplatform.initializer.global_config.credentials
            check_reachable(place.region, place.endpoint)
        self._sdk = aiplatform

    def submit(self, package: Path, arguments: Mapping[str, object], name: str) -> RunState:
        """Creates a pipeline job that has `name` as its id."""
        with self._translate_errors():
            job = self._sdk.PipelineJob(
                display_name=name,
                template_path=str(package),
                job_id=name,
                pipeline_root=f"{self._place.bucket}/pipeline",
                parameter_values=dict(arguments),
            )
            job.submit(service_account=self._place.service_account or None, network=self._place.network or None)
        return RunState(run=name, state="waiting", url=self._url(name))

    def look(self, run: str) -> RunState:
        """The job's state and that of each task."""
        with self._translate_errors():
            job = self._sdk.PipelineJob.get(run)
        resource = job.gca_resource
        tasks = tuple(task for task in map(_task, resource.job_detail.task_details) if task)
        return RunState(
            run=run,
            state=_state(resource.state.name),
            url=self._url(run),
            tasks=tasks,
            error=redact(resource.error.message) if resource.error else "",
        )

    def logs(self, run: str, step: str) -> Iterator[tuple[str, str]]:
        """What the steps' containers wrote, oldest first, from Cloud Logging (role logging.viewer)."""
        with self._translate_errors():
            details = self._sdk.PipelineJob.get(run).gca_resource.job_detail.task_details
        jobs = {
            detail.executor_detail.container_detail.main_job.rpartition("/")[2]: step_name(detail.task_name)
            for detail in details
            if detail.executor_detail.container_detail.main_job
        }
        wanted = {job: name for job, name in jobs.items() if step in ("", name)}
        if wanted:
            yield from self._entries(wanted)

    def cancel(self, run: str) -> None:
        """Asks Vertex AI to end the job."""
        with self._translate_errors():
            self._sdk.PipelineJob.get(run).cancel()

    def _entries(self, jobs: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        named = " OR ".join(f'"{job}"' for job in jobs)
        body = {
            "resourceNames": [f"projects/{self._place.project}"],
            "filter": f'resource.type="ml_job" AND resource.labels.job_id=({named})',
            "orderBy": "timestamp asc",
            "pageSize": PAGE,
        }
        while True:
            with self._translate_errors():
                answer = self._session().post(f"{self._logging_address}/v2/entries:list", json=body, timeout=60)
            if answer.status_code != 200:
                remedy = "grant yourself roles/logging.viewer, or look at the run's page"
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
        return self._place.endpoint or LOGGING

    def _session(self) -> "AuthorizedSession":
        from google.auth.transport import requests

        open_session: Callable[..., AuthorizedSession] = requests.AuthorizedSession
        return open_session(self._sdk.initializer.global_config.credentials)

    def _url(self, run: str) -> str:
        place = f"locations/{self._place.region}/runs/{run}?project={self._place.project}"
        return f"https://console.cloud.google.com/vertex-ai/{place}"

    def _translate_errors(self) -> contextlib.AbstractContextManager[None]:
        """What the service or the credentials refuse, and a service that does not answer, as one line."""
        from cappy.vertex import translate_errors

        return translate_errors("pipeline", self._place.project, self._place.region, REMEDIES)


def _elsewhere(place: Vertex) -> dict[str, str]:
    """A server that stands in for Vertex AI speaks REST."""
    return {"api_endpoint": place.endpoint, "api_transport": "rest"} if place.endpoint else {}


def _task(task: "PipelineTaskDetail") -> TaskState | None:
    """A task that is a step; the graph's own nodes run no container."""
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
