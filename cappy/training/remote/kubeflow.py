"""Runs training steps as TrainJobs with the Kubeflow Trainer SDK (0.5), on the cluster of the kubeconfig or this pod.

The SDK has no option for owner references, so a TrainJob outlives the pod that submitted it: the step cancels it, and
if the step is killed before it can, the TrainJob's own deadline ends it.
"""

import contextlib
import json
import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from cappy.config import encode, to_values
from cappy.errors import CappyError, ConfigError, UnansweredError, quote
from cappy.training.remote.following import FINAL_PHASES, Phase, Status
from cappy.training.settings import TrainingSettings, mount_point

try:
    from kubeflow import trainer as sdk
    from kubeflow.common.types import KubernetesBackendConfig
    from kubeflow.trainer import options as sdk_options
    from kubernetes.client import ApiException, CoreV1Api, V1ContainerStatus, V1Pod
    from kubernetes.config import ConfigException
    from urllib3.exceptions import HTTPError
except ModuleNotFoundError as missing:
    raise ConfigError(f"--launcher trainjob: needs {missing.name}; pip install 'cappy-scorer[train]'") from missing

PHASES = {"Created": Phase.PENDING, "Running": Phase.RUNNING, "Complete": Phase.SUCCEEDED, "Failed": Phase.FAILED}
STEP_VARIABLE = "CAPPY_TRAINING_STEP"
SETTINGS_VARIABLE = "CAPPY_TRAINING_SETTINGS"
NODE = "node"
"""Name of the ReplicatedJob that runs the trainer in a TrainingRuntime, and of its container."""
DELETION_SECONDS = 300.0
"""How long to wait until the pods of a deleted job are gone, before another job of the same name is submitted."""
INITIAL_LINES = 1000
"""Number of lines to read when this step starts to follow a log."""
OVERLAP_SECONDS = 5
"""How many seconds two reads of a log overlap, so that no line is missed; lines that were read before are dropped."""
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
ROLE_LABEL = "jobset.sigs.k8s.io/replicatedjob-name"
_FATAL_WAIT_REASONS = ("ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError")
"""Waiting reasons that do not go away by themselves, such as a missing image or secret."""
_PREEMPTION_REASONS = (
    "Evicted",
    "Preempting",
    "Preempted",
    "NodeShutdown",
    "NodeLost",
    "Shutdown",
    "Terminated",
    "NodeAffinity",
)
"""Reasons of a pod that was ended by its node."""
_MAX_MESSAGE_CHARACTERS = 160
"""Maximum characters of a pod's message."""
REQUIRED_PERMISSIONS = (
    "create, get, delete on trainjobs; get on trainingruntimes, clustertrainingruntimes, pods/log; list on pods"
)


def run_rank() -> None:
    """Runs `python -m cappy.training STEP SETTINGS` in this process; the job gets only the source of this function.

    The SDK calls it in every rank. Step and settings are passed in the environment, because the SDK's backends pass
    arguments differently (one by keyword, one as a dictionary).
    """
    import os
    import runpy
    import sys

    sys.argv[1:] = [os.environ["CAPPY_TRAINING_STEP"], os.environ["CAPPY_TRAINING_SETTINGS"]]
    runpy.run_module("cappy.training", run_name="__main__")


def trainer(
    step: str,
    config: TrainingSettings,
    *,
    image: str | None = None,
    resources: Mapping[str, str | int] | None = None,
    environment: Mapping[str, str] | None = None,
) -> sdk.CustomTrainer:
    """A CustomTrainer that runs a step on `config.nodes` machines with `resources` each, such as {"gpu": 4}.

    Source, target and work must be on a volume that every node mounts; torchrun starts one rank per GPU. The image
    must have cappy installed; nothing is installed when the job starts.
    """
    variables = {STEP_VARIABLE: step, SETTINGS_VARIABLE: encode(to_values(config))}
    return sdk.CustomTrainer(
        func=run_rank,
        image=image,
        num_nodes=config.nodes,
        resources_per_node=dict(resources) if resources else None,
        env={**(environment or {}), **variables},
    )


class TrainJobs:
    """The TrainJobs of one step: `config` has the settings of the platform, `job_config` those of each rank."""

    def __init__(
        self,
        step: str,
        config: TrainingSettings,
        job_config: TrainingSettings,
        environment: Mapping[str, str],
        client: sdk.TrainerClient | None = None,
    ) -> None:
        self.config = config
        self.trainer = trainer(
            step,
            job_config,
            image=config.image or None,
            resources=_node_resources(config),
            environment=environment,
        )
        self.client = client or connect(config)
        backend = getattr(self.client, "backend", None)
        self.core: CoreV1Api = getattr(backend, "core_api", None)  # None for a backend without pods.
        self.namespace: str = getattr(backend, "namespace", "")
        self._last_timestamp: dict[str, tuple[str, str]] = {}
        self._last_read: dict[str, float] = {}

    def status(self, name: str) -> Status | None:
        """The status of the TrainJob with the reasons that its pods give; None if there is no such TrainJob."""
        with _translate_errors(self.config):
            # First, so that a missing permission to list pods is reported before anything is submitted.
            pods = self._pods(name)
            try:
                job = self.client.get_job(name)
            except RuntimeError as error:
                if str(error).startswith("Failed to get TrainJob") and _status_code(error) == 404:
                    return None
                raise
            return _read_status(PHASES[job.status], pods)

    def submit(self, name: str) -> None:
        """Creates the TrainJob, after deleting an ended one of this name and its pods."""
        with _translate_errors(self.config):
            self._delete_ended(name)
            runtime, options = self.config.trainjob.runtime, _options(name, self.config)
            self.client.train(runtime=runtime, trainer=self.trainer, options=options)

    def lines(self, name: str) -> Iterator[tuple[str, str]]:
        """New lines of the pods' logs, node by node."""
        with _translate_errors(self.config):
            for pod in self._pods(name):
                if _has_started(pod):
                    yield from ((_node_name(pod), line) for line in self._new_lines(pod.metadata.name))

    def cancel(self, name: str) -> None:
        """Deletes the TrainJob and its pods, which get SIGTERM."""
        with _translate_errors(self.config):
            try:
                self.client.delete_job(name)
            except RuntimeError as error:
                if _status_code(error) != 404:
                    raise

    def url_or_command(self, name: str) -> str:
        """The command that shows the TrainJob."""
        return f"kubectl -n {self.namespace} describe trainjob {name}"

    def _pods(self, name: str) -> list[V1Pod]:
        if self.core is None:
            return []
        selector = f"jobset.sigs.k8s.io/jobset-name={name}"
        return _newest_pods(self.core.list_namespaced_pod(self.namespace, label_selector=selector).items)

    def _delete_ended(self, name: str) -> None:
        """Deletes the ended TrainJob of this name, if any, and its pods; UnansweredError if it has not ended."""
        status = self.status(name)
        if status is None:
            return
        if status.phase not in FINAL_PHASES:
            raise UnansweredError(f"TrainJob {name}: is {status.phase.value} already; run the same command again")
        self.client.delete_job(name)
        deadline = time.monotonic() + DELETION_SECONDS
        while self.status(name) is not None or self._pods(name):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"TrainJob {name}: its pods are not deleted; check them with {self.url_or_command(name)}"
                )
            time.sleep(1)

    def _new_lines(self, pod: str) -> list[str]:
        """The lines newer than the last one read, by timestamp: the API reads a log from a time, not from a line."""
        now = time.monotonic()
        window = {"since_seconds": int(now - self._last_read[pod]) + OVERLAP_SECONDS} if pod in self._last_read else {}
        try:
            # Raw content: the client would parse a line that is JSON and print it differently.
            response = self.core.read_namespaced_pod_log(
                pod,
                self.namespace,
                container=NODE,
                timestamps=True,
                _preload_content=False,
                **(window or {"tail_lines": INITIAL_LINES}),
            )
        except ApiException as error:
            if error.status in (400, 404):  # Its container is being created or was removed.
                return []
            raise
        self._last_read[pod] = now
        timestamped = [_split_timestamp(line) for line in response.data.decode(errors="replace").splitlines()]
        new = [
            (timestamp, line) for timestamp, line in timestamped if timestamp > self._last_timestamp.get(pod, ("", ""))
        ]
        if new:
            self._last_timestamp[pod] = new[-1][0]
        return [line for _, line in new]


def connect(config: TrainingSettings) -> sdk.TrainerClient:
    """The SDK's client of the current cluster; raises ConfigError if there is none."""
    # Otherwise the SDK warns about a config map in the system's namespace that most users may not read.
    logging.getLogger("kubeflow").setLevel(logging.ERROR)
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    with _translate_errors(config):
        return sdk.TrainerClient(KubernetesBackendConfig(namespace=config.trainjob.namespace or None))


def _node_resources(config: TrainingSettings) -> dict[str, str | int]:
    """The resources of each node by their names in Kubernetes; the runtime defines those that are not set."""
    job = config.trainjob
    resources: dict[str, str | int] = {job.accelerator: config.devices, "cpu": job.cpu, "memory": job.memory}
    return {name: amount for name, amount in resources.items() if name and amount}


def _options(name: str, config: TrainingSettings) -> list[object]:
    deadline = sdk_options.ActiveDeadlineSeconds(int(config.timeout_hours * 3600))
    patch = _patch(config)
    return [sdk_options.Name(name), deadline, *([patch] if patch else ())]


def _patch(config: TrainingSettings) -> sdk_options.RuntimePatch | None:
    """The patch of the runtime's pods: the volume and the service account; None if neither is set."""
    claim, folder = config.trainjob.volume.partition(":")[0], mount_point(config.trainjob.volume)
    pod = sdk_options.PodSpecPatch(
        service_account_name=config.service_account or None,
        volumes=[{"name": "work", "persistentVolumeClaim": {"claimName": claim}}] if claim else None,
        containers=[sdk_options.ContainerPatch(name=NODE, volume_mounts=[{"name": "work", "mountPath": folder}])]
        if claim
        else None,
    )
    if not (claim or config.service_account):
        return None
    template = sdk_options.JobTemplatePatch(
        spec=sdk_options.JobSpecPatch(template=sdk_options.PodTemplatePatch(spec=pod))
    )
    nodes = sdk_options.ReplicatedJobPatch(name=NODE, template=template)
    jobset = sdk_options.JobSetTemplatePatch(spec=sdk_options.JobSetSpecPatch(replicated_jobs=[nodes]))
    return sdk_options.RuntimePatch(training_runtime_spec=sdk_options.TrainingRuntimeSpecPatch(template=jobset))


def _split_timestamp(line: str) -> tuple[tuple[str, str], str]:
    """Splits a log line into ((second, fraction), text); the fraction is padded, because trailing zeros may be missing.

    A line without a timestamp gets one that is later than all others.
    """
    timestamp, _, text = line.partition(" ")
    match = re.match(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?", timestamp)
    return ((match[1], (match[2] or "").ljust(9, "0")), text) if match else (("9", ""), line)


def _node_name(pod: V1Pod) -> str:
    """The Trainer SDK's name of the pod's node, such as node-0; for pods without a node, the pod's name."""
    labels = pod.metadata.labels or {}
    role, index = labels.get(ROLE_LABEL, ""), labels.get(INDEX_LABEL, "")
    return f"{role}-{index}" if role and index else str(pod.metadata.name)


def _newest_pods(pods: Iterable[V1Pod]) -> list[V1Pod]:
    """The newest pod of each node, sorted by node."""
    by_node = {_node_name(pod): pod for pod in sorted(pods, key=lambda pod: str(pod.metadata.creation_timestamp))}
    return [by_node[name] for name in sorted(by_node, key=lambda name: (len(name), name))]


def _read_status(phase: Phase, pods: Sequence[V1Pod]) -> Status:
    """The status of a job in this phase, with the reasons that its pods give."""
    if phase is Phase.FAILED:
        disruptions = [reason for pod in pods if (reason := _disruption_reason(pod))]
        ends = [reason for pod in pods if (reason := _end_reason(pod))]
        return Status(phase, "; ".join([*disruptions, *ends][:2]), preempted=bool(disruptions))
    if phase not in (Phase.PENDING, Phase.RUNNING):
        return Status(phase)
    fatal = [reason for pod in pods if (reason := _fatal_wait_reason(pod))]
    if fatal:
        return Status(phase, fatal[0], cannot_start=True)
    unschedulable = [reason for pod in pods if (reason := _unschedulable_reason(pod))] if phase is Phase.PENDING else []
    return Status(phase, unschedulable[0] if unschedulable else "")


def _has_started(pod: V1Pod) -> bool:
    """Whether the pod's container has started, so that it has a log."""
    return bool(pod.status and pod.status.phase in ("Running", "Succeeded", "Failed"))


def _containers(pod: V1Pod) -> list[V1ContainerStatus]:
    status = pod.status
    return [*(status.init_container_statuses or []), *(status.container_statuses or [])] if status else []


def _fatal_wait_reason(pod: V1Pod) -> str:
    for container in _containers(pod):
        waiting = container.state and container.state.waiting
        if waiting and waiting.reason in _FATAL_WAIT_REASONS:
            message = _one_line(waiting.message or "no message", _MAX_MESSAGE_CHARACTERS)
            return f"{_node_name(pod)} cannot start, {waiting.reason} of image {container.image} ({message})"
    return ""


def _unschedulable_reason(pod: V1Pod) -> str:
    for condition in (pod.status and pod.status.conditions) or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            message = _one_line(condition.message or condition.reason or "", _MAX_MESSAGE_CHARACTERS)
            return f"{_node_name(pod)} has no machine yet ({message})"
    return ""


def _disruption_reason(pod: V1Pod) -> str:
    """Why the pod was preempted or evicted, "" if it was not (condition DisruptionTarget, or the pod's reason)."""
    reasons = [pod.status.reason] if pod.status and pod.status.reason in _PREEMPTION_REASONS else []
    for condition in (pod.status and pod.status.conditions) or []:
        if condition.type == "DisruptionTarget" and condition.status == "True":
            reasons.append(condition.reason or condition.type)
    return f"{_node_name(pod)}: {reasons[-1]}" if reasons else ""


def _end_reason(pod: V1Pod) -> str:
    for container in _containers(pod):
        terminated = container.state and container.state.terminated
        if terminated and terminated.exit_code:
            return f"{_node_name(pod)}: {terminated.reason or 'Error'}, status {terminated.exit_code}"
    return ""


@contextlib.contextmanager
def _translate_errors(config: TrainingSettings) -> Iterator[None]:
    """Translates errors of the cluster, or of the connection to it, into one-line errors."""
    try:
        yield
    except CappyError:
        raise
    except ConfigException as error:
        remedy = "run it where kubectl is configured, or set KUBECONFIG"
        raise ConfigError(f"--launcher trainjob: no cluster is configured ({_one_line(error)}); {remedy}") from error
    except (RuntimeError, ValueError, ApiException, HTTPError, OSError) as error:
        raise _to_cappy_error(error, config) from error


def _to_cappy_error(error: BaseException, config: TrainingSettings) -> CappyError:
    location = f"Kubernetes, namespace {config.trainjob.namespace or 'of the current context'}"
    api_errors = [link for link in _with_causes(error) if isinstance(link, ApiException)]
    if not api_errors:
        if any(isinstance(link, (HTTPError, OSError)) for link in _with_causes(error)):  # TimeoutError is an OSError.
            reason = _one_line([*_with_causes(error)][-1])
            return UnansweredError(f"{location}: gave no answer ({reason}); check that kubectl reaches it")
        return ConfigError(f"{location}: {_one_line(error)}; fix that setting")
    code, message = api_errors[0].status, _api_message(api_errors[0])
    if code == 404 and "untime" in str(error):  # Runtime or runtime
        remedy = "give a --trainjob.runtime that `kubectl get trainingruntimes,clustertrainingruntimes` lists"
        runtime = config.trainjob.runtime
        return ConfigError(f"{location}: has no training runtime {runtime!r}, or no Kubeflow Trainer; {remedy}")
    if code == 401:
        return ConfigError(f"{location}: rejected the credentials ({message}); log in again")
    if code == 403 and "quota" in message:
        return ConfigError(f"{location}: the quota is used up ({message}); wait for other jobs, or ask for more")
    if code == 403:
        return ConfigError(f"{location}: no permission ({message}); the service account needs {REQUIRED_PERMISSIONS}")
    if code == 429 or code is None or code >= 500:
        return UnansweredError(
            f"{location}: cannot answer now (status {code}, {message}); run the same command again later"
        )
    return ConfigError(f"{location}: refused (status {code}, {message}); fix that, then run the same command again")


def _api_message(error: ApiException) -> str:
    """The API server's message, from the JSON body."""
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        return _one_line(json.loads(error.body)["message"])
    return _one_line(error.reason or error.body or "no reason given")


def _status_code(error: BaseException) -> int | None:
    codes: Iterable[int | None] = (link.status for link in _with_causes(error) if isinstance(link, ApiException))
    return next(iter(codes), None)


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """Yields the error and its causes, the root cause last."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _one_line(message: object, max_characters: int = 200) -> str:
    return quote(" ".join(str(message).split()), max_characters)
