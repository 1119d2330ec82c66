"""Client for Kubeflow Pipelines, through kfp's client, which also finds the credentials; logs come from the pods."""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Protocol

from cappy.errors import ConfigError, UnreachableError, quote
from cappy.redaction import redact, redact_address, register_address
from pipelines.clients import RunState, State, TaskState, step_name
from pipelines.recipe import Kubeflow, refuse_missing_address

STATES: Mapping[str, State] = {
    "PENDING": "waiting",
    "RUNNING": "running",
    "SUCCEEDED": "done",
    "SKIPPED": "skipped",
    "CACHED": "cached",
    "FAILED": "failed",
    "CANCELING": "running",
    "CANCELED": "cancelled",
    "PAUSED": "waiting",
}
"""Kubeflow's V2beta1RuntimeState -> ours."""
REMEDIES = {
    401: "log in again: kfp takes its credentials from the environment or from its config file",
    403: "ask for the right to create runs in that namespace, or choose another with --namespace",
    404: "check the run's id, the endpoint and the namespace",
    409: "a run or an experiment of that name exists; run the same command again",
    413: "the pipeline is too large; use fewer shards",
    429: "the quota is used up; wait, or request more",
}
STUCK_REASONS = ("ImagePullBackOff", "ErrImagePull", "InvalidImageName", "CreateContainerConfigError", "Unschedulable")
"""Reasons why a pod waits forever: an image, a secret or a machine is missing."""
MAX_LOG_BYTES = 100_000_000
"""Maximum bytes that are read from the beginning of a pod's log."""
RUN_LABEL = "pipeline/runid"
NODE_NAME = "workflows.argoproj.io/node-name"


class Error(Protocol):
    message: str | None


class Task(Protocol):
    """A node of a run's graph, as returned by kfp's client."""

    display_name: str | None
    state: str
    start_time: datetime | None
    end_time: datetime | None
    error: Error | None


class Details(Protocol):
    task_details: Sequence[Task] | None


class Run(Protocol):
    """A run, as returned by kfp's client."""

    run_id: str
    state: str
    run_details: Details | None
    error: Error | None


class Health(Protocol):
    """The server's answer to a health check; a server that is not Kubeflow's may answer anything."""

    multi_user: object


class Server(Protocol):
    """The methods of kfp's client that are used here."""

    def get_kfp_healthz(self) -> Health: ...

    def create_run_from_pipeline_package(
        self,
        pipeline_file: str,
        *,
        arguments: dict[str, object],
        run_name: str,
        experiment_name: str,
        namespace: str | None,
        service_account: str | None,
    ) -> Run: ...

    def get_run(self, run_id: str) -> Run: ...

    def terminate_run(self, run_id: str) -> object: ...


class Reason(Protocol):
    """Why a container or a pod is in its state."""

    reason: str | None
    message: str | None


class ContainerState(Protocol):
    waiting: Reason | None


class ContainerStatus(Protocol):
    state: ContainerState | None


class PodStatus(Protocol):
    container_statuses: Sequence[ContainerStatus] | None
    conditions: Sequence[Reason] | None


class Metadata(Protocol):
    name: str
    annotations: Mapping[str, str] | None


class Pod(Protocol):
    """A pod, as returned by kubernetes' client."""

    metadata: Metadata
    status: PodStatus


class Pods(Protocol):
    items: Sequence[Pod]


class Log(Protocol):
    """A log that the client has not decoded."""

    data: bytes


class Cluster(Protocol):
    """The methods of kubernetes' `CoreV1Api` that are used here."""

    def list_namespaced_pod(self, namespace: str, *, label_selector: str) -> Pods: ...

    def read_namespaced_pod_log(
        self, name: str, namespace: str, *, container: str, limit_bytes: int, _preload_content: bool
    ) -> Log: ...


class KubeflowClient:
    """Client of Kubeflow Pipelines at one address. States come from its server, logs from the cluster's API."""

    def __init__(self, config: Kubeflow) -> None:
        refuse_missing_address(config)
        register_address(config.endpoint)
        self._display_address = redact_address(config.endpoint)
        if not config.endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"kubeflow: {self._display_address} is not an address; give one that begins with https:// or http://"
            )
        self._config = config
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"kfp\..*")  # kfp warns about old servers.
        with self._translate_errors():
            self._client = _connect(config.endpoint)
            # Only a multi-user server accepts a namespace.
            multi_user = self._client.get_kfp_healthz().multi_user
        if not isinstance(multi_user, bool):
            remedy = "log in at the proxy, or check the address (it often ends in /pipeline)"
            raise ConfigError(f"kubeflow: {self._display_address}: the server is not Kubeflow Pipelines; {remedy}")
        self._namespace = config.namespace if multi_user else None

    def submit(self, package: Path, arguments: Mapping[str, object], name: str) -> RunState:
        """Creates a run in the experiment, which is created if it does not exist."""
        # kfp prints links to stdout, where our own output goes.
        with self._translate_errors(), contextlib.redirect_stdout(io.StringIO()):
            created = self._client.create_run_from_pipeline_package(
                str(package),
                arguments=dict(arguments),
                run_name=name,
                experiment_name=self._config.experiment,
                namespace=self._namespace,
                service_account=self._config.service_account or None,
            )
        return RunState(run=created.run_id, state="waiting", url=self._url(created.run_id))

    def get_state(self, run: str) -> RunState:
        """The run's state from the server, with the reasons of stuck pods if the cluster's API is reachable."""
        with self._translate_errors():
            answer = self._client.get_run(run)
        if not answer.run_id:
            raise ConfigError(f"kubeflow: {self._display_address}: has no run {quote(run)}; check its id")
        details = answer.run_details.task_details if answer.run_details else None
        tasks = [task for task in (_task_state(node) for node in details or ()) if task]
        stuck = self._reasons_of_stuck_pods(run) if STATES.get(answer.state, "running") == "running" else {}
        tasks_with_reasons = tuple(_with_reason(task, stuck) for task in tasks)
        error = redact(answer.error.message or "") if answer.error else ""
        state = STATES.get(answer.state, "waiting")
        return RunState(run=run, state=state, url=self._url(run), tasks=tasks_with_reasons, error=error)

    def logs(self, run: str, step: str) -> Iterator[tuple[str, str]]:
        """Yields the log lines of a run, pod by pod; needs access to the cluster's API (kubectl's configuration)."""
        core = self._connect_to_cluster()
        with self._translate_errors():
            pods = core.list_namespaced_pod(self._config.namespace, label_selector=f"{RUN_LABEL}={run}").items
        for pod in pods:
            name = _step_of(pod)
            if name is None or step not in ("", name):
                continue
            source = pod.metadata.name
            yield from ((source, f"{name}: {redact(line)}") for line in self._read_log(core, source).splitlines())

    def cancel(self, run: str) -> None:
        """Asks the server to cancel the run."""
        with self._translate_errors():
            self._client.terminate_run(run)

    def _read_log(self, core: Cluster, pod: str) -> str:
        """The log of a pod; empty if its container has not started (400) or the pod is gone (404)."""
        from kubernetes.client import ApiException

        with self._translate_errors():
            try:
                # Undecoded: the client would parse a log that is one line of JSON and print it differently.
                answer = core.read_namespaced_pod_log(
                    pod, self._config.namespace, container="main", limit_bytes=MAX_LOG_BYTES, _preload_content=False
                )
                return answer.data.decode(errors="replace")
            except ApiException as error:
                if error.status not in (400, 404):
                    raise
                return ""

    def _url(self, run: str) -> str:
        return f"{self._display_address.rstrip('/')}/#/runs/details/{run}"

    def _connect_to_cluster(self) -> Cluster:
        from kubernetes import client, config

        try:
            # Not config.load_config: it prints to stdout and reads KUBECONFIG at import.
            try:
                config.load_kube_config(config_file=os.environ.get("KUBECONFIG"))
            except config.ConfigException:
                config.load_incluster_config()
        except config.ConfigException as error:
            remedy = "set KUBECONFIG, or open the run's page"
            raise ConfigError(
                f"kubeflow: cannot read logs from the cluster, since kubectl is not configured here; {remedy}"
            ) from error
        core: Cluster = client.CoreV1Api()
        return core

    def _reasons_of_stuck_pods(self, run: str) -> dict[str, list[str]]:
        """Step -> reasons why its pods wait forever; empty if the cluster's API is not reachable."""
        reasons: dict[str, list[str]] = {}
        with contextlib.suppress(ConfigError, UnreachableError):
            core = self._connect_to_cluster()
            with self._translate_errors():
                pods = core.list_namespaced_pod(self._config.namespace, label_selector=f"{RUN_LABEL}={run}").items
            for pod in pods:
                if reason := _stuck_reason(pod):
                    reasons.setdefault(_step_of(pod) or "", []).append(reason)
        return reasons

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Translates errors of the server and of the network to ConfigError and UnreachableError."""
        import kfp_server_api
        import urllib3
        from kubernetes.client import ApiException

        where = f"kubeflow: {self._display_address}"
        try:
            yield
        except (kfp_server_api.ApiException, ApiException) as error:
            remedy = REMEDIES.get(error.status, "fix that and run the same command again")
            reason = " ".join(str(error.body or error.reason).split())
            raise ConfigError(f"{where}: refused ({error.status}, {quote(reason, 200)}); {remedy}") from error
        except (urllib3.exceptions.HTTPError, TimeoutError, OSError) as error:
            remedy = "check the address and the network (kubectl port-forward, a login at the proxy)"
            raise UnreachableError(f"{where}: gave no answer ({quote(str(error), 120)}); {remedy}") from error


def _connect(endpoint: str) -> Server:
    """Returns kfp's client, changed to make one health check; kfp repeats it five times with pauses after any error."""
    import kfp

    class Client(kfp.Client):  # type: ignore[misc]
        def get_kfp_healthz(self, sleep_duration: int = 0) -> object:
            return self._healthz_api.healthz_service_get_healthz()

    server: Server = Client(host=endpoint)
    return server


def _task_state(task: Task) -> TaskState | None:
    """The state of a task; None for tasks that Kubeflow adds (drivers, nodes of the graph itself)."""
    name = task.display_name or ""
    if (
        name.endswith("-driver")
        or name in ("executor", "root", "")
        or name.startswith(("for-loop", "exit-handler", "condition"))
    ):
        return None
    end, start = task.end_time, task.start_time
    seconds = (end - start).total_seconds() if end and start and end > start else 0.0
    error = redact(task.error.message or "") if task.error else ""
    return TaskState(step=step_name(name), state=STATES.get(task.state, "waiting"), seconds=seconds, error=error)


def _with_reason(task: TaskState, stuck: dict[str, list[str]]) -> TaskState:
    """The task with the reason why a pod of its step is stuck, if any; removes the reason, so that it is used once.

    The server does not say which shard a pod belongs to, since all shards of a step have the same task name.
    """
    if task.error or task.state not in ("waiting", "running") or not stuck.get(task.step):
        return task
    return replace(task, error=stuck[task.step].pop(0))


def _step_of(pod: Pod) -> str | None:
    """The step whose code a pod runs; None for pods that Kubeflow adds."""
    node = (pod.metadata.annotations or {}).get(NODE_NAME, "")
    names = node.split(".")
    return step_name(names[-2]) if len(names) > 2 and names[-1].startswith("executor") else None


def _stuck_reason(pod: Pod) -> str:
    statuses = pod.status.container_statuses or []
    waiting = [status.state.waiting for status in statuses if status.state and status.state.waiting]
    for reason in waiting:
        if reason.reason in STUCK_REASONS:
            return f"{reason.reason}: {reason.message or 'see the pod'}"
    for condition in pod.status.conditions or []:
        if condition.reason in STUCK_REASONS:
            return f"{condition.reason}: {condition.message or 'no node fits'}"
    return ""
