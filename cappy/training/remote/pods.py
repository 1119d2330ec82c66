"""What the pods of a TrainJob say: why they wait, why they ended, whether their machine was taken away."""

from collections.abc import Iterable, Sequence
from typing import Any

from cappy.errors import shown
from cappy.training.remote.following import Phase, Status

INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
ROLE_LABEL = "jobset.sigs.k8s.io/replicatedjob-name"
NEVER = ("ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "CreateContainerConfigError")
"""Reasons of a waiting container that time does not mend: no such image, or a secret that is not there."""
TAKEN = ("Evicted", "Preempting", "Preempted", "NodeShutdown", "NodeLost", "Shutdown", "Terminated", "NodeAffinity")
"""Reasons of a pod that its node ended."""
_LONGEST = 160


def node_of(pod: Any) -> str:
    """Its node's name as the Trainer SDK gives it, node-0 and on; the pod's own name for other pods."""
    labels = pod.metadata.labels or {}
    role, index = labels.get(ROLE_LABEL, ""), labels.get(INDEX_LABEL, "")
    return f"{role}-{index}" if role and index else str(pod.metadata.name)


def newest(pods: Iterable[Any]) -> list[Any]:
    """Of each node the pod that was made last, in the order of the nodes."""
    found = {node_of(pod): pod for pod in sorted(pods, key=lambda pod: str(pod.metadata.creation_timestamp))}
    return [found[name] for name in sorted(found, key=lambda name: (len(name), name))]


def read(phase: Phase, pods: Sequence[Any]) -> Status:
    """The status of a job in this phase, with what its pods say of it."""
    if phase is Phase.FAILED:
        taken = [reason for pod in pods if (reason := _taken(pod))]
        ended = [reason for pod in pods if (reason := _ended(pod))]
        return Status(phase, "; ".join([*taken, *ended][:2]), preempted=bool(taken))
    if phase not in (Phase.PENDING, Phase.RUNNING):
        return Status(phase)
    never = [reason for pod in pods if (reason := _never(pod))]
    if never:
        return Status(phase, never[0], hopeless=True)
    waits = [reason for pod in pods if (reason := _unscheduled(pod))] if phase is Phase.PENDING else []
    return Status(phase, waits[0] if waits else "")


def started(pod: Any) -> bool:
    """Whether its container has run, so that there is a log."""
    return bool(pod.status and pod.status.phase in ("Running", "Succeeded", "Failed"))


def _containers(pod: Any) -> list[Any]:
    status = pod.status
    return [*(status.init_container_statuses or []), *(status.container_statuses or [])] if status else []


def _never(pod: Any) -> str:
    for one in _containers(pod):
        waiting = one.state and one.state.waiting
        if waiting and waiting.reason in NEVER:
            words = _line(waiting.message or "no message")
            return f"{node_of(pod)} cannot start, {waiting.reason} of image {one.image} ({words})"
    return ""


def _unscheduled(pod: Any) -> str:
    for condition in (pod.status and pod.status.conditions) or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return f"{node_of(pod)} has no machine yet ({_line(condition.message or condition.reason or '')})"
    return ""


def _taken(pod: Any) -> str:
    """Kubernetes marks a pod that it takes down for others with the condition DisruptionTarget."""
    reasons = [pod.status.reason] if pod.status and pod.status.reason in TAKEN else []
    for condition in (pod.status and pod.status.conditions) or []:
        if condition.type == "DisruptionTarget" and condition.status == "True":
            reasons.append(condition.reason or condition.type)
    return f"{node_of(pod)}: {reasons[-1]}" if reasons else ""


def _ended(pod: Any) -> str:
    for one in _containers(pod):
        ended = one.state and one.state.terminated
        if ended and ended.exit_code:
            return f"{node_of(pod)}: {ended.reason or 'Error'}, status {ended.exit_code}"
    return ""


def _line(text: str) -> str:
    return shown(" ".join(text.split()), _LONGEST)
