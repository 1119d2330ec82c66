"""Vertex AI: the version as a model, an endpoint of its own, and the version's share of its traffic.

Works with google-cloud-aiplatform 1.165 and later and with 2.x, which keeps the same classes for models and endpoints.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cappy.errors import ConfigError
from cappy.registry.models import Version

if TYPE_CHECKING:
    from cappy.deployment.step import DeploymentConfig

try:
    from google.cloud import aiplatform

    from cappy.vertex import hush, translate_errors
except ModuleNotFoundError as missing:
    raise ConfigError(
        f"deployment: --platform vertex needs {missing.name}; pip install 'cappy-scorer[gcp]'"
    ) from missing

PORT = 8080


class _DeployedModel(Protocol):
    """What the SDK says of a model on an endpoint."""

    model: str
    model_version_id: str


def deploy(config: "DeploymentConfig", version: Version, scorer: Path) -> dict[str, object]:
    """Uploads and deploys; what was deployed before keeps the rest of the traffic, or goes when this takes all.

    A version that was uploaded, or that answers already, is neither uploaded nor deployed again. ConfigError with the
    service's own words where it refuses, or where it does not answer.
    """
    hush()
    with translate_errors("deployment", config.vertex.project, config.vertex.region):
        aiplatform.init(
            project=config.vertex.project, location=config.vertex.region, staging_bucket=config.vertex.bucket
        )
        model = _upload_model(config, version, scorer)
        endpoint = _endpoint(config)
        own = next((one.id for one in endpoint.list_models() if _is_deployed(one, model)), None)
        present = _traffic(endpoint)
        if own is None:
            _deploy(config, version, endpoint, model, split_traffic(present, config.traffic))
        else:
            others = {name: percent for name, percent in present.items() if name != own}
            shares = {
                own if name == "0" else name: share for name, share in split_traffic(others, config.traffic).items()
            }
            if shares != {name: percent for name, percent in present.items() if percent}:
                endpoint.update(traffic_split=shares)
        gone = _undeploy(endpoint, model) if config.traffic == 100 else []
        return {
            "endpoint": endpoint.resource_name,
            "model": model.versioned_resource_name,
            "traffic": _traffic(endpoint),
            "undeployed": gone,
            "command": f"gcloud ai endpoints describe {endpoint.name} --region={config.vertex.region}",
        }


def split_traffic(present: Mapping[str, int], share: int) -> dict[str, int]:
    """Traffic with `share` percent for the newcomer ("0") and the rest shared as it was; sums to 100.

    Where nothing answers yet the newcomer gets all: an endpoint's shares have to sum to 100.
    """
    answering = {name: percent for name, percent in present.items() if percent}
    if share == 100 or not answering:
        return {"0": 100}
    rest, total = 100 - share, sum(answering.values())
    shares = {name: rest * percent // total for name, percent in answering.items()}
    # What rounding left goes to the largest.
    shares[max(shares, key=lambda name: shares[name])] += rest - sum(shares.values())
    return {"0": share, **shares}


def _deploy(
    config: "DeploymentConfig",
    version: Version,
    endpoint: aiplatform.Endpoint,
    model: aiplatform.Model,
    shares: Mapping[str, int],
) -> None:
    endpoint.deploy(
        model,
        deployed_model_display_name=f"{version.name}-{version.number}",
        traffic_split=dict(shares),
        machine_type=config.vertex.machine,
        min_replica_count=config.min_replicas,
        max_replica_count=config.max_replicas,
        accelerator_type=config.vertex.accelerator or None,
        accelerator_count=1 if config.vertex.accelerator else None,
        service_account=config.vertex.service_account or None,
    )


def _upload_model(config: "DeploymentConfig", version: Version, scorer: Path) -> aiplatform.Model:
    """The model with this content, uploaded as a version of the model of this name where there is none.

    A list of models has each one's newest version alone, so the versions of the model are looked through.
    """
    parents = aiplatform.Model.list(filter=f'display_name="{version.name}"')
    description = f"{version.uri}, manifest {version.manifest_hash}"
    for parent in parents:
        for one in parent.versioning_registry.list_versions():
            if one.version_description == description:
                return aiplatform.Model(parent.resource_name, version=one.version_id)
    uploaded: aiplatform.Model = aiplatform.Model.upload(
        display_name=version.name,
        parent_model=parents[0].resource_name if parents else None,
        artifact_uri=str(scorer),
        serving_container_image_uri=config.image,
        serving_container_predict_route="/predict",
        serving_container_health_route="/ready",
        serving_container_ports=[PORT],
        serving_container_environment_variables={"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"},
        version_description=description,
    )
    return uploaded


def _endpoint(config: "DeploymentConfig") -> aiplatform.Endpoint:
    known = aiplatform.Endpoint.list(filter=f'display_name="{config.service}"')
    if known:
        return known[0]
    return aiplatform.Endpoint.create(display_name=config.service, dedicated_endpoint_enabled=True)


def _traffic(endpoint: aiplatform.Endpoint) -> dict[str, int]:
    return {str(name): int(percent) for name, percent in (endpoint.traffic_split or {}).items()}


def _is_deployed(deployed: _DeployedModel, model: aiplatform.Model) -> bool:
    return bool(deployed.model == model.resource_name and deployed.model_version_id == model.version_id)


def _undeploy(endpoint: aiplatform.Endpoint, model: aiplatform.Model) -> list[str]:
    """Takes down what no longer answers; the names of what went."""
    gone = [one for one in endpoint.list_models() if not _is_deployed(one, model)]
    for one in gone:
        endpoint.undeploy(deployed_model_id=one.id)
    return [one.display_name for one in gone]
