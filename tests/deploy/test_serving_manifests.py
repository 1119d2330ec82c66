"""The service and MLflow in a cluster: probes, drain, who reaches whom, how many, and KServe's variant of it."""

from typing import Any

import pytest
from manifests import Object, containers, flags, matches, only, pods, rendered, variables
from scoring_function import model
from vertex_scenario import version

from cappy.cli.tools import service_command
from cappy.config import build
from cappy.deployment.kserve import inference_service
from cappy.deployment.step import DeploymentConfig
from serving.app import create_app
from serving.engine import Models

PLATFORM_GRACE_SECONDS = 30
"""From SIGTERM to SIGKILL where a pod's spec does not say."""


def serving_container(overlay: str) -> tuple[Object, Object]:
    (result,) = containers(rendered(overlay))
    return result[0].spec, result[1]


both = pytest.mark.parametrize("overlay", ["serving", "serving-kserve"])


@both
def test_probes_ask_for_what_the_service_answers(overlay: str) -> None:
    _, container = serving_container(overlay)
    routes = {route.path for route in create_app(Models(model())).routes}  # type: ignore[attr-defined]
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/startup", "readiness": "/ready", "liveness": "/health"}
    assert set(paths.values()) <= routes
    actual = rendered("serving")
    scraped = only(actual, "Deployment")["spec"]["template"]["metadata"]["annotations"]
    assert scraped["prometheus.io/path"] in routes
    assert int(scraped["prometheus.io/port"]) == container["ports"][0]["containerPort"]


@both
def test_the_command_takes_every_flag_and_listens_where_the_pod_says(overlay: str) -> None:
    _, container = serving_container(overlay)
    known = {name for option in service_command("serve").params for name in option.opts}
    assert set(flags(container)) <= known
    assert container["command"] == ["python", "-m", "serving"]
    assert int(flags(container)["--port"]) == container["ports"][0]["containerPort"]
    assert flags(container)["--host"] == "0.0.0.0"


@both
def test_what_was_accepted_is_answered_before_the_pod_is_killed(overlay: str) -> None:
    pod, container = serving_container(overlay)
    actual = flags(container)
    needed = int(actual["--notice"]) + int(actual["--grace"])
    assert needed + 5 <= pod.get("terminationGracePeriodSeconds", PLATFORM_GRACE_SECONDS)
    # A balancer that probes by itself, as often, has noticed by then.
    assert int(actual["--notice"]) >= container["readinessProbe"]["periodSeconds"]


def test_kserve_runs_what_the_deployment_runs() -> None:
    """Apart from which version, how long it drains, and what a followed alias needs."""
    _, ours = serving_container("serving")
    _, theirs = serving_container("serving-kserve")
    for key in ("command", "workingDir", "volumeMounts"):
        assert ours[key] == theirs[key]
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert {**ours[name], "httpGet": {**ours[name]["httpGet"], "port": 8080}} == theirs[name]
    pod_rights = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert {**pod_rights, **ours["securityContext"]} == theirs["securityContext"]
    own = {"--scorer", "--notice", "--grace"}
    assert {**flags(ours), **dict.fromkeys(own)} == {**flags(theirs), **dict.fromkeys(own)}
    assert variables(theirs).items() <= variables(ours).items()
    assert ours["ports"][0]["containerPort"] == theirs["ports"][0]["containerPort"]


def test_the_overlays_inference_service_is_what_the_deployment_step_writes() -> None:
    image = f"registry.example/cappy-serving@sha256:{'0' * 64}"
    places = {"version": "version", "report": "report", "target": "target", "platform": "kserve", "image": image}
    config = build(DeploymentConfig, {**places, "kserve": {"namespace": "cappy"}, "tracking_uri": "http://mlflow:5000"})
    written: Any = inference_service(config, version(1))
    predictor = written["spec"]["predictor"]
    predictor["serviceAccountName"] = "cappy-serving"
    keys = {"secretKeyRef": {"name": "cappy-api-keys", "key": "keys"}}
    predictor["containers"][0]["env"].append({"name": "CAPPY_API_KEYS", "valueFrom": keys})
    assert only(rendered("serving-kserve"), "InferenceService") == written


def test_a_rolling_update_and_a_drained_node_leave_a_replica() -> None:
    objects = rendered("serving")
    deployment, scaler = only(objects, "Deployment"), only(objects, "HorizontalPodAutoscaler")["spec"]
    target = scaler["scaleTargetRef"]
    assert (target["apiVersion"], target["kind"]) == (deployment["apiVersion"], "Deployment")
    assert target["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"], "applying it again would undo what the autoscaler did"
    least = only(objects, "PodDisruptionBudget")["spec"]["minAvailable"]
    assert 1 <= least < scaler["minReplicas"] <= scaler["maxReplicas"], "no node could be drained otherwise"
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    (metric,) = scaler["metrics"]
    assert (
        metric["resource"]["name"] in deployment["spec"]["template"]["spec"]["containers"][0]["resources"]["requests"]
    )


@pytest.mark.parametrize("overlay", ["mlflow-s3", "mlflow-gcs"])
def test_the_service_reaches_mlflow_by_a_name_port_and_host_header_that_it_accepts(overlay: str) -> None:
    _, container = serving_container("serving")
    objects, own = rendered(overlay), rendered("serving")
    (serving_pod,) = pods(own)
    host = variables(container)["MLFLOW_TRACKING_URI"].removeprefix("http://")
    name, _, port = host.partition(":")
    service = only(objects, "Service", name)["spec"]
    assert int(port) in {one["port"] for one in service["ports"]}
    settings = only(objects, "ConfigMap")["data"]
    assert host in settings["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    mlflow_pod = next(pod for pod in pods(objects) if matches({"matchLabels": service["selector"]}, pod.labels))
    assert reaches(only(own, "NetworkPolicy")["spec"]["egress"], "to", mlflow_pod.labels) == {5000}
    assert reaches(only(objects, "NetworkPolicy", "mlflow")["spec"]["ingress"], "from", serving_pod.labels) == {5000}


def test_mlflow_alone_reaches_the_database_and_the_database_nobody() -> None:
    objects = rendered("mlflow-s3")
    by_part = {pod.labels["app.kubernetes.io/component"]: pod.labels for pod in pods(objects)}
    policies = {one["metadata"]["name"]: one["spec"] for one in objects if one["kind"] == "NetworkPolicy"}
    assert reaches(policies["mlflow"]["egress"], "to", by_part["postgres"]) == {5432}
    assert reaches(policies["postgres"]["ingress"], "from", by_part["mlflow"]) == {5432}
    assert policies["postgres"]["egress"] == []
    (serving_pod,) = pods(rendered("serving"))
    assert reaches(policies["postgres"]["ingress"], "from", serving_pod.labels) == set()


def test_a_database_outside_is_reached_with_tls_and_by_its_address_alone() -> None:
    objects = rendered("mlflow-gcs")
    settings = only(objects, "ConfigMap")["data"]
    assert settings["PGSSLMODE"] == "require"
    assert not [one for one in objects if one["kind"] == "StatefulSet"]
    rules = only(objects, "NetworkPolicy")["spec"]["egress"]
    (rule,) = [rule for rule in rules if {"protocol": "TCP", "port": 5432} in rule["ports"]]
    address = settings["MLFLOW_BACKEND_STORE_URI"].partition("@")[2].partition(":")[0]
    assert rule["to"] == [{"ipBlock": {"cidr": f"{address}/32"}}]


def reaches(rules: list[Any], direction: str, labels: dict[str, str]) -> set[int]:
    """Ports that rules of a policy open to a pod of the same namespace by its labels, not those open to everybody."""
    result = set()
    for rule in rules:
        for peer in rule.get(direction, ()):
            if "podSelector" in peer and matches(peer["podSelector"], labels):
                result |= {port["port"] for port in rule["ports"]}
    return result
