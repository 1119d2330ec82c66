"""A training step as a TrainJob, by the Kubeflow Trainer SDK (0.5), whose cluster is that of the kubeconfig or the pod.

The SDK has no option for owner references, so a TrainJob outlives the pod that submitted it: the step cancels it, and
its own deadline ends one whose step was killed without a chance to.
"""

import contextlib
import json
import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cappy.errors import CappyError, ConfigError, UnansweredError, shown
from cappy.training.remote import pods
from cappy.training.remote.following import OVER, Phase, Status
from cappy.training.settings import TrainingSettings, mount_point, per_node
from cappy.training.trainjob import trainer

try:
    from kubeflow import trainer as sdk
    from kubeflow.common.types import KubernetesBackendConfig
    from kubeflow.trainer import options as given
    from kubernetes.client import ApiException
    from kubernetes.config import ConfigException
    from urllib3.exceptions import HTTPError
except ModuleNotFoundError as missing:
    raise ConfigError(f"--launcher trainjob: needs {missing.name}; pip install 'cappy-scorer[train]'") from missing

PHASES = {"Created": Phase.PENDING, "Running": Phase.RUNNING, "Complete": Phase.SUCCEEDED, "Failed": Phase.FAILED}
NODE = "node"
"""The SDK's name of a runtime's replicated job and container that train."""
GONE_SECONDS = 300.0
"""How long the pods of a job that is over are waited for before another of its name takes their place."""
FIRST_LINES = 1000
"""Lines of a log that ran before this step followed it."""
MARGIN_SECONDS = 5
"""Lines asked for twice and told once: between two looks no line may fall."""
RIGHTS = "create, get, delete on trainjobs; get on trainingruntimes, clustertrainingruntimes, pods/log; list on pods"


class TrainJobs:
    """TrainJobs of one step: `plan` says where, `inner` what each rank does."""

    def __init__(
        self,
        step: str,
        plan: TrainingSettings,
        inner: TrainingSettings,
        environment: Mapping[str, str],
        client: Any = None,
    ) -> None:
        self.plan = plan
        self.trainer = trainer(
            step,
            inner,
            image=plan.image or None,
            resources=per_node(plan),
            environment=environment,
        )
        self.client = client or connect(plan)
        backend = getattr(self.client, "backend", None)
        self.core: Any = getattr(backend, "core_api", None)
        self.namespace: str = getattr(backend, "namespace", "")
        self._last: dict[str, tuple[str, str]] = {}
        self._looked: dict[str, float] = {}

    def status(self, name: str) -> Status | None:
        """How it is, with what its pods say."""
        with _told(self.plan):
            # First, so that a right to look at pods that is missing is told before anything is submitted.
            found = self._pods(name)
            try:
                job = self.client.get_job(name)
            except RuntimeError as error:
                if str(error).startswith("Failed to get TrainJob") and _code(error) == 404:
                    return None
                raise
            return pods.read(PHASES[job.status], found)

    def submit(self, name: str) -> None:
        """Creates the TrainJob, once one of this name that is over is gone with its pods."""
        with _told(self.plan):
            self._clear(name)
            self.client.train(runtime=self.plan.runtime, trainer=self.trainer, options=_options(name, self.plan))

    def lines(self, name: str) -> Iterator[tuple[str, str]]:
        """New lines of the pods' logs, node by node."""
        with _told(self.plan):
            for pod in self._pods(name):
                if pods.started(pod):
                    yield from ((pods.node_of(pod), line) for line in self._new_lines(pod.metadata.name))

    def cancel(self, name: str) -> None:
        """Deletes it, and with it its pods, which get SIGTERM."""
        with _told(self.plan):
            try:
                self.client.delete_job(name)
            except RuntimeError as error:
                if _code(error) != 404:
                    raise

    def address(self, name: str) -> str:
        """The command that shows it."""
        return f"kubectl -n {self.namespace} describe trainjob {name}"

    def _pods(self, name: str) -> list[Any]:
        if self.core is None:
            return []
        label = f"jobset.sigs.k8s.io/jobset-name={name}"
        return pods.newest(self.core.list_namespaced_pod(self.namespace, label_selector=label).items)

    def _clear(self, name: str) -> None:
        found = self.status(name)
        if found is None:
            return
        if found.phase not in OVER:
            raise UnansweredError(f"TrainJob {name}: {found.phase.value} already; run the same command again")
        self.client.delete_job(name)
        end = time.monotonic() + GONE_SECONDS
        while self.status(name) is not None or self._pods(name):
            if time.monotonic() > end:
                raise ConfigError(f"TrainJob {name}: its pods do not go; look with {self.address(name)}")
            time.sleep(1)

    def _new_lines(self, pod: str) -> list[str]:
        """By the time before each line: pods give their log from a second on, not from a line on."""
        now = time.monotonic()
        since = {"since_seconds": int(now - self._looked[pod]) + MARGIN_SECONDS} if pod in self._looked else {}
        try:
            # Unread: the client would take a line that is JSON for a value and write it otherwise.
            answer = self.core.read_namespaced_pod_log(
                pod,
                self.namespace,
                container=NODE,
                timestamps=True,
                _preload_content=False,
                **(since or {"tail_lines": FIRST_LINES}),
            )
        except ApiException as error:
            if error.status in (400, 404):  # Its container is only just being made, or is gone.
                return []
            raise
        self._looked[pod] = now
        stamped = [_stamped(line) for line in answer.data.decode(errors="replace").splitlines()]
        fresh = [(stamp, line) for stamp, line in stamped if stamp > self._last.get(pod, ("", ""))]
        if fresh:
            self._last[pod] = fresh[-1][0]
        return [line for _, line in fresh]


def connect(plan: TrainingSettings) -> Any:
    """The SDK's client of the current cluster; ConfigError where there is none."""
    # It warns of a config map that people without a right to the system's namespace cannot read.
    logging.getLogger("kubeflow").setLevel(logging.ERROR)
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    with _told(plan):
        return sdk.TrainerClient(KubernetesBackendConfig(namespace=plan.namespace or None))


def _options(name: str, plan: TrainingSettings) -> list[Any]:
    found: list[Any] = [given.Name(name), given.ActiveDeadlineSeconds(int(plan.timeout_hours * 3600))]
    patch = _patch(plan)
    return [*found, patch] if patch else found


def _patch(plan: TrainingSettings) -> Any:
    """What of the runtime's pods is this job's own: the volume and the service account."""
    claim, folder = plan.volume.partition(":")[0], mount_point(plan.volume)
    pod = given.PodSpecPatch(
        service_account_name=plan.service_account or None,
        volumes=[{"name": "work", "persistentVolumeClaim": {"claimName": claim}}] if claim else None,
        containers=[given.ContainerPatch(name=NODE, volume_mounts=[{"name": "work", "mountPath": folder}])]
        if claim
        else None,
    )
    if not (claim or plan.service_account):
        return None
    template = given.JobTemplatePatch(spec=given.JobSpecPatch(template=given.PodTemplatePatch(spec=pod)))
    nodes = given.ReplicatedJobPatch(name=NODE, template=template)
    jobset = given.JobSetTemplatePatch(spec=given.JobSetSpecPatch(replicated_jobs=[nodes]))
    return given.RuntimePatch(training_runtime_spec=given.TrainingRuntimeSpecPatch(template=jobset))


def _stamped(line: str) -> tuple[tuple[str, str], str]:
    """((second, fraction), text) of a line with its time: fractions may leave out zeros at their end."""
    time_of, _, text = line.partition(" ")
    found = re.match(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?", time_of)
    return ((found[1], (found[2] or "").ljust(9, "0")), text) if found else (("9", ""), line)


@contextlib.contextmanager
def _told(plan: TrainingSettings) -> Iterator[None]:
    """What the cluster refuses, and a cluster that does not answer, as one line."""
    try:
        yield
    except CappyError:
        raise
    except ConfigException as error:
        remedy = "run it where kubectl reaches one, or set KUBECONFIG"
        raise ConfigError(f"--launcher trainjob: no cluster is configured ({_line(error)}); {remedy}") from error
    except (RuntimeError, ValueError, ApiException, HTTPError, OSError) as error:
        raise _refusal(error, plan) from error


def _refusal(error: BaseException, plan: TrainingSettings) -> CappyError:
    place = f"Kubernetes, namespace {plan.namespace or 'of the current context'}"
    refusals = [one for one in _chain(error) if isinstance(one, ApiException)]
    if not refusals:
        if any(isinstance(one, (HTTPError, OSError)) for one in _chain(error)):  # TimeoutError is an OSError.
            reason = _line([*_chain(error)][-1])
            return UnansweredError(f"{place}: gives no answer ({reason}); look whether kubectl reaches it")
        return ConfigError(f"{place}: {_line(error)}; mend that setting")
    code, words = refusals[0].status, _message(refusals[0])
    if code == 404 and "untime" in str(error):
        remedy = "name one that `kubectl get trainingruntimes,clustertrainingruntimes` lists with --runtime"
        return ConfigError(f"{place}: has no training runtime {plan.runtime!r}, or no Kubeflow Trainer; {remedy}")
    if code == 401:
        return ConfigError(f"{place}: does not know these credentials ({words}); log in again")
    if code == 403 and "quota" in words:
        return ConfigError(f"{place}: the quota is used up ({words}); wait for other jobs, or ask for more")
    if code == 403:
        return ConfigError(f"{place}: no permission ({words}); the service account needs {RIGHTS}")
    if code == 429 or code is None or code >= 500:
        return UnansweredError(f"{place}: cannot answer now (status {code}, {words}); run the same command again later")
    return ConfigError(f"{place}: refused (status {code}, {words}); mend that, then run the same command again")


def _message(error: Any) -> str:
    """The API server's words, which lie in a JSON body."""
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        return _line(json.loads(error.body)["message"])
    return _line(error.reason or error.body or "no reason given")


def _code(error: BaseException) -> int | None:
    codes: Iterable[int | None] = (one.status for one in _chain(error) if isinstance(one, ApiException))
    return next(iter(codes), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _line(error: object) -> str:
    return shown(" ".join(str(error).split()), 200)
