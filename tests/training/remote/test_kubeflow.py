"""TrainJobs, by the real Trainer SDK against a server that takes what the SDK's own types know.

It shows what is asked of Kubernetes and how its answers are read, not that a cluster grants it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from trainjob_server import Cluster, trainjob_server
from wording import assert_names

from cappy.config import decode
from cappy.errors import CappyError, ConfigError, UnansweredError
from cappy.training.finetuning import FinetuningConfig
from cappy.training.remote.following import Phase, Status

pytest.importorskip(
    "kubeflow.trainer", reason="the Kubeflow Trainer SDK is not installed: pip install 'cappy-scorer[train]'"
)
# The Kubernetes client 30 warns of its own use of deprecated calls.
pytestmark = pytest.mark.filterwarnings("ignore")
Plan = Callable[..., FinetuningConfig]
NAME = "cappy-finetuning-0"


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with trainjob_server() as result:
        yield result


@pytest.fixture
def jobs(cluster: Cluster, plan: Plan) -> Callable[..., Any]:
    """jobs(**settings) -> the TrainJobs of a step with these settings, in the server's namespace `ml`."""

    def make(**values: Any) -> Any:
        from kubeflow import trainer as sdk
        from kubeflow.common.types import KubernetesBackendConfig
        from kubernetes import client

        from cappy.training.remote.kubeflow import TrainJobs

        settings = plan(**{"launcher": "trainjob", "trainjob": {"namespace": "ml"}, **values})
        reached = client.Configuration(host=cluster.address)
        reached.retries = False
        backend = KubernetesBackendConfig(namespace="ml", client_configuration=reached)
        return TrainJobs(
            "finetuning", settings, plan(nodes=settings.nodes), {"A": "b"}, client=sdk.TrainerClient(backend)
        )

    return make


def refused(call: Callable[[], object], kind: type[CappyError] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_trainjob_asks_for_the_nodes_their_devices_the_volume_and_an_end(
    cluster: Cluster, jobs: Callable[..., Any], tmp_path: Path
) -> None:
    result = jobs(
        nodes=3,
        devices=4,
        trainjob={
            "namespace": "ml",
            "accelerator": "gpu",
            "cpu": "8",
            "memory": "64Gi",
            "volume": f"shared:{tmp_path}",
        },
        image="trainer:1",
        scorer="builtin:tiny",
        service_account="trainer",
        timeout_hours=2.0,
    )
    assert result.status(NAME) is None
    result.submit(NAME)
    spec = cluster.jobs[NAME]["spec"]
    assert spec["runtimeRef"] == {"name": "cappy-torch", "kind": "ClusterTrainingRuntime"}
    assert spec["activeDeadlineSeconds"] == 7200
    assert (spec["trainer"]["numNodes"], spec["trainer"]["image"]) == (3, "trainer:1")
    assert spec["trainer"]["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": 4, "cpu": "8", "memory": "64Gi"}
    actual = {one["name"]: one["value"] for one in spec["trainer"]["env"]}
    assert (actual["A"], actual["CAPPY_TRAINING_STEP"]) == ("b", "finetuning")
    assert decode(actual["CAPPY_TRAINING_SETTINGS"])["launcher"] == "here", "a job must not submit a job"
    (patch,) = spec["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "trainer"
    assert pod["volumes"] == [{"name": "work", "persistentVolumeClaim": {"claimName": "shared"}}]
    assert pod["containers"][0]["volumeMounts"] == [{"name": "work", "mountPath": str(tmp_path)}]


def test_the_trainer_asks_for_the_nodes_of_the_plan(plan: Plan) -> None:
    from cappy.training.remote.kubeflow import trainer

    job = trainer("finetuning", plan(nodes=3), image="trainer:1", resources={"gpu": 4}, environment={"A": "b"})
    assert (job.num_nodes, job.image, job.resources_per_node) == (3, "trainer:1", {"gpu": 4})
    assert job.env is not None
    assert job.env["A"] == "b"
    assert not job.packages_to_install


def test_a_trainjob_without_a_volume_leaves_the_runtimes_pods_as_they_are(
    cluster: Cluster, jobs: Callable[..., Any]
) -> None:
    jobs().submit(NAME)
    assert "runtimePatches" not in cluster.jobs[NAME]["spec"]


def test_a_trainjob_waits_runs_and_succeeds(cluster: Cluster, jobs: Callable[..., Any]) -> None:
    result = jobs()
    result.submit(NAME)
    assert result.status(NAME) == Status(Phase.PENDING)
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no gpu\nfree"}
    cluster.pod(NAME, 0, "Pending", conditions=[condition])
    waits = result.status(NAME)
    assert (waits.phase, waits.cannot_start) == (Phase.PENDING, False)
    assert_names(waits.reason, "node-0", "'no gpu free'")
    cluster.pod(NAME, 0, "Running")
    assert result.status(NAME) == Status(Phase.RUNNING)
    cluster.end(NAME, "Complete")
    assert result.status(NAME) == Status(Phase.SUCCEEDED)


def waiting(reason: str, message: str) -> list[dict[str, Any]]:
    state = {"waiting": {"reason": reason, "message": message}}
    return [{"name": "node", "image": "absent:1", "imageID": "", "ready": False, "restartCount": 0, "state": state}]


def ended(status: int, reason: str) -> list[dict[str, Any]]:
    state = {"terminated": {"exitCode": status, "reason": reason}}
    return [{"name": "node", "image": "a:1", "imageID": "", "ready": False, "restartCount": 0, "state": state}]


def test_an_image_that_cannot_be_pulled_cannot_start_and_is_reported(
    cluster: Cluster, jobs: Callable[..., Any]
) -> None:
    result = jobs()
    result.submit(NAME)
    cluster.pod(NAME, 0, "Pending", containerStatuses=waiting("ErrImagePull", "not found"))
    assert not result.status(NAME).cannot_start, "it is tried again first"
    cluster.pod(NAME, 0, "Pending", containerStatuses=waiting("ImagePullBackOff", "not\nfound"))
    status = result.status(NAME)
    assert status.cannot_start
    assert_names(status.reason, "node-0", "ImagePullBackOff", "absent:1", "'not found'")


@pytest.mark.parametrize(
    ("status", "preempted", "words"),
    [
        ({"containerStatuses": ended(1, "Error")}, False, "node-1: Error, status 1"),
        ({"containerStatuses": ended(137, "OOMKilled")}, False, "node-1: OOMKilled, status 137"),
        ({"reason": "Evicted"}, True, "node-1: Evicted"),
        (
            {"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}]},
            True,
            "node-1: PreemptionByScheduler",
        ),
    ],
)
def test_why_a_trainjob_failed_and_whether_its_machine_was_taken_is_read_from_its_pods(
    status: dict[str, Any], preempted: bool, words: str, cluster: Cluster, jobs: Callable[..., Any]
) -> None:
    result = jobs()
    result.submit(NAME)
    cluster.pod(NAME, 0, "Running")
    cluster.pod(NAME, 1, "Failed", **status)
    cluster.end(NAME, "Failed")
    assert result.status(NAME) == Status(Phase.FAILED, words, preempted=preempted)


def test_of_a_node_whose_pod_was_replaced_the_pod_that_was_made_last_counts(
    cluster: Cluster, jobs: Callable[..., Any]
) -> None:
    result = jobs()
    result.submit(NAME)
    cluster.pod(NAME, 0, "Failed", attempt="z", at="2026-01-01T00:00:09Z", reason="Evicted")
    cluster.pod(NAME, 0, "Failed", attempt="a", at="2026-01-01T00:01:00Z", containerStatuses=ended(1, "Error"))
    cluster.logs = {f"{NAME}-node-0-0-{one}": [("2026-01-01T00:01:01Z", one)] for one in "az"}
    assert list(result.lines(NAME)) == [("node-0", "a")]
    cluster.end(NAME, "Failed")
    assert result.status(NAME) == Status(Phase.FAILED, "node-0: Error, status 1")


def test_every_line_of_every_node_is_reported_once_and_a_line_that_is_json_as_it_is(
    cluster: Cluster, jobs: Callable[..., Any]
) -> None:
    result = jobs()
    result.submit(NAME)
    cluster.pod(NAME, 0, "Running")
    cluster.pod(NAME, 1, "Pending")
    log = cluster.logs.setdefault(f"{NAME}-node-0-0-a", [("2026-01-01T00:00:00.5Z", '{"a": true}')])
    assert list(result.lines(NAME)) == [("node-0", '{"a": true}')]
    assert list(result.lines(NAME)) == []
    log += [("2026-01-01T00:00:00.500000001Z", "b"), ("2026-01-01T00:00:01Z", "c")]
    cluster.pod(NAME, 1, "Running")
    cluster.logs[f"{NAME}-node-0-1-a"] = [("2026-01-01T00:00:00Z", "")]
    assert list(result.lines(NAME)) == [("node-0", "b"), ("node-0", "c"), ("node-1", "")]
    assert "sinceSeconds" not in cluster.queries[0]
    assert int(cluster.queries[-2]["sinceSeconds"][0]) < 60, "a log of days is not read whole at every look"


def test_a_failed_trainjob_goes_with_its_pods_before_another_of_its_name_is_made(
    cluster: Cluster, jobs: Callable[..., Any]
) -> None:
    result = jobs()
    result.submit(NAME)
    cluster.pod(NAME, 0, "Failed")
    cluster.end(NAME, "Failed")
    result.submit(NAME)
    changes = [call.partition(" ")[0] for call in cluster.calls if "/trainjobs" in call and not call.startswith("GET")]
    assert changes == ["POST", "DELETE", "POST"]
    assert result.status(NAME) == Status(Phase.PENDING)


def test_a_running_trainjob_is_not_submitted_over(cluster: Cluster, jobs: Callable[..., Any]) -> None:
    result = jobs()
    result.submit(NAME)
    cluster.pod(NAME, 0, "Running")
    assert_names(refused(lambda: result.submit(NAME), UnansweredError), NAME, "running", "same command")


def test_cancelling_deletes_it_and_is_done_where_there_is_none(cluster: Cluster, jobs: Callable[..., Any]) -> None:
    result = jobs()
    result.submit(NAME)
    result.cancel(NAME)
    assert cluster.jobs == {}
    result.cancel(NAME)
    assert result.status(NAME) is None


@pytest.mark.parametrize(
    ("answer", "kind", "names"),
    [
        ((401, "Unauthorized"), ConfigError, ("'Unauthorized'", "credentials", "log in again")),
        ((403, "trainjobs is forbidden"), ConfigError, ("'trainjobs is forbidden'", "service account")),
        ((403, "exceeded quota: gpus"), ConfigError, ("'exceeded quota: gpus'", "the quota", "wait for other jobs")),
        ((422, "spec is\ninvalid"), ConfigError, ("422", "'spec is invalid'", "same command")),
        ((503, "etcd is away"), UnansweredError, ("503", "'etcd is away'", "again later")),
    ],
)
def test_what_the_cluster_refuses_is_one_line(
    answer: tuple[int, str], kind: type[CappyError], names: tuple[str, ...], cluster: Cluster, jobs: Callable[..., Any]
) -> None:
    result = jobs()
    cluster.refuse["POST trainjobs"] = answer
    assert_names(refused(lambda: result.submit(NAME), kind), *names)


def test_a_missing_right_to_look_at_pods_is_reported_before_anything_is_submitted(
    cluster: Cluster, jobs: Callable[..., Any]
) -> None:
    result = jobs()
    cluster.refuse["GET pods"] = (403, "pods is forbidden")
    assert_names(refused(lambda: result.status(NAME)), "'pods is forbidden'", "service account", "list on pods")


def test_a_runtime_that_the_cluster_lacks_is_reported_by_name(jobs: Callable[..., Any]) -> None:
    result = jobs(trainjob={"namespace": "ml", "runtime": "absent"})
    assert_names(refused(lambda: result.submit(NAME)), "'absent'", "kubectl get trainingruntimes", "--trainjob.runtime")


def test_a_cluster_that_cannot_be_reached_is_one_line(
    cluster: Cluster, jobs: Callable[..., Any], plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kubernetes.config import kube_config

    from cappy.training.remote.kubeflow import connect

    result = jobs()
    result.core.api_client.configuration.host = "http://127.0.0.1:1"
    assert_names(refused(lambda: result.status(NAME), UnansweredError), "namespace ml", "kubectl")
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    assert_names(refused(lambda: connect(plan(launcher="trainjob"))), "--launcher trainjob", "set KUBECONFIG")
