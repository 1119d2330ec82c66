"""A training step as a TrainJob, by the Kubeflow Trainer SDK (0.5), whose cluster is that of the kubeconfig or the pod.

The SDK has no option for owner references, so a TrainJob outlives the pod that submitted it: the step cancels it, and
its own deadline ends one whose step was killed without a chance to.
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
    from kubeflow.trainer import options as given
    from kubernetes.client import ApiException, CoreV1Api, V1ContainerStatus, V1Pod
    from kubernetes.config import ConfigException
    from urllib3.exceptions import HTTPError
except ModuleNotFoundError as missing:
    raise ConfigError(f"--launcher trainjob: needs {missing.name}; pip install 'cappy-scorer[train]'") from missing

PHASES = {"Created": Phase.PENDING, "Running": Phase.RUNNING, "Complete": Phase.SUCCEEDED, "Failed": Phase.FAILED}
STEP_VARIABLE = "CAPPY_TRAINING_STEP"
SETTINGS_VARIABLE = "CAPPY_TRAINING_SETTINGS"
NODE = "node"
"""The SDK's name of a runtime's replicated job and container that train."""
DELETION_SECONDS = 300.0
"""How long the pods of a job that is over are waited for before another of its name takes their place."""
INITIAL_LINES = 1000
"""Lines of a log that ran before this step followed it."""
OVERLAP_SECONDS = 5
"""Seconds of a log that are asked for twice, their lines passed on once: between two looks no line may fall."""
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
ROLE_LABEL = "jobset.sigs.k8s.io/replicatedjob-name"
_FATAL_WAIT_REASONS = ("ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError")
"""Reasons of a waiting container that time does not mend: no such image, or a secret that is not there."""
_PREEMPTION_REASONS = ("Evicted", "Preempting", "Preempted", "NodeShutdown", "NodeLost", "Shutdown", "Terminated", "NodeAffinity")
"""Reasons of a pod that its node ended."""
_MAX_MESSAGE_CHARACTERS = 160
"""Characters of a pod's words."""
REQUIRED_PERMISSIONS = "create, get, delete on trainjobs; get on trainingruntimes, clustertrainingruntimes, pods/log; list on pods"


def run_rank() -> None:
    """`python -m cappy.training STEP SETTINGS` in this process; only this source text arrives at a node.

    The SDK calls it in every rank. What to do travels in the environment, because the SDK's backends hand over
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
    """The CustomTrainer of a step on `config.nodes` machines with `resources` each, such as {"gpu": 4}.

    Its source, target and work must lie on a volume that every node mounts; torchrun starts one rank per GPU. The image
    needs cappy, nothing is installed when the job starts.
    """
    work = {STEP_VARIABLE: step, SETTINGS_VARIABLE: encode(to_values(config))}
    return sdk.CustomTrainer(
        func=run_rank,
        image=image,
        num_nodes=config.nodes,
        resources_per_node=dict(resources) if resources else None,
        env={**(environment or {}), **work},
    )


class TrainJobs:
    """TrainJobs of one step: `config` says where, `inner` what each rank does."""

    def __init__(
        self,
        step: str,
        config: TrainingSettings,
        inner: TrainingSettings,
        environment: Mapping[str, str],
        client: sdk.TrainerClient | None = None,
    ) -> None:
        self.config = config
        self.trainer = trainer(
            step,
            inner,
            image=config.image or None,
            resources=_node_resources(config),
            environment=environment,
        )
        self.client = client or connect(config)
        backend = getattr(self.client, "backend", None)
        self.core: CoreV1Api = getattr(backend, "core_api", None)  # None of a backend that has no pods.
        self.namespace: str = getattr(backend, "namespace", "")
        self._last: dict[str, tuple[str, str]] = {}
        self._looked: dict[str, float] = {}

    def status(self, name: str) -> Status | None:
        """How it is, with what its pods say."""
        with _translate_errors(self.config):
            # First, so that a right to look at pods that is missing is named before anything is submitted.
            pods = self._pods(name)
            try:
                job = self.client.get_job(name)
            except RuntimeError as error:
                if str(error).startswith("Failed to get TrainJob") and _status_code(error) == 404:
                    return None
                raise
            return _read_status(PHASES[job.status], pods)

    def submit(self, name: str) -> None:
        """Creates the TrainJob, once one of this name that is over is gone with its pods."""
        with _translate_errors(self.config):
            self._clear(name)
            runtime, options = self.config.trainjob.runtime, _options(name, self.config)
            self.client.train(runtime=runtime, trainer=self.trainer, options=options)

    def lines(self, name: str) -> Iterator[tuple[str, str]]:
        """New lines of the pods' logs, node by node."""
        with _translate_errors(self.config):
            for pod in self._pods(name):
                if _has_started(pod):
                    yield from ((_node_name(pod), line) for line in self._new_lines(pod.metadata.name))

    def cancel(self, name: str) -> None:
        """Deletes it, and with it its pods, which get SIGTERM."""
        with _translate_errors(self.config):
            try:
                self.client.delete_job(name)
            except RuntimeError as error:
                if _status_code(error) != 404:
                    raise

    def address(self, name: str) -> str:
        """The command that shows it."""
        return f"kubectl -n {self.namespace} describe trainjob {name}"

    def _pods(self, name: str) -> list[V1Pod]:
        if self.core is None:
            return []
        label = f"jobset.sigs.k8s.io/jobset-name={name}"
        return _newest_pods(self.core.list_namespaced_pod(self.namespace, label_selector=label).items)

    def _clear(self, name: str) -> None:
        status = self.status(name)
        if status is None:
            return
        if status.phase not in FINAL_PHASES:
            raise UnansweredError(f"TrainJob {name}: {status.phase.value} already; run the same command again")
        self.client.delete_job(name)
        end = time.monotonic() + DELETION_SECONDS
        while self.status(name) is not None or self._pods(name):
            if time.monotonic() > end:
                raise ConfigError(f"TrainJob {name}: its pods do not go; look with {self.address(name)}")
            time.sleep(1)

    def _new_lines(self, pod: str) -> list[str]:
        """By the time before each line: pods give their log from a second on, not from a line on."""
        now = time.monotonic()
        since = {"since_seconds": int(now - self._looked[pod]) + OVERLAP_SECONDS} if pod in self._looked else {}
        try:
            # Unread: the client would take a line that is JSON for a value and write it otherwise.
            answer = self.core.read_namespaced_pod_log(
                pod,
                self.namespace,
                container=NODE,
                timestamps=True,
                _preload_content=False,
                **(since or {"tail_lines": INITIAL_LINES}),
            )
        except ApiException as error:
            if error.status in (400, 404):  # Its container is only just being made, or is gone.
                return []
            raise
        self._looked[pod] = now
        stamped = [_split_timestamp(line) for line in answer.data.decode(errors="replace").splitlines()]
        fresh = [(stamp, line) for stamp, line in stamped if stamp > self._last.get(pod, ("", ""))]
        if fresh:
            self._last[pod] = fresh[-1][0]
        return [line for _, line in fresh]


def connect(config: TrainingSettings) -> sdk.TrainerClient:
    """The SDK's client of the current cluster; ConfigError where there is none."""
    # It warns of a config map that people without a right to the system's namespace cannot read.
    logging.getLogger("kubeflow").setLevel(logging.ERROR)
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    with _translate_errors(config):
        return sdk.TrainerClient(KubernetesBackendConfig(namespace=config.trainjob.namespace or None))


def _node_resources(config: TrainingSettings) -> dict[str, str | int]:
    """What each node asks for, in Kubernetes' words; empty where the runtime says it."""
    job = config.trainjob
    asked: dict[str, str | int] = {job.accelerator: config.devices, "cpu": job.cpu, "memory": job.memory}
    return {name: amount for name, amount in asked.items() if name and amount}


def _options(name: str, config: TrainingSettings) -> list[object]:
    deadline = given.ActiveDeadlineSeconds(int(config.timeout_hours * 3600))
    patch = _patch(config)
    return [given.Name(name), deadline, *([patch] if patch else ())]


def _patch(config: TrainingSettings) -> given.RuntimePatch | None:
    """What of the runtime's pods is this job's own: the volume and the service account."""
    claim, folder = config.trainjob.volume.partition(":")[0], mount_point(config.trainjob.volume)
    pod = given.PodSpecPatch(
        service_account_name=config.service_account or None,
        volumes=[{"name": "work", "persistentVolumeClaim": {"claimName": claim}}] if claim else None,
        containers=[given.ContainerPatch(name=NODE, volume_mounts=[{"name": "work", "mountPath": folder}])]
        if claim
        else None,
    )
    if not (claim or config.service_account):
        return None
    template = given.JobTemplatePatch(spec=given.JobSpecPatch(template=given.PodTemplatePatch(spec=pod)))
    nodes = given.ReplicatedJobPatch(name=NODE, template=template)
    jobset = given.JobSetTemplatePatch(spec=given.JobSetSpecPatch(replicated_jobs=[nodes]))
    return given.RuntimePatch(training_runtime_spec=given.TrainingRuntimeSpecPatch(template=jobset))


def _split_timestamp(line: str) -> tuple[tuple[str, str], str]:
    """((second, fraction), text) of a line with its time: fractions may leave out zeros at their end."""
    time_of, _, text = line.partition(" ")
    match = re.match(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?", time_of)
    return ((match[1], (match[2] or "").ljust(9, "0")), text) if match else (("9", ""), line)


def _node_name(pod: V1Pod) -> str:
    """Its node's name as the Trainer SDK gives it, node-0 and on; the pod's own name for other pods."""
    labels = pod.metadata.labels or {}
    role, index = labels.get(ROLE_LABEL, ""), labels.get(INDEX_LABEL, "")
    return f"{role}-{index}" if role and index else str(pod.metadata.name)


def _newest_pods(pods: Iterable[V1Pod]) -> list[V1Pod]:
    """Of each node the pod that was made last, in the order of the nodes."""
    match = {_node_name(pod): pod for pod in sorted(pods, key=lambda pod: str(pod.metadata.creation_timestamp))}
    return [match[name] for name in sorted(match, key=lambda name: (len(name), name))]


def _read_status(phase: Phase, pods: Sequence[V1Pod]) -> Status:
    """The status of a job in this phase, with what its pods say of it."""
    if phase is Phase.FAILED:
        taken = [reason for pod in pods if (reason := _disruption_reason(pod))]
        ended = [reason for pod in pods if (reason := _end_reason(pod))]
        return Status(phase, "; ".join([*taken, *ended][:2]), preempted=bool(taken))
    if phase not in (Phase.PENDING, Phase.RUNNING):
        return Status(phase)
    never = [reason for pod in pods if (reason := _fatal_wait_reason(pod))]
    if never:
        return Status(phase, never[0], hopeless=True)
    waits = [reason for pod in pods if (reason := _unschedulable_reason(pod))] if phase is Phase.PENDING else []
    return Status(phase, waits[0] if waits else "")


def _has_started(pod: V1Pod) -> bool:
    """Whether its container has run, so that there is a log."""
    return bool(pod.status and pod.status.phase in ("Running", "Succeeded", "Failed"))


def _containers(pod: V1Pod) -> list[V1ContainerStatus]:
    status = pod.status
    return [*(status.init_container_statuses or []), *(status.container_statuses or [])] if status else []


def _fatal_wait_reason(pod: V1Pod) -> str:
    for one in _containers(pod):
        waiting = one.state and one.state.waiting
        if waiting and waiting.reason in _FATAL_WAIT_REASONS:
            words = _one_line(waiting.message or "no message", _MAX_MESSAGE_CHARACTERS)
            return f"{_node_name(pod)} cannot start, {waiting.reason} of image {one.image} ({words})"
    return ""


def _unschedulable_reason(pod: V1Pod) -> str:
    for condition in (pod.status and pod.status.conditions) or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            words = _one_line(condition.message or condition.reason or "", _MAX_MESSAGE_CHARACTERS)
            return f"{_node_name(pod)} has no machine yet ({words})"
    return ""


def _disruption_reason(pod: V1Pod) -> str:
    """Kubernetes marks a pod that it takes down for others with the condition DisruptionTarget."""
    reasons = [pod.status.reason] if pod.status and pod.status.reason in _PREEMPTION_REASONS else []
    for condition in (pod.status and pod.status.conditions) or []:
        if condition.type == "DisruptionTarget" and condition.status == "True":
            reasons.append(condition.reason or condition.type)
    return f"{_node_name(pod)}: {reasons[-1]}" if reasons else ""


def _end_reason(pod: V1Pod) -> str:
    for one in _containers(pod):
        ended = one.state and one.state.terminated
        if ended and ended.exit_code:
            return f"{_node_name(pod)}: {ended.reason or 'Error'}, status {ended.exit_code}"
    return ""


@contextlib.contextmanager
def _translate_errors(config: TrainingSettings) -> Iterator[None]:
    """What the cluster refuses, and a cluster that does not answer, as one line."""
    try:
        yield
    except CappyError:
        raise
    except ConfigException as error:
        remedy = "run it where kubectl reaches one, or set KUBECONFIG"
        raise ConfigError(f"--launcher trainjob: no cluster is configured ({_one_line(error)}); {remedy}") from error
    except (RuntimeError, ValueError, ApiException, HTTPError, OSError) as error:
        raise _refusal(error, config) from error


def _refusal(error: BaseException, config: TrainingSettings) -> CappyError:
    place = f"Kubernetes, namespace {config.trainjob.namespace or 'of the current context'}"
    refusals = [one for one in _chain(error) if isinstance(one, ApiException)]
    if not refusals:
        if any(isinstance(one, (HTTPError, OSError)) for one in _chain(error)):  # TimeoutError is an OSError.
            reason = _one_line([*_chain(error)][-1])
            return UnansweredError(f"{place}: gives no answer ({reason}); look whether kubectl reaches it")
        return ConfigError(f"{place}: {_one_line(error)}; mend that setting")
    code, words = refusals[0].status, _api_message(refusals[0])
    if code == 404 and "untime" in str(error):
        remedy = "name one that `kubectl get trainingruntimes,clustertrainingruntimes` lists with --trainjob.runtime"
        runtime = config.trainjob.runtime
        return ConfigError(f"{place}: has no training runtime {runtime!r}, or no Kubeflow Trainer; {remedy}")
    if code == 401:
        return ConfigError(f"{place}: does not know these credentials ({words}); log in again")
    if code == 403 and "quota" in words:
        return ConfigError(f"{place}: the quota is used up ({words}); wait for other jobs, or ask for more")
    if code == 403:
        return ConfigError(f"{place}: no permission ({words}); the service account needs {REQUIRED_PERMISSIONS}")
    if code == 429 or code is None or code >= 500:
        return UnansweredError(f"{place}: cannot answer now (status {code}, {words}); run the same command again later")
    return ConfigError(f"{place}: refused (status {code}, {words}); mend that, then run the same command again")


def _api_message(error: ApiException) -> str:
    """The API server's words, which lie in a JSON body."""
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        return _one_line(json.loads(error.body)["message"])
    return _one_line(error.reason or error.body or "no reason given")


def _status_code(error: BaseException) -> int | None:
    codes: Iterable[int | None] = (one.status for one in _chain(error) if isinstance(one, ApiException))
    return next(iter(codes), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _one_line(words: object, longest: int = 200) -> str:
    return quote(" ".join(str(words).split()), longest)
