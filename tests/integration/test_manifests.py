"""The manifests of deploy/ against what others wrote: Kubernetes' schemas, and MLflow and the service as they start.

No cluster takes part: what an API server admits, and whether a pod starts, is shown by docs/guides/kubernetes.md's
commands alone.
"""

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from manifests import OVERLAYS, Object, containers, namespace, only, rendered, variables
from processes import free_port, running, wait_for

ROOT = Path(__file__).parents[2]
SERVERS = ROOT / ".venv-servers"
RELEASES = ("1.31", "1.34", "1.37")
"""Kubernetes' releases that the schemas are taken of: the oldest that we name, one between, the newest."""
OTHERS = {"TrainingRuntime", "ClusterTrainingRuntime", "InferenceService"}
"""Kinds that Kubernetes itself does not know; tests/deploy and test_cloud_types.py have their types."""
VALIDATE = """
import json, sys
import kubernetes_validate
told = []
for release, value in json.load(sys.stdin):
    try:
        kubernetes_validate.validate(value, release, strict=True)
    except kubernetes_validate.ValidationError as error:
        told.append(f"{release} {value['kind']} {'.'.join(map(str, error.path))}: {error.message}")
print(json.dumps(told))
"""


def refusals(objects: list[Object]) -> list[str]:
    """What the strict schemas of all releases say against the objects."""
    if not list(SERVERS.glob("lib/python*/site-packages/kubernetes_validate")):
        pytest.skip("no schemas of Kubernetes here; make integration installs them")
    asked = [(release, one) for release in RELEASES for one in objects if one["kind"] not in OTHERS]
    program = [str(SERVERS / "bin" / "python"), "-c", VALIDATE]
    done = subprocess.run(program, input=json.dumps(asked), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    result: list[str] = json.loads(done.stdout)
    return result


def test_kubernetes_own_schemas_know_every_field() -> None:
    objects = [namespace(), *(one for overlay in OVERLAYS for one in rendered(overlay))]
    assert refusals(objects) == []


def test_the_schemas_refuse_a_misspelt_field_and_a_wrong_type() -> None:
    deployment = only(rendered("serving"), "Deployment")
    deployment["spec"]["template"]["spec"]["serviceAccount_name"] = "cappy-serving"
    scaler = only(rendered("serving"), "HorizontalPodAutoscaler")
    scaler["spec"]["maxReplicas"] = "six"
    messages = refusals([deployment, scaler])
    assert len(messages) == 2 * len(RELEASES)
    assert "serviceAccount_name" in messages[0]


def status(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            code: int = answer.status
            return code
    except urllib.error.HTTPError as error:
        return error.code


def probes(container: Object) -> set[str]:
    return {container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}


def started_as(container: Object, port: int) -> list[str]:
    """The container's command, with this Python, on a free port of this machine alone."""
    command = [*container["command"], *container["args"]]
    assert command[:2] == ["python", "-m"]
    places = {"0.0.0.0": "127.0.0.1", str(container["ports"][0]["containerPort"]): str(port)}
    return [sys.executable, *(places.get(part, part) for part in command[1:])]


def test_mlflow_starts_as_its_deployment_says_and_answers_its_probes(
    database: Callable[[str], str], s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL and the bucket stand in for the cluster's: their addresses alone are put in place of the manifest's.

    That a server carries artifacts into gs:// as it does into s3:// is shown by test_registry_servers.py.
    """
    objects = rendered("mlflow-s3")
    container = next(one for _, one in containers(objects) if one["name"] == "mlflow")
    settings = dict(only(objects, "ConfigMap")["data"])
    for name, place in (
        ("MLFLOW_ARTIFACTS_DESTINATION", f"{s3.address}/manifests"),
        ("MLFLOW_BACKEND_STORE_URI", database("manifests")),
    ):
        assert place.partition("://")[0] == settings[name].partition("://")[0]
        settings[name] = place
    messages = {name: value for name, value in variables(container).items() if isinstance(value, str)}
    messages |= {name: str(tmp_path) for name in ("HOME", "TMPDIR")}
    # What a Service named mlflow would set; the port of the arguments must win over it.
    messages |= {"MLFLOW_PORT": "tcp://10.0.0.1:5000", **settings, **s3.environment, "PGPASSWORD": "not-asked-for"}
    port = free_port()
    address, log = f"http://127.0.0.1:{port}", tmp_path / "log"
    monkeypatch.chdir(tmp_path)
    command = started_as(container, port)
    command[command.index("--workers") + 1] = "1"
    with running(command, log, PYTHONPATH=str(ROOT), **messages) as process:
        wait_for(f"{address}/health", process, log, seconds=150)
        assert {status(f"{address}{path}") for path in probes(container)} == {200}
        search = f"{address}/api/2.0/mlflow/registered-models/search"
        for host in ("mlflow:5000", "mlflow.cappy.svc.cluster.local:5000", "localhost:5000"):
            assert status(search, Host=host) == 200
        assert status(search, Host="mlflow.example.com") == 403
        carries_an_artifact(address, s3, tmp_path, monkeypatch)


def carries_an_artifact(address: str, bucket: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the server into the bucket, by a client that knows nothing of the bucket."""
    import mlflow

    for name in bucket.environment:
        monkeypatch.delenv(name, raising=False)
    (folder / "note.txt").write_text("carried")
    client = mlflow.MlflowClient(tracking_uri=address)
    run = client.create_run(client.create_experiment("manifests"))
    client.log_artifact(run.info.run_id, str(folder / "note.txt"))
    (name,) = [name for name in bucket.names() if name.endswith("note.txt") and run.info.run_id in name]
    assert bucket.read(name) == b"carried"


def test_the_service_starts_as_its_pod_says_answers_its_probes_and_ends_well(tmp_path: Path) -> None:
    """With the built-in scorer in place of the champion; KServe's pod runs the same, see tests/deploy."""
    ((_, container),) = containers(rendered("serving"))
    port = free_port()
    address, log = f"http://127.0.0.1:{port}", tmp_path / "log"
    command = started_as(container, port)
    command[command.index("--scorer") + 1] = "builtin"
    command[command.index("--notice") + 1] = "1"
    messages = {name: value for name, value in variables(container).items() if isinstance(value, str)}
    messages |= {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "CAPPY_API_KEYS": "a-key-of-a-test"}
    with running(command, log, PYTHONPATH=str(ROOT), **messages) as process:
        wait_for(f"{address}/startup", process, log, seconds=150)
        wait_for(f"{address}/ready", process, log)
        assert {status(f"{address}{path}") for path in {*probes(container), "/metrics"}} == {200}
        assert status(f"{address}/model") == 401
        assert status(f"{address}/model", Authorization="Bearer a-key-of-a-test") == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
