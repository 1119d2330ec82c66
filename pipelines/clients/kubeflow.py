"""Kubeflow Pipelines through kfp's own client, credentials as that client finds them; logs from the pods themselves."""

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
from pipelines.recipe import Kubeflow, refuse_nowhere

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
    403: "ask for the right to create runs in that namespace, or name another with --namespace",
    404: "check the run's id, the endpoint and the namespace",
    409: "a run or an experiment of that name exists; run the same command again",
    413: "the pipeline is too large; give fewer shards",
    429: "the quota is used up; wait, or ask for more",
}
STUCK = ("ImagePullBackOff", "ErrImagePull", "InvalidImageName", "CreateContainerConfigError", "Unschedulable")
"""Why a pod waits without an end: an image, a secret or a machine that is not there."""
LOG_BYTES = 100_000_000
"""Of a pod's log, from its beginning."""
RUN_LABEL = "pipeline/runid"
NODE_NAME = "workflows.argoproj.io/node-name"


class Error(Protocol):
    message: str | None


class Task(Protocol):
    """A node of a run's graph, as kfp's client gives it."""

    display_name: str | None
    state: str
    start_time: datetime | None
    end_time: datetime | None
    error: Error | None


class Details(Protocol):
    task_details: Sequence[Task] | None


class Run(Protocol):
    """A run, as kfp's client gives it."""

    run_id: str
    state: str
    run_details: Details | None
    error: Error | None


class Health(Protocol):
    """What the server says of itself; another server than Kubeflow's says anything."""

    multi_user: object


class Server(Protocol):
    """kfp's client, as far as it is used here."""

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
    """A pod, as kubernetes' client gives it."""

    metadata: Metadata
    status: PodStatus


class Pods(Protocol):
    items: Sequence[Pod]


class Log(Protocol):
    """A log that the client has not decoded."""

    data: bytes


class Cluster(Protocol):
    """kubernetes' `CoreV1Api`, as far as it is used here."""

    def list_namespaced_pod(self, namespace: str, *, label_selector: str) -> Pods: ...

    def read_namespaced_pod_log(
        self, name: str, namespace: str, *, container: str, limit_bytes: int, _preload_content: bool
    ) -> Log: ...


class KubeflowClient:
    """Kubeflow Pipelines at one address. Its server says what runs did; the cluster's API what pods write."""

    def __init__(self, place: Kubeflow) -> None:
        refuse_nowhere(place)
        register_address(place.endpoint)
        self._shown = redact_address(place.endpoint)
        if not place.endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"kubeflow: {self._shown} is not an address; it begins with https:// or http://")
        self._place = place
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"kfp\..*")  # It warns of old servers.
        with self._translate_errors():
            self._client = _connect(place.endpoint)
            # Where users share a server runs have a namespace; elsewhere the server refuses one.
            shared = self._client.get_kfp_healthz().multi_user
        if not isinstance(shared, bool):
            remedy = "log in where a proxy asks for it, or check the address (it often ends in /pipeline)"
            raise ConfigError(f"kubeflow: {self._shown}: what answers is not Kubeflow Pipelines; {remedy}")
        self._namespace = place.namespace if shared else None

    def submit(self, package: Path, arguments: Mapping[str, object], name: str) -> RunState:
        """Creates the experiment if it is missing and a run in it."""
        # kfp prints its links where our own answer goes.
        with self._translate_errors(), contextlib.redirect_stdout(io.StringIO()):
            made = self._client.create_run_from_pipeline_package(
                str(package),
                arguments=dict(arguments),
                run_name=name,
                experiment_name=self._place.experiment,
                namespace=self._namespace,
                service_account=self._place.service_account or None,
            )
        return RunState(run=made.run_id, state="waiting", url=self._url(made.run_id))

    def look(self, run: str) -> RunState:
        """The run's state as the server tells it, and why pods wait where the cluster's API can be asked."""
        with self._translate_errors():
            answer = self._client.get_run(run)
        if not answer.run_id:
            raise ConfigError(f"kubeflow: {self._shown}: has no run {quote(run)}; check its id")
        details = answer.run_details.task_details if answer.run_details else None
        tasks = [task for task in (_task(each) for each in details or ()) if task]
        stuck = self._stuck_steps(run) if STATES.get(answer.state, "running") == "running" else {}
        explained = tuple(_with_reason(task, stuck) for task in tasks)
        error = redact(answer.error.message or "") if answer.error else ""
        state = STATES.get(answer.state, "waiting")
        return RunState(run=run, state=state, url=self._url(run), tasks=explained, error=error)

    def logs(self, run: str, step: str) -> Iterator[tuple[str, str]]:
        """What the pods of a run wrote, pod by pod; the cluster's API must be reachable (kubectl's configuration)."""
        core = self._core()
        with self._translate_errors():
            pods = core.list_namespaced_pod(self._place.namespace, label_selector=f"{RUN_LABEL}={run}").items
        for pod in pods:
            name = _step_of(pod)
            if name is None or step not in ("", name):
                continue
            source = pod.metadata.name
            yield from ((source, f"{name}: {redact(line)}") for line in self._read_log(core, source).splitlines())

    def cancel(self, run: str) -> None:
        """Asks the server to end the run."""
        with self._translate_errors():
            self._client.terminate_run(run)

    def _read_log(self, core: Cluster, pod: str) -> str:
        """What a pod wrote so far; nothing of one whose container starts (400) or that is gone (404)."""
        from kubernetes.client import ApiException

        with self._translate_errors():
            try:
                # Unread: the client would take a log that is one line of JSON for a value and write it otherwise.
                answer = core.read_namespaced_pod_log(
                    pod, self._place.namespace, container="main", limit_bytes=LOG_BYTES, _preload_content=False
                )
                return answer.data.decode(errors="replace")
            except ApiException as error:
                if error.status not in (400, 404):
                    raise
                return ""

    def _url(self, run: str) -> str:
        return f"{self._shown.rstrip('/')}/#/runs/details/{run}"

    def _core(self) -> Cluster:
        from kubernetes import client, config

        try:
            # Its own load_config prints to stdout, and reads KUBECONFIG as it is imported.
            try:
                config.load_kube_config(config_file=os.environ.get("KUBECONFIG"))
            except config.ConfigException:
                config.load_incluster_config()
        except config.ConfigException as error:
            remedy = "set KUBECONFIG, or look at the run's page"
            raise ConfigError(
                f"kubeflow: logs lie in the cluster, and kubectl has no configuration here; {remedy}"
            ) from error
        core: Cluster = client.CoreV1Api()
        return core

    def _stuck_steps(self, run: str) -> dict[str, list[str]]:
        """Step -> why pods of it wait without an end; nothing where the cluster's API is not at hand."""
        reasons: dict[str, list[str]] = {}
        with contextlib.suppress(ConfigError, UnreachableError):
            core = self._core()
            with self._translate_errors():
                pods = core.list_namespaced_pod(self._place.namespace, label_selector=f"{RUN_LABEL}={run}").items
            for pod in pods:
                if reason := _waits(pod):
                    reasons.setdefault(_step_of(pod) or "", []).append(reason)
        return reasons

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """What the server refuses, and a server that does not answer, as one line."""
        import kfp_server_api
        import urllib3
        from kubernetes.client import ApiException

        where = f"kubeflow: {self._shown}"
        try:
            yield
        except (kfp_server_api.ApiException, ApiException) as error:
            remedy = REMEDIES.get(error.status, "mend that, then run the same command again")
            reason = " ".join(str(error.body or error.reason).split())
            raise ConfigError(f"{where}: refused ({error.status}, {quote(reason, 200)}); {remedy}") from error
        except (urllib3.exceptions.HTTPError, TimeoutError, OSError) as error:
            remedy = "check the address and the network (kubectl port-forward, a login of the proxy)"
            raise UnreachableError(f"{where}: gave no answer ({quote(str(error), 120)}); {remedy}") from error


def _connect(endpoint: str) -> Server:
    """kfp's client; its own asks for the server's health five times with pauses, whatever the reason is."""
    import kfp

    class Client(kfp.Client):  # type: ignore[misc]
        def get_kfp_healthz(self, sleep_duration: int = 0) -> object:
            return self._healthz_api.healthz_service_get_healthz()

    server: Server = Client(host=endpoint)
    return server


def _task(task: Task) -> TaskState | None:
    """A task that is a step of ours; what Kubeflow adds (drivers, the graph's own nodes) is left out."""
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
    """The task with why a pod of its step waits, if it goes on; taken from the list, for shards have one pod each.

    Which shard a pod is the server does not tell: its tasks of a step have one name.
    """
    if task.error or task.state not in ("waiting", "running") or not stuck.get(task.step):
        return task
    return replace(task, error=stuck[task.step].pop(0))


def _step_of(pod: Pod) -> str | None:
    """The step whose code a pod runs; None for pods that Kubeflow adds."""
    node = (pod.metadata.annotations or {}).get(NODE_NAME, "")
    names = node.split(".")
    return step_name(names[-2]) if len(names) > 2 and names[-1].startswith("executor") else None


def _waits(pod: Pod) -> str:
    statuses = pod.status.container_statuses or []
    waiting = [status.state.waiting for status in statuses if status.state and status.state.waiting]
    for reason in waiting:
        if reason.reason in STUCK:
            return f"{reason.reason}: {reason.message or 'see the pod'}"
    for condition in pod.status.conditions or []:
        if condition.reason in STUCK:
            return f"{condition.reason}: {condition.message or 'no node fits'}"
    return ""
