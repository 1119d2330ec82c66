"""KServe: the manifest of an InferenceService that serves a registered version."""

from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

import yaml

from cappy.errors import ConfigError
from cappy.redaction import redact_address
from cappy.registry.models import Version, tracking_address

if TYPE_CHECKING:
    from cappy.deployment.step import DeploymentConfig

PORT = 8080
SCRATCH = "/tmp"  # noqa: S108 (of a container of its own)
"""The one place that the container may write to: downloads of the registry, temporary files, the image's caches."""
MOUNTED = "/mnt/models"
"""Where KServe's storage initializer puts what STORAGE_URI names."""
NOTICE_SECONDS, GRACE_SECONDS = 5, 20
"""After SIGTERM it answers as not ready, while nodes learn that the pod is going, then finishes what it has. Together
less than the 30 seconds until SIGKILL, which Knative lets no manifest change (terminationGracePeriodSeconds)."""


def inference_service(config: "DeploymentConfig", version: Version) -> dict[str, object]:
    """An InferenceService (serving.kserve.io/v1beta1) with the serving image as a custom predictor.

    Below 100 `traffic` is `canaryTrafficPercent`: KServe keeps the revision before for the rest. The version is named
    by number, not by alias, so that the manifest says what runs. ConfigError where a cluster could not reach MLflow.
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
                # It asks the cluster for nothing; a Service named mlflow would set MLFLOW_PORT to tcp://...
                "automountServiceAccountToken": False,
                "enableServiceLinks": False,
                "containers": [_container(config, version)],
                "volumes": [{"name": "scratch", "emptyDir": {}}],
            }
        },
    }


def text(service: dict[str, object]) -> str:
    """The manifest as YAML."""
    return yaml.safe_dump(service, sort_keys=False, width=120)


def _container(config: "DeploymentConfig", version: Version) -> dict[str, object]:
    quantities = {"cpu": config.kserve.cpu, "memory": config.kserve.memory}
    if config.kserve.gpus:
        quantities["nvidia.com/gpu"] = str(config.kserve.gpus)
    return {
        "name": "kserve-container",
        "image": config.image,
        "command": ["python", "-m", "serving"],
        "args": [
            *("--scorer", MOUNTED if config.kserve.storage else version.uri),
            *("--host", "0.0.0.0", "--port", str(PORT)),  # noqa: S104
            *("--notice", str(NOTICE_SECONDS), "--grace", str(GRACE_SECONDS)),
        ],
        "env": _environment(config),
        **({"envFrom": [{"secretRef": {"name": config.kserve.secret}}]} if config.kserve.secret else {}),
        "workingDir": SCRATCH,
        "volumeMounts": [{"name": "scratch", "mountPath": SCRATCH}],
        "ports": [{"containerPort": PORT, "protocol": "TCP"}],
        "resources": {"requests": quantities, "limits": dict(quantities)},
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
    """Where the scorer comes from; user and password of an address are a secret's to bring."""
    variables = [{"name": "MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "value": "false"}]
    # Clients ask for the ingress's names, which are known to the cluster alone.
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
        raise ConfigError(f"deployment: --tracking-uri: no cluster reaches {redact_address(address)}; {remedy}")
    if "@" in parts.path or "@" in parts.query:
        remedy = "write @, /, ? and # in a password percent-encoded, or give it by --kserve.secret"
        raise ConfigError(f"deployment: --tracking-uri: where the host begins in it is not clear; {remedy}")
    host = parts.netloc.rpartition("@")[2]
    return [*variables, {"name": "MLFLOW_TRACKING_URI", "value": urlunsplit((parts.scheme, host, parts.path, "", ""))}]


def _probe(path: str) -> dict[str, object]:
    return {"httpGet": {"path": path, "port": PORT}, "periodSeconds": 5, "timeoutSeconds": 2}
