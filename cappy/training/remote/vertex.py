"""A training step as a Vertex AI CustomJob, by the SDK (google-cloud-aiplatform 1.165 and later, or 2.x).

Vertex AI starts the same command on every machine and tells each of the others in CLUSTER_SPEC, which `topology` reads;
the command then starts a rank per accelerator. The first machine is a pool of its own, the others are the second.

Logs are read from Cloud Logging over its REST API, whose client is not installed; without the right to, the step goes
on, and tells where a person reads them. How far the job is comes through the file on the volume.
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

    from cappy.vertex import silence_sdk, translate_errors
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
"""What is not here waits: queued, pending, paused, unspecified."""
PREEMPTION_CODES = (10, 14)
"""Codes of a job's error (google.rpc.Code) that tell of its machines: ABORTED, UNAVAILABLE."""
LOGGING_URL = "https://logging.googleapis.com"
PAGE_SIZE = 1000
IMAGE_ERROR_WORDS = ("image", "pull")
"""Words that tell of an image that cannot be had, where both stand in a job's error."""


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
    """The worker pools of a step on `config.nodes` machines with `config.devices` accelerators of this type each.

    Source, target and work must lie on a file system that every machine mounts and that locks and renames, such as NFS:
    `volume` is SERVER:/export:/mnt/nfs/name of one to mount. The image needs cappy and no entry point of its own. A TPU
    is part of the machine's type.
    ConfigError where a path is relative, or several ranks of a machine have no accelerator to be on.
    """
    if config.parallelism == "jax" and config.nodes > 1:
        raise ConfigError(
            f"{step}: --parallelism jax drives one machine, and {config.nodes} were asked for; give --nodes 1"
        )
    for name in ("source", "target", "work"):
        if not getattr(config, name).is_absolute():
            remedy = "give a folder on a file system that all machines mount, such as NFS"
            raise ConfigError(f"{step}: --{name} {getattr(config, name)}: is not an absolute path; {remedy}")
    if config.devices > 1 and not accelerator_type and config.parallelism != "jax":
        remedy = "name the accelerator_type, or give --devices 1"
        raise ConfigError(f"{step}: {config.devices} devices per machine, and no accelerator is named; {remedy}")
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
    others = [{**pool, "replica_count": config.nodes - 1}] if config.nodes > 1 else []
    return [{**pool, "replica_count": 1}, *others]


class CustomJobs:
    """CustomJobs of one step: `config` says where, `inner` what each machine does."""

    def __init__(
        self, step: str, config: TrainingSettings, inner: TrainingSettings, environment: Mapping[str, str]
    ) -> None:
        self.step, self.config, self.own = step, config, config.customjob
        self.pools = worker_pools(
            step,
            inner,
            image=config.image,
            machine_type=self.own.machine,
            accelerator_type=self.own.accelerator,
            environment=environment,
            volume=self.own.volume,
        )
        self.resource = ""
        self.logging = LOGGING_URL
        self._since = "1970-01-01T00:00:00Z"
        self._seen: set[str] = set()
        self._readable = True
        silence_sdk()
        with self._translate_errors():
            aiplatform.init(project=self.own.project, location=self.own.region, staging_bucket=self.own.bucket)

    def status(self, name: str) -> Status | None:
        """The state of the job of this name that was made last."""
        with self._translate_errors(TooManyRequests):
            job = self._newest(name)
            return None if job is None else read_status(job.state, job.error)

    def submit(self, name: str) -> None:
        """Creates the job; those of this name that are over stay in the list, as Vertex AI keeps them."""
        with self._translate_errors():
            job = aiplatform.CustomJob(display_name=name, worker_pool_specs=self.pools)
            job.submit(
                service_account=self.config.service_account or None,
                network=self.own.network or None,
                timeout=int(self.config.timeout_hours * 3600),
                # Ranks that lost one of them only wait: all have to begin at the checkpoint.
                restart_job_on_worker_restart=self.config.nodes > 1,
                scheduling_strategy=Scheduling.Strategy.SPOT if self.own.spot else None,
            )
            self.resource = job.resource_name

    def lines(self, name: str) -> Iterator[tuple[str, str]]:
        """New lines of its machines, as Cloud Logging has them, some seconds late (role logging.viewer)."""
        number = self.resource.rpartition("/")[2]
        if not (number and self._readable):
            return
        wanted = f'resource.type="ml_job" AND resource.labels.job_id="{number}" AND timestamp>="{self._since}"'
        body = {"resourceNames": [f"projects/{self.own.project}"], "filter": wanted, "pageSize": PAGE_SIZE}
        for entry in self._entries({**body, "orderBy": "timestamp asc"}):
            if entry["insertId"] in self._seen:
                continue
            self._seen.add(entry["insertId"])
            self._since = max(self._since, entry["timestamp"])
            node = entry["resource"]["labels"].get("task_name", "job")
            text = entry.get("textPayload") or entry.get("jsonPayload", {}).get("message", "")
            yield from ((node, line) for line in text.splitlines())

    def _entries(self, body: dict[str, object]) -> Iterator[dict[str, Any]]:
        while True:
            try:
                session = AuthorizedSession(aiplatform.initializer.global_config.credentials)  # type: ignore[no-untyped-call]
                answer = session.post(f"{self.logging}/v2/entries:list", json=body, timeout=60)
            except (RequestException, GoogleAuthError) as error:
                raise UnansweredError(f"Cloud Logging: gives no answer ({quote(str(error), 200)})") from error
            if answer.status_code in (401, 403):
                self._readable = False
                place = "grant the step roles/logging.viewer, or read them where the job is"
                yield _log_entry(f"its log may not be read ({answer.status_code}); {place}: {self.address('')}")
                return
            if answer.status_code != 200:
                raise UnansweredError(f"Cloud Logging: answers {answer.status_code}")
            values = answer.json()
            yield from values.get("entries", ())
            if not values.get("nextPageToken"):
                return
            body = {**body, "pageToken": values["nextPageToken"]}

    def cancel(self, name: str) -> None:
        """Asks Vertex AI to end it; its containers get SIGTERM."""
        with self._translate_errors(TooManyRequests):
            job = self._newest(name)
            if job is not None and PHASES.get(job.state) not in FINAL_PHASES:
                job.cancel()

    def address(self, name: str) -> str:
        """Its page, which links to its log, and the command that streams the log."""
        number, region, project = self.resource.rpartition("/")[2], self.own.region, self.own.project
        if not number:
            return f"gcloud ai custom-jobs list --region={region} --project={project} --filter=displayName={name}"
        page = console_utils.custom_job_console_uri(self.resource)
        return f"{page} or gcloud ai custom-jobs stream-logs {number} --region={region} --project={project}"

    def _newest(self, name: str) -> Any:
        jobs = aiplatform.CustomJob.list(filter=f'display_name="{name}"')
        job = max(jobs, key=lambda one: one.create_time, default=None)
        self.resource = self.resource if job is None else job.resource_name
        return job

    @contextlib.contextmanager
    def _translate_errors(self, *transient: type[GoogleAPIError]) -> Iterator[None]:
        """A refusal as one line; UnansweredError where it may be answered later.

        Too many requests are a quota that is used up when a job is created, and a matter of seconds when one is read.
        """
        place = f"Vertex AI, project {self.own.project}, {self.own.region}"
        with translate_errors(self.step, self.own.project, self.own.region):
            try:
                yield
            except (ServerError, RetryError, RequestException, *transient) as error:
                reason = quote(" ".join(str(error).split()), 200)
                raise UnansweredError(
                    f"{place}: gives no answer ({reason}); run the same command again later"
                ) from error


def _log_entry(text: str) -> dict[str, Any]:
    """An entry of our own."""
    return {"insertId": text, "timestamp": "", "resource": {"labels": {}}, "textPayload": text}


def read_status(state: JobState, error: JobError | None) -> Status:
    """The status of a job in this state, with the error that Vertex AI wrote."""
    phase = PHASES.get(state, Phase.PENDING)
    code, words = (error.code, " ".join(error.message.split())) if error else (0, "")
    if phase is not Phase.FAILED:
        return Status(phase)
    absent = all(word in words.lower() for word in IMAGE_ERROR_WORDS)
    taken = not absent and (code in PREEMPTION_CODES or "preempt" in words.lower())
    reason = quote(words, 200) if words else state.name
    return Status(phase, reason, preempted=taken, hopeless=absent)
