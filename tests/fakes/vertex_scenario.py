"""A scorer's life on Vertex AI as JSON: run in the tests' own process, and by another version of the SDK.

python vertex_scenario.py FOLDER
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from vertex_server import Vertex, vertex_server

IMAGE = f"registry.example/cappy-serving@sha256:{'a' * 64}"


def settings(**changed: Any) -> Any:
    """A deployment's settings for Vertex AI."""
    from cappy.config import build
    from cappy.deployment.step import DeploymentConfig

    places = {"version": "version", "report": "report", "target": "target", "platform": "vertex", "image": IMAGE}
    cloud = {"project": "my-project", "bucket": "gs://bucket", "machine": "g2-standard-8", "accelerator": "NVIDIA_L4"}
    return build(DeploymentConfig, {**places, "vertex": cloud, **changed})


def version(number: int) -> Any:
    """A registered version with a manifest of its own."""
    from cappy.registry.models import MANIFEST_TAG, Version

    return Version(name="cappy", number=number, source="", tags={MANIFEST_TAG: f"{number:x}" * 64})


def connect(vertex: Vertex) -> None:
    """Points the SDK at the server."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import aiplatform

    os.environ["STORAGE_EMULATOR_HOST"] = vertex.address
    aiplatform.init(
        project="my-project",
        location="us-central1",
        api_endpoint=vertex.address,
        api_transport="rest",
        credentials=AnonymousCredentials(),  # type: ignore[no-untyped-call]
    )


def deployment_facts(vertex: Vertex, scorer: Path, number: int, **changed: Any) -> dict[str, Any]:
    """Deploys, and what the endpoint looks like then: version -> percent."""
    from cappy.deployment.vertex import deploy

    result = deploy(settings(**changed), version(number), scorer)
    deployed = vertex.endpoints[0]["deployedModels"]
    shares = {one["displayName"]: vertex.endpoints[0]["trafficSplit"].get(one["id"], 0) for one in deployed}
    assert len(shares) == len(deployed), "a version is deployed twice"
    return {
        "shares": shares,
        "undeployed": result["undeployed"],
        "model": result["model"],
        "endpoint": result["endpoint"],
    }


def life(scorer: Path) -> dict[str, Any]:
    """First version, a canary, the canary again, the canary takes all, the first version comes back for half."""
    with vertex_server() as vertex:
        connect(vertex)
        steps = [
            deployment_facts(vertex, scorer, 1),
            deployment_facts(vertex, scorer, 2, traffic=20),
            deployment_facts(vertex, scorer, 2, traffic=20),
            deployment_facts(vertex, scorer, 2),
            deployment_facts(vertex, scorer, 1, traffic=50),
        ]
        asked = [call for call in vertex.calls if "/locations/" in call and not call.startswith("GET")]
        deployed = vertex.endpoints[0]["deployedModels"][0]
        return {
            "steps": steps,
            "changes": [call.rsplit("/", 1)[1] for call in asked],
            "objects": sorted({name.rsplit("/", 1)[1] for name in vertex.objects}),
            "model": vertex.models[-1],
            "models": len(vertex.models),
            "resources": deployed["dedicatedResources"],
            "dedicated": vertex.endpoints[0].get("dedicatedEndpointEnabled"),
        }


if __name__ == "__main__":
    print(json.dumps(life(Path(sys.argv[1]))))
