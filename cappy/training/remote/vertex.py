"""Runs training steps as Vertex AI CustomJobs, with the SDK (google-cloud-aiplatform 1.165 and later, or 2.x).

Vertex AI starts the same command on every machine and describes the machines in CLUSTER_SPEC, which `topology` reads;
the command then launches a rank per accelerator. The first machine is one worker pool, the others are a second one.

Logs are read with the REST API of Cloud Logging, whose client library is not installed; without permission, the step
continues and logs where to read them. Progress is read from a file on the volume.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from cappy.config import encode, to_values
from cappy.errors import ConfigError, UnansweredError, quote
from cappy.training.remote.following import FINAL_PHASES, Phase, Status
from cappy.training.settings import TrainingSettings

try:
    from google.api_core.exceptions import GoogleAPIError, RetryError, ServerError, TooManyRequests
    from google.auth.exceptions import GoogleAuthError
    from google.auth.transport.requests import AuthorizedSession
    from google.cloud import aiplatform
    from google.cloud.aiplatform.utils import console_utils
    from google.cloud.aiplatform_v1.types import JobState, Scheduling
    from google.rpc.status_pb2 import Status as JobError  # type: ignore[import-untyped]
    from requests.exceptions import RequestException

    from cappy.google_cloud import silence_sdk, translate_errors
except ModuleNotFoundError as missing:
    raise ConfigError(f"--launcher customjob: needs {missing.name}; pip install 'cappy-scorer[gcp]'") from missing

PHASES = {
    JobState.JOB_STATE_SUCCEEDED: Phase.SUCCEEDED,
    JobState.JOB_STATE_PARTIALLY_SUCCEEDED: Phase.FAILED,
    JobState.JOB_STATE_FAILED: Phase.FAILED,
    JobState.JOB_STATE_EXPIRED: Phase.FAILED,
    JobState.JOB_STATE_CANCELLED: Phase.CANCELLED,
    JobState.JOB_STATE_RUNNING: Phase.RUNNING,
    JobState.JOB_STATE_UPDATING: Phase.RUNNING,
    JobState.JOB_STATE_CANCELLING: Phase.RUNNING,
}
"""All other states are pending: queued, pending, paused, unspecified."""
PREEMPTION_CODES = (10, 14)
"""Error codes (google.rpc.Code) of a job that lost its machines: ABORTED, UNAVAILABLE."""
LOGGING_URL = "https://logging.googleapis.com"
PAGE_SIZE = 1000
IMAGE_ERROR_WORDS = ("image", "pull")
"""An error message with both words means that the image cannot be pulled."""


def worker_pools(
    step: str,
    config: TrainingSettings,
    *,
    image: str,
    machine_type: str,
    accelerator_type: str = "",
    environment: Mapping[str, str] | None = None,
    volume: str = "",
) -> list[dict[str, object]]:
    """The worker pools of a step on `config.nodes` machines with `config.devices` accelerators each.

    Source, target and work must be on a file system that every machine mounts and that supports locks and renames, such
    as NFS; `volume`, SERVER:/export:/mnt/nfs/name, is mounted for that. The image must have cappy installed and no
    entry point of its own. A TPU is part of the machine type.

    Raises ConfigError if a path is relative, if a machine has several ranks but no accelerator, or if JAX would train
    on several machines.
    """
    if config.parallelism == "jax" and config.nodes > 1:
        raise ConfigError(
            f"{step}: --parallelism jax runs on one machine, but {config.nodes} were requested; give --nodes 1"
        )
    for name in ("source", "target", "work"):
        if not getattr(config, name).is_absolute():
            remedy = "give an absolute path on a file system that all machines mount, such as NFS"
            raise ConfigError(f"{step}: --{name} {getattr(config, name)}: is not an absolute path; {remedy}")
    if config.devices > 1 and not accelerator_type and config.parallelism != "jax":
        remedy = "give accelerator_type, or --devices 1"
        raise ConfigError(f"{step}: {config.devices} devices per machine but no accelerator; {remedy}")
    machine: dict[str, object] = {"machine_type": machine_type}
    if accelerator_type:
        machine |= {"accelerator_type": accelerator_type, "accelerator_count": config.devices}
    container = {
        "image_uri": image,
        "command": ["python", "-m", "cappy.training"],
        "args": [step, encode(to_values(config))],
        "env": [{"name": name, "value": value} for name, value in (environment or {}).items()],
    }
    pool: dict[str, object] = {"machine_spec": machine, "container_spec": container}
    if volume:
        server, export, folder = volume.split(":")
        pool["nfs_mounts"] = [{"server": server, "path": export, "mount_point": folder.removeprefix("/mnt/nfs/")}]
    other_machines = [{**pool, "replica_count": config.nodes - 1}] if config.nodes > 1 else []
    return [{**pool, "replica_count": 1}, *other_machines]


class CustomJobs:
    """The CustomJobs of one step: `config` has the settings of the platform, `job_config` those of each machine."""

    def __init__(
        self, step: str, config: TrainingSettings, job_config: TrainingSettings, environment: Mapping[str, str]
    ) -> None:
        self.step, self.config, self.settings = step, config, config.customjob
        self.pools = worker_pools(
            step,
            job_config,
            image=config.image,
            machine_type=self.settings.machine,
            accelerator_type=self.settings.accelerator,
            environment=environment,
            volume=self.settings.volume,
        )
        self.resource_name = ""
        self.logging_url = LOGGING_URL
        self._last_timestamp = "1970-01-01T00:00:00Z"
        self._seen_entries: set[str] = set()
        self._log_readable = True
        silence_sdk()
        with self._translate_errors():
            aiplatform.init(
                project=self.settings.project, location=self.settings.region, staging_bucket=self.settings.bucket
            )

    def status(self, name: str) -> Status | None:
        """The status of the newest job of this name; None if there is none."""
        with self._translate_errors(TooManyRequests):
            job = self._newest(name)
            return None if job is None else read_status(job.state, job.error)

    def submit(self, name: str) -> None:
        """Creates the job; Vertex AI keeps ended jobs of the same name."""
        with self._translate_errors():
            job = aiplatform.CustomJob(display_name=name, worker_pool_specs=self.pools)
            job.submit(
                service_account=self.config.service_account or None,
                network=self.settings.network or None,
                timeout=int(self.config.timeout_hours * 3600),
                # If one rank is lost, the others only wait for it, so all must restart from the checkpoint.
                restart_job_on_worker_restart=self.config.nodes > 1,
                scheduling_strategy=Scheduling.Strategy.SPOT if self.settings.spot else None,
            )
            self.resource_name = job.resource_name

    def lines(self, name: str) -> Iterator[tuple[str, str]]:
        """New log lines of the job's machines from Cloud Logging, some seconds late (needs roles/logging.viewer)."""
        job_id = self.resource_name.rpartition("/")[2]
        if not (job_id and self._log_readable):
            return
        query = f'resource.type="ml_job" AND resource.labels.job_id="{job_id}" AND timestamp>="{self._last_timestamp}"'
        body = {"resourceNames": [f"projects/{self.settings.project}"], "filter": query, "pageSize": PAGE_SIZE}
        for entry in self._entries({**body, "orderBy": "timestamp asc"}):
            if entry["insertId"] in self._seen_entries:
                continue
            self._seen_entries.add(entry["insertId"])
            self._last_timestamp = max(self._last_timestamp, entry["timestamp"])
            node = entry["resource"]["labels"].get("task_name", "job")
            text = entry.get("textPayload") or entry.get("jsonPayload", {}).get("message", "")
            yield from ((node, line) for line in text.splitlines())

    def _entries(self, body: dict[str, object]) -> Iterator[dict[str, Any]]:
        while True:
            try:
                session = AuthorizedSession(aiplatform.initializer.global_config.credentials)  # type: ignore[no-untyped-call]
                response = session.post(f"{self.logging_url}/v2/entries:list", json=body, timeout=60)
            except (RequestException, GoogleAuthError) as error:
                raise UnansweredError(f"Cloud Logging: gave no answer ({quote(str(error), 200)})") from error
            if response.status_code in (401, 403):
                self._log_readable = False
                remedy = f"grant the step roles/logging.viewer, or read the log at {self.url_or_command('')}"
                yield _log_entry(f"no permission to read the job's log ({response.status_code}); {remedy}")
                return
            if response.status_code != 200:
                raise UnansweredError(f"Cloud Logging: status {response.status_code}")
            page = response.json()
            yield from page.get("entries", ())
            if not page.get("nextPageToken"):
                return
            body = {**body, "pageToken": page["nextPageToken"]}

    def cancel(self, name: str) -> None:
        """Asks Vertex AI to cancel the job; its containers get SIGTERM."""
        with self._translate_errors(TooManyRequests):
            job = self._newest(name)
            if job is not None and PHASES.get(job.state) not in FINAL_PHASES:
                job.cancel()

    def url_or_command(self, name: str) -> str:
        """The URL of the job's page, which links to its log, and the command that streams the log."""
        job_id, region, project = self.resource_name.rpartition("/")[2], self.settings.region, self.settings.project
        if not job_id:
            return f"gcloud ai custom-jobs list --region={region} --project={project} --filter=displayName={name}"
        url = console_utils.custom_job_console_uri(self.resource_name)
        return f"{url} or gcloud ai custom-jobs stream-logs {job_id} --region={region} --project={project}"

    def _newest(self, name: str) -> Any:
        jobs = aiplatform.CustomJob.list(filter=f'display_name="{name}"')
        job = max(jobs, key=lambda job: job.create_time, default=None)
        self.resource_name = self.resource_name if job is None else job.resource_name
        return job

    @contextlib.contextmanager
    def _translate_errors(self, *transient: type[GoogleAPIError]) -> Iterator[None]:
        """Translates the SDK's errors into one-line errors: UnansweredError for temporary ones, else ConfigError.

        `transient` are further errors that are temporary in this call: TooManyRequests is temporary when a job is read,
        but means an exhausted quota when one is created.
        """
        location = f"Vertex AI, project {self.settings.project}, {self.settings.region}"
        with translate_errors(self.step, self.settings.project, self.settings.region):
            try:
                yield
            except (ServerError, RetryError, RequestException, *transient) as error:
                reason = quote(" ".join(str(error).split()), 200)
                raise UnansweredError(
                    f"{location}: gave no answer ({reason}); run the same command again later"
                ) from error


def _log_entry(text: str) -> dict[str, Any]:
    """A log entry with this text, in the format of Cloud Logging."""
    return {"insertId": text, "timestamp": "", "resource": {"labels": {}}, "textPayload": text}


def read_status(state: JobState, error: JobError | None) -> Status:
    """The status of a job with this state and error."""
    phase = PHASES.get(state, Phase.PENDING)
    code, message = (error.code, " ".join(error.message.split())) if error else (0, "")
    if phase is not Phase.FAILED:
        return Status(phase)
    image_missing = all(word in message.lower() for word in IMAGE_ERROR_WORDS)
    preempted = not image_missing and (code in PREEMPTION_CODES or "preempt" in message.lower())
    reason = quote(message, 200) if message else state.name
    return Status(phase, reason, preempted=preempted, cannot_start=image_missing)
