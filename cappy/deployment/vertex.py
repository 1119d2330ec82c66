"""Vertex AI: uploads a version as a model and deploys it to an endpoint with a share of the traffic.

It works with google-cloud-aiplatform 1.165 and later, and with 2.x, which keeps the classes for models and endpoints.
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

    from cappy.google_cloud import silence_sdk, translate_errors
except ModuleNotFoundError as missing:
    raise ConfigError(
        f"deployment: --platform vertex needs {missing.name}; pip install 'cappy-scorer[gcp]'"
    ) from missing

PORT = 8080


class _DeployedModel(Protocol):
    """The fields of a deployed model that are used here."""

    model: str
    model_version_id: str


def deploy(config: "DeploymentConfig", version: Version, scorer: Path) -> dict[str, object]:
    """Uploads and deploys a version; earlier ones keep the rest of the traffic, or are undeployed if there is no rest.

    A version that is already uploaded or deployed is reused. Returns fields of endpoint.json. Raises ConfigError with
    the message of Vertex AI if it refuses or does not answer.
    """
    silence_sdk()
    with translate_errors("deployment", config.vertex.project, config.vertex.region):
        aiplatform.init(
            project=config.vertex.project, location=config.vertex.region, staging_bucket=config.vertex.bucket
        )
        model = _upload_model(config, version, scorer)
        endpoint = _open_endpoint(config)
        deployed_id = next((deployed.id for deployed in endpoint.list_models() if _is_deployed(deployed, model)), None)
        current = _traffic(endpoint)
        if deployed_id is None:
            _deploy(config, version, endpoint, model, split_traffic(current, config.traffic))
        else:
            others = {name: percent for name, percent in current.items() if name != deployed_id}
            shares = {
                deployed_id if name == "0" else name: share
                for name, share in split_traffic(others, config.traffic).items()
            }
            if shares != {name: percent for name, percent in current.items() if percent}:
                endpoint.update(traffic_split=shares)
        undeployed = _undeploy_others(endpoint, model) if config.traffic == 100 else []
        return {
            "endpoint": endpoint.resource_name,
            "model": model.versioned_resource_name,
            "traffic": _traffic(endpoint),
            "undeployed": undeployed,
            "command": f"gcloud ai endpoints describe {endpoint.name} --region={config.vertex.region}",
        }


def split_traffic(current: Mapping[str, int], share: int) -> dict[str, int]:
    """Gives `share` percent to the new model ("0"), and the rest to the others in their current proportions.

    The result sums to 100, as Vertex AI requires; so the new model gets all traffic if no other model has any.
    """
    answering = {name: percent for name, percent in current.items() if percent}
    if share == 100 or not answering:
        return {"0": 100}
    rest, total = 100 - share, sum(answering.values())
    shares = {name: rest * percent // total for name, percent in answering.items()}
    # The largest share gets the rounding error.
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
    """Returns the model version with this content; if there is none, uploads it to the model with this name.

    A list of models contains only the newest version of each, so the versions are listed too.
    """
    parents = aiplatform.Model.list(filter=f'display_name="{version.name}"')
    description = f"{version.uri}, manifest {version.manifest_hash}"
    for parent in parents:
        for info in parent.versioning_registry.list_versions():
            if info.version_description == description:
                return aiplatform.Model(parent.resource_name, version=info.version_id)
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


def _open_endpoint(config: "DeploymentConfig") -> aiplatform.Endpoint:
    """The endpoint with the name of the service; creates it if there is none."""
    endpoints = aiplatform.Endpoint.list(filter=f'display_name="{config.service}"')
    if endpoints:
        return endpoints[0]
    return aiplatform.Endpoint.create(display_name=config.service, dedicated_endpoint_enabled=True)


def _traffic(endpoint: aiplatform.Endpoint) -> dict[str, int]:
    """Percent of the traffic by id of the deployed model."""
    return {str(name): int(percent) for name, percent in (endpoint.traffic_split or {}).items()}


def _is_deployed(deployed: _DeployedModel, model: aiplatform.Model) -> bool:
    return bool(deployed.model == model.resource_name and deployed.model_version_id == model.version_id)


def _undeploy_others(endpoint: aiplatform.Endpoint, model: aiplatform.Model) -> list[str]:
    """Undeploys all models except this one; returns their names."""
    others = [deployed for deployed in endpoint.list_models() if not _is_deployed(deployed, model)]
    for deployed in others:
        endpoint.undeploy(deployed_model_id=deployed.id)
    return [deployed.display_name for deployed in others]
