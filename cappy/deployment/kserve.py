"""KServe: creates the manifest of an InferenceService that serves a registered version."""

from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

import yaml

from cappy.errors import ConfigError
from cappy.redaction import redact_address
from cappy.registry.models import Version, tracking_address

if TYPE_CHECKING:
    from cappy.deployment.step import DeploymentConfig

PORT = 8080
SCRATCH = "/tmp"  # noqa: S108 (inside a container)
"""The only writable folder of the container: registry downloads, temporary files, caches."""
STORAGE_MOUNT = "/mnt/models"
"""The folder to which KServe's storage initializer downloads STORAGE_URI."""
NOTICE_SECONDS, GRACE_SECONDS = 5, 20
"""After SIGTERM the server is not ready during the notice period, then finishes open requests in the grace period.

The sum is below the 30 seconds until SIGKILL, which Knative does not let a manifest change
(terminationGracePeriodSeconds).
"""


def inference_service(config: "DeploymentConfig", version: Version) -> dict[str, object]:
    """An InferenceService (serving.kserve.io/v1beta1) with the serving image as a custom predictor.

    `traffic` below 100 becomes `canaryTrafficPercent`: the previous revision gets the rest. The manifest names the
    version by number, not by alias, so that it says what runs. Raises ConfigError if a cluster cannot reach MLflow.
    """
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": config.service,
            "namespace": config.kserve.namespace,
            "labels": {"app.kubernetes.io/name": "cappy", "app.kubernetes.io/component": "serving"},
            "annotations": {
                "cappy/model": version.uri,
                "cappy/manifest": version.manifest_hash,
            },
        },
        "spec": {
            "predictor": {
                "minReplicas": config.min_replicas,
                "maxReplicas": config.max_replicas,
                **({"canaryTrafficPercent": config.traffic} if config.traffic < 100 else {}),
                # The server needs no access to the Kubernetes API.
                # Service links would set MLFLOW_PORT to tcp://... for a Service named mlflow.
                "automountServiceAccountToken": False,
                "enableServiceLinks": False,
                "containers": [_container(config, version)],
                "volumes": [{"name": "scratch", "emptyDir": {}}],
            }
        },
    }


def to_yaml(service: dict[str, object]) -> str:
    """The manifest as YAML."""
    return yaml.safe_dump(service, sort_keys=False, width=120)


def _container(config: "DeploymentConfig", version: Version) -> dict[str, object]:
    resources = {"cpu": config.kserve.cpu, "memory": config.kserve.memory}
    if config.kserve.gpus:
        resources["nvidia.com/gpu"] = str(config.kserve.gpus)
    return {
        "name": "kserve-container",
        "image": config.image,
        "command": ["python", "-m", "serving"],
        "args": [
            *("--scorer", STORAGE_MOUNT if config.kserve.storage else version.uri),
            *("--host", "0.0.0.0", "--port", str(PORT)),  # noqa: S104
            *("--notice", str(NOTICE_SECONDS), "--grace", str(GRACE_SECONDS)),
        ],
        "env": _environment(config),
        **({"envFrom": [{"secretRef": {"name": config.kserve.secret}}]} if config.kserve.secret else {}),
        "workingDir": SCRATCH,
        "volumeMounts": [{"name": "scratch", "mountPath": SCRATCH}],
        "ports": [{"containerPort": PORT, "protocol": "TCP"}],
        "resources": {"requests": resources, "limits": dict(resources)},
        "startupProbe": {**_probe("/startup"), "failureThreshold": 60},
        "readinessProbe": _probe("/ready"),
        "livenessProbe": _probe("/health"),
        "securityContext": {
            "runAsNonRoot": True,
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }


def _environment(config: "DeploymentConfig") -> list[dict[str, str]]:
    """The container's environment variables. MLflow's address has no user and password, because they need a secret."""
    variables = [{"name": "MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "value": "false"}]
    # Requests are addressed to host names of the ingress, which only the cluster knows.
    variables += [{"name": "CAPPY_ALLOWED_HOSTS", "value": "*"}]
    variables += [{"name": name, "value": SCRATCH} for name in ("HOME", "TMPDIR")]
    if config.kserve.storage:
        return [*variables, {"name": "STORAGE_URI", "value": config.kserve.storage}]
    address = tracking_address(config.tracking_uri)
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https"):
        remedy = (
            "give the address of an MLflow server, or copy the scorer to a bucket and name it with --kserve.storage"
        )
        raise ConfigError(f"deployment: --tracking-uri: a cluster cannot reach {redact_address(address)}; {remedy}")
    if "@" in parts.path or "@" in parts.query:
        remedy = "percent-encode @, /, ? and # in the password, or give it with --kserve.secret"
        raise ConfigError(f"deployment: --tracking-uri: the host of the address is ambiguous; {remedy}")
    host = parts.netloc.rpartition("@")[2]
    return [*variables, {"name": "MLFLOW_TRACKING_URI", "value": urlunsplit((parts.scheme, host, parts.path, "", ""))}]


def _probe(path: str) -> dict[str, object]:
    return {"httpGet": {"path": path, "port": PORT}, "periodSeconds": 5, "timeoutSeconds": 2}
