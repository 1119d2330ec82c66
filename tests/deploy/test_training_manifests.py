"""Training in a cluster: the runtime as the Trainer SDK reads it, the rights that it needs, the volume of the work."""

from pathlib import Path
from typing import Any

import pytest
from kubernetes_api import Cluster, cluster
from manifests import Object, containers, only, pods, rendered, variables

from cappy.config import build
from cappy.training.finetuning import FinetuningConfig

pytest.importorskip(
    "kubeflow.trainer", reason="the Kubeflow Trainer SDK is not installed: pip install 'cappy-scorer[train]'"
)

from cappy.training.remote.kubeflow import TrainJobs, trainer


def runtime(overlay: str) -> Object:
    kind = "TrainingRuntime" if overlay == "training" else "ClusterTrainingRuntime"
    return only(rendered(overlay), kind, "cappy-torch")


@pytest.mark.parametrize("overlay", ["training", "training-shared"])
def test_trainers_own_models_know_every_field(overlay: str) -> None:
    """They drop what they do not know without a word, so what went in must come out."""
    from kubeflow_trainer_api import models

    def again(value: Object) -> Any:
        made = getattr(models, f"TrainerV1alpha1{value['kind']}").from_dict(value)
        assert made is not None
        return made.to_dict()

    given = runtime(overlay)
    assert again(given) == given
    # What older releases took, and this one drops.
    given["spec"]["mlPolicy"] = {**given["spec"]["mlPolicy"], "torch": {"numProcPerNode": "auto"}}
    assert again(given) != given


def test_the_shared_runtime_is_the_namespaces_own_without_a_namespace() -> None:
    own, shared = runtime("training"), runtime("training-shared")
    assert own["metadata"].pop("namespace") == "kubeflow"
    assert {**own, "kind": "ClusterTrainingRuntime"} == shared


def test_ranks_find_the_work_folder_on_a_volume_that_all_nodes_may_write_to() -> None:
    objects = rendered("training")
    claim = only(objects, "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    (result,) = containers(objects)
    (volume,) = [one for one in result[0].spec["volumes"] if "persistentVolumeClaim" in one]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"] == "cappy-work"
    assert {"name": volume["name"], "mountPath": "/data"} in result[1]["volumeMounts"]


def test_a_rank_that_fails_takes_its_job_with_it_and_all_begin_again() -> None:
    spec = runtime("training")["spec"]["template"]["spec"]
    assert spec["failurePolicy"]["maxRestarts"] >= 1
    (job,) = spec["replicatedJobs"]
    assert job["template"]["spec"]["backoffLimit"] == 0
    assert job["template"]["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def client_of(cluster: Cluster) -> Any:
    from kubeflow.trainer import KubernetesBackendConfig, TrainerClient
    from kubernetes.client import Configuration

    reached = Configuration(host=cluster.address)
    return TrainerClient(KubernetesBackendConfig(namespace="kubeflow", client_configuration=reached))


def followed(client: Any, folder: Path) -> str:
    """Starts a job of two nodes as a step does, follows it and reads its logs; returns its name."""
    places = {"source": folder / "annotated", "target": folder / "scorer", "work": folder / "work"}
    plan = build(FinetuningConfig, {**places, "scorer": "builtin:tiny", "nodes": 2, "parallelism": "ddp"})
    name: str = client.train(runtime=client.get_runtime("cappy-torch"), trainer=trainer("finetuning", plan))
    assert client.wait_for_job_status(name, status={"Running", "Created"}, polling_interval=1).num_nodes == 2
    assert list(client.get_job_logs(name)) == ["one line", "another"]
    assert next(iter(client.get_job_logs(name, follow=True))) == "one line"
    client.get_job_events(name)
    client.list_jobs()
    return name


def test_the_trainer_sdk_starts_our_runtime_with_our_image_and_two_nodes(tmp_path: Path) -> None:
    with cluster([runtime("training")], next(pods(rendered("training"))).spec) as actual:
        job = actual.jobs[followed(client_of(actual), tmp_path)]
    assert job["spec"]["runtimeRef"] == {"kind": "TrainingRuntime", "name": "cappy-torch"}
    assert job["spec"]["trainer"]["numNodes"] == 2
    assert "image" not in job["spec"]["trainer"], "the runtime's image is the one"
    # The command writes a file into the working folder, which therefore must be writable.
    assert job["spec"]["trainer"]["command"][0] == "bash"
    (result,) = containers(rendered("training"))
    assert result[1]["workingDir"] == variables(result[1])["HOME"]


def driven(actual: Cluster, folder: Path) -> None:
    """Starts a job as a step does, follows it, reads its logs and ends it."""
    places = {"source": folder / "annotated", "target": folder / "scorer", "work": folder / "work"}
    settings = {"scorer": "builtin:tiny", "nodes": 2, "parallelism": "ddp", "launcher": "trainjob"}
    plan = build(FinetuningConfig, {**places, **settings, "trainjob": {"namespace": "kubeflow"}})
    jobs = TrainJobs("finetuning", plan, plan, {}, client=client_of(actual))
    assert jobs.status("cappy-finetuning-0") is None
    jobs.submit("cappy-finetuning-0")
    assert jobs.status("cappy-finetuning-0") is not None
    assert list(jobs.lines("cappy-finetuning-0")) == [("node-0", "one line"), ("node-0", "another")]
    jobs.cancel("cappy-finetuning-0")


def test_the_role_allows_all_that_a_step_asks_for_and_not_one_verb_more(tmp_path: Path) -> None:
    with cluster([runtime("training")], next(pods(rendered("training"))).spec) as actual:
        driven(actual, tmp_path)
    # The SDK looks for a version note of Kubeflow's own in another namespace, and goes on without.
    asked = {request for request in actual.requests if request.namespace == "kubeflow"}
    assert {request.resource for request in set(actual.requests) - asked} <= {"configmaps"}
    (role,) = (one for one in rendered("training") if one["metadata"]["name"] == "cappy-trainjobs" and "rules" in one)
    assert granted([role]) == {(one.verb, one.group, one.resource) for one in asked}
    assert {one.name for one in asked if one.resource == "trainingruntimes"} == {"cappy-torch"}


def granted(roles: list[Object]) -> set[tuple[str, str, str]]:
    return {
        (verb, group, resource)
        for role in roles
        for rule in role["rules"]
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


@pytest.mark.parametrize("overlay", ["training", "training-shared"])
def test_pipelines_may_ask_for_nothing_by_a_wildcard_and_open_no_secret_but_by_its_name(overlay: str) -> None:
    roles = [one for one in rendered(overlay) if one["kind"] in ("Role", "ClusterRole")]
    assert not any("*" in part for right in granted(roles) for part in right)
    assert not {resource for _, _, resource in granted(roles)} & {"pods/exec", "pods/attach", "pods/portforward"}
    for role in roles:
        for rule in role["rules"]:
            named = {"secrets", "configmaps", "trainingruntimes", "clustertrainingruntimes"} & set(rule["resources"])
            assert not named or rule.get("resourceNames"), rule
    # Only the one kind that is the whole cluster's is read there.
    shared = [one for one in roles if one["kind"] == "ClusterRole"]
    assert granted(shared) <= {("get", "trainer.kubeflow.org", "clustertrainingruntimes")}
    bound = {one["roleRef"]["name"] for one in rendered(overlay) if one["kind"].endswith("RoleBinding")}
    assert bound == {one["metadata"]["name"] for one in roles}


def test_the_rights_go_to_the_account_of_pipelines() -> None:
    for overlay in ("training", "training-shared"):
        objects = rendered(overlay)
        known = {one["metadata"]["name"] for one in objects if one["kind"] in ("Role", "ClusterRole")}
        for binding in (one for one in objects if one["kind"].endswith("RoleBinding")):
            (subject,) = binding["subjects"]
            assert subject == {"kind": "ServiceAccount", "name": "cappy-pipelines", "namespace": "kubeflow"}
            assert binding["roleRef"]["name"] in known


def test_a_shared_runtime_can_be_read_by_pipelines() -> None:
    rules = only(rendered("training-shared"), "ClusterRole")["rules"]
    assert rules == [
        {
            "apiGroups": ["trainer.kubeflow.org"],
            "resources": ["clustertrainingruntimes"],
            "resourceNames": ["cappy-torch"],
            "verbs": ["get"],
        }
    ]
