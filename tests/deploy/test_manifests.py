"""The overlays of deploy/, as kustomize puts them together: what their pods may do, and what the files hold."""

import re

import pytest
import yaml
from manifests import OVERLAYS, containers, matches, namespace, only, pods, quantity, rendered, variables

from components import TRAINER_IMAGE, VERSION, WORKER_IMAGE

every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)
SELECTOR = {
    "Deployment": "selector",
    "StatefulSet": "selector",
    "PodDisruptionBudget": "selector",
    "NetworkPolicy": "podSelector",
    "Service": "selector",
}


@every_overlay
def test_no_pod_can_become_more_than_a_user_without_rights(overlay: str) -> None:
    for pod, container in containers(rendered(overlay)):
        rights = {**pod.spec.get("securityContext", {}), **container["securityContext"]}
        assert rights["runAsNonRoot"] is True
        # Without a number the image's own user is taken, which Kubernetes refuses if that is root.
        assert rights.get("runAsUser", 1) != 0
        assert rights["allowPrivilegeEscalation"] is False
        assert rights["readOnlyRootFilesystem"] is True
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert rights["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod.spec)
        assert not any("hostPath" in volume for volume in pod.spec["volumes"])
        assert not any("hostPort" in port for port in container.get("ports", ()))


def test_the_namespace_refuses_pods_that_could_do_more() -> None:
    assert namespace()["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for overlay in ("mlflow-s3", "mlflow-gcs", "serving", "serving-kserve"):
        names = {one["metadata"]["namespace"] for one in rendered(overlay)}
        assert names == {namespace()["metadata"]["name"]}


@every_overlay
def test_only_the_account_of_pipelines_has_a_token(overlay: str) -> None:
    objects = rendered(overlay)
    for account in (one for one in objects if one["kind"] == "ServiceAccount"):
        assert (account.get("automountServiceAccountToken") is not False) == (
            account["metadata"]["name"] == "cappy-pipelines"
        )
    for pod in pods(objects):
        assert pod.spec["automountServiceAccountToken"] is False
        only(objects, "ServiceAccount", pod.spec["serviceAccountName"])


@every_overlay
def test_no_variable_of_a_service_reaches_a_pod(overlay: str) -> None:
    """A Service named mlflow sets MLFLOW_PORT to tcp://..., which MLflow takes for its port."""
    assert all(pod.spec["enableServiceLinks"] is False for pod in pods(rendered(overlay)))


@every_overlay
def test_every_container_asks_for_what_it_needs_and_is_limited(overlay: str) -> None:
    for _, container in containers(rendered(overlay)):
        asked, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(asked)
        assert set(asked) <= set(limits)
        assert all(quantity(asked[name]) <= quantity(limits[name]) for name in asked)
        assert asked["memory"] == limits["memory"], "memory cannot be taken back from a pod that has it"


@every_overlay
def test_what_is_written_lies_on_a_volume(overlay: str) -> None:
    for pod, container in containers(rendered(overlay)):
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        names = {volume["name"] for volume in pod.spec["volumes"]}
        if pod.owner == "StatefulSet":
            names |= {"data"}
            assert variables(container)["PGDATA"].startswith("/var/lib/postgresql/data/")
            assert {"/var/lib/postgresql/data", "/var/run/postgresql", "/tmp"} == set(mounts)
        else:
            actual = variables(container)
            assert {container["workingDir"], actual["HOME"], actual["TMPDIR"]} <= set(mounts)
        assert set(mounts.values()) == names


@every_overlay
def test_no_secret_stands_in_a_file(overlay: str) -> None:
    for one in rendered(overlay):
        assert one["kind"] != "Secret"
        for text in re.findall(r"\w+://[^\s'\"]+", yaml.safe_dump(one)):
            assert not re.search(r"://[^/@]*:[^/@]*@", text), text
        for name, value in one.get("data", {}).items():
            assert not re.search(r"PASSWORD|SECRET|TOKEN|_KEY", name), f"{name} belongs into a secret: {value}"
    for _, container in containers(rendered(overlay)):
        for name, value in variables(container).items():
            if re.search(r"PASSWORD|SECRET|TOKEN|KEY", name):
                assert isinstance(value, dict), f"{name} stands in the file"
                assert "secretKeyRef" in value


@every_overlay
def test_every_image_has_its_version_or_digest_and_ours_the_one_that_components_name(overlay: str) -> None:
    ours = {WORKER_IMAGE.partition(":")[0], TRAINER_IMAGE.partition(":")[0], "cappy-serving"}
    for _, container in containers(rendered(overlay)):
        place, _, digest = container["image"].partition("@")
        name, _, tag = place.rpartition("/")[2].partition(":")
        assert re.fullmatch("sha256:[0-9a-f]{64}", digest) if digest else re.fullmatch(r"[0-9][\w.-]+", tag)
        if name.startswith("cappy"):
            assert name in ours
            assert digest or tag == VERSION


@every_overlay
def test_selectors_find_the_pods_beside_them(overlay: str) -> None:
    objects = rendered(overlay)
    for one in objects:
        if one["kind"] in SELECTOR:
            selector = one["spec"][SELECTOR[one["kind"]]]
            wanted = {"matchLabels": selector} if one["kind"] == "Service" else selector
            result = [pod for pod in pods(objects) if matches(wanted, pod.labels)]
            assert len(result) == 1, f"{one['kind']} {one['metadata']['name']}: {len(result)} kinds of pods"


@every_overlay
def test_ports_that_are_named_exist(overlay: str) -> None:
    """Of Services and of probes; and a policy lets the Service's port through, by its number in the pod."""
    objects = rendered(overlay)
    for _, container in containers(objects):
        ports = {port.get("name", ""): port["containerPort"] for port in container.get("ports", ())}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if "httpGet" in container.get(probe, {}):
                assert container[probe]["httpGet"]["port"] in {*ports, *ports.values()}
    for service in (one for one in objects if one["kind"] == "Service"):
        pod = next(pod for pod in pods(objects) if matches({"matchLabels": service["spec"]["selector"]}, pod.labels))
        ports = {port["name"]: port["containerPort"] for port in pod.spec["containers"][0]["ports"]}
        policy = only(objects, "NetworkPolicy", service["metadata"]["name"])["spec"]
        assert {"Ingress", "Egress"} == set(policy["policyTypes"])
        admitted = {port["port"] for rule in policy["ingress"] for port in rule["ports"]}
        assert {ports[port["targetPort"]] for port in service["spec"]["ports"]} == admitted


@every_overlay
def test_every_pod_that_serves_has_the_three_probes(overlay: str) -> None:
    for pod, container in containers(rendered(overlay)):
        if not pod.owner.endswith("TrainingRuntime"):
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
