"""Training in a cluster: the runtime as the Trainer SDK reads it, the rights that it needs, the volume of the work."""

from pathlib import Path
from typing import Any

import pytest
from kubernetes_api import Cluster, Request, cluster
from manifests import Object, containers, only, pods, rendered, variables

from cappy.config import build
from cappy.training.finetuning import FinetuningConfig
from cappy.training.trainjob import trainer

pytest.importorskip(
    "kubeflow.trainer", reason="the Kubeflow Trainer SDK is not installed: pip install 'cappy-scorer[train]'"
)


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
    (found,) = containers(objects)
    (volume,) = [one for one in found[0].spec["volumes"] if "persistentVolumeClaim" in one]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"] == "cappy-work"
    assert {"name": volume["name"], "mountPath": "/data"} in found[1]["volumeMounts"]


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
    plan = build(FinetuningConfig, {**places, "scorer": "builtin", "nodes": 2, "strategy": "ddp"})
    name: str = client.train(runtime=client.get_runtime("cappy-torch"), trainer=trainer("finetuning", plan))
    assert client.wait_for_job_status(name, status={"Running", "Created"}, polling_interval=1).num_nodes == 2
    assert list(client.get_job_logs(name)) == ["one line", "another"]
    assert next(iter(client.get_job_logs(name, follow=True))) == "one line"
    client.get_job_events(name)
    client.list_jobs()
    return name


def test_the_trainer_sdk_starts_our_runtime_with_our_image_and_two_nodes(tmp_path: Path) -> None:
    with cluster([runtime("training")], next(pods(rendered("training"))).spec) as told:
        job = told.jobs[followed(client_of(told), tmp_path)]
    assert job["spec"]["runtimeRef"] == {"kind": "TrainingRuntime", "name": "cappy-torch"}
    assert job["spec"]["trainer"]["numNodes"] == 2
    assert "image" not in job["spec"]["trainer"], "the runtime's image is the one"
    # The command writes a file into the working folder, which therefore must be writable.
    assert job["spec"]["trainer"]["command"][0] == "bash"
    (found,) = containers(rendered("training"))
    assert found[1]["workingDir"] == variables(found[1])["HOME"]


def allowed(request: Request, rules: list[Object]) -> bool:
    return any(
        request.group in rule["apiGroups"] and request.resource in rule["resources"] and request.verb in rule["verbs"]
        for rule in rules
    )


def test_the_role_allows_all_that_the_sdk_asks_for_and_no_more_than_that(tmp_path: Path) -> None:
    with cluster([runtime("training")], next(pods(rendered("training"))).spec) as told:
        client = client_of(told)
        client.delete_job(followed(client, tmp_path))
    # The SDK looks for a version note of Kubeflow's own in another namespace, and goes on without.
    asked = {request for request in told.requests if request.namespace == "kubeflow"}
    assert {request.resource for request in set(told.requests) - asked} <= {"configmaps"}
    role = only(rendered("training"), "Role")
    refused = [request for request in asked if not allowed(request, role["rules"])]
    assert refused == []
    granted = {
        (verb, group, resource)
        for rule in role["rules"]
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    spare = granted - {(one.verb, one.group, one.resource) for one in asked}
    # What a person's tools ask for beside: kubectl get, --watch.
    assert spare <= {
        ("watch", "trainer.kubeflow.org", "trainjobs"),
        ("list", "trainer.kubeflow.org", "trainingruntimes"),
        ("get", "", "pods"),
        ("watch", "", "pods"),
    }


def test_the_rights_go_to_the_account_of_pipelines() -> None:
    for overlay in ("training", "training-shared"):
        objects = rendered(overlay)
        known = {one["metadata"]["name"] for one in objects if one["kind"] in ("Role", "ClusterRole")}
        for binding in (one for one in objects if one["kind"].endswith("RoleBinding")):
            (subject,) = binding["subjects"]
            assert subject == {"kind": "ServiceAccount", "name": "cappy-pipelines", "namespace": "kubeflow"}
            # The last one is Kubeflow Pipelines' own.
            assert binding["roleRef"]["name"] in known | {"pipeline-runner"}


def test_a_shared_runtime_can_be_read_by_pipelines() -> None:
    rules = only(rendered("training-shared"), "ClusterRole")["rules"]
    assert allowed(Request("get", "trainer.kubeflow.org", "clustertrainingruntimes", ""), rules)
