"""The settings of a deployment, of every platform, validated before anything is asked."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from cappy.config import DEFAULT_WORK, LOCATION, Fresh, Location, Work, settings
from cappy.registry.registration import TrackingUri

Platform = Literal["local", "kserve", "vertex"]


@settings
class DeploymentConfig:
    """A registered version, the pairs that its evaluation scored, and where it is to answer."""

    version: Annotated[Location, Field(description="Folder of the registration")]
    report: Annotated[Location, Field(description="Folder of the evaluation, for its probe.json")]
    target: Annotated[Location, Field(description="Folder to write endpoint.json to")]
    platform: Annotated[Platform, Field(description="Where it is to answer")] = "local"
    port: Annotated[int, Field(ge=1, le=65535, description="Port that the command names (local)")] = 8080
    image: Annotated[str, Field(description="Serving image, by digest: host/name@sha256:... (kserve, vertex)")] = ""
    service: Annotated[
        str, Field(pattern=r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$", description="Name of the service (kserve, vertex)")
    ] = "cappy"
    traffic: Annotated[
        int, Field(ge=1, le=100, description="Percent of the requests for this version, a canary below 100")
    ] = 100
    min_replicas: Annotated[int, Field(ge=1, description="Fewest replicas (kserve, vertex)")] = 1
    max_replicas: Annotated[int, Field(ge=1, description="Most replicas (kserve, vertex)")] = 3
    gpus: Annotated[int, Field(ge=0, le=8, description="GPUs of a replica (kserve)")] = 0
    cpu: Annotated[str, Field(pattern=r"^[0-9]+m?$", description="CPUs of a replica (kserve)")] = "2"
    memory: Annotated[str, Field(pattern=r"^[0-9]+(Mi|Gi)$", description="Memory of a replica (kserve)")] = "4Gi"
    namespace: Annotated[
        str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$", description="Kubernetes namespace (kserve)")
    ] = "default"
    storage: Annotated[
        str, Field(description="Where the scorer's folder was copied to, gs://, s3:// or pvc:// (kserve); none: MLflow")
    ] = ""
    secret: Annotated[
        str, Field(description="Secret whose entries become environment: keys of MLflow or the bucket (kserve)")
    ] = ""
    project: Annotated[str, Field(description="Google Cloud project (vertex)")] = ""
    region: Annotated[str, Field(description="Region of the endpoint (vertex)")] = "us-central1"
    bucket: Annotated[str, Field(description="gs:// bucket that the scorer is copied to (vertex)")] = ""
    machine: Annotated[str, Field(description="Machine type (vertex)")] = "n2-standard-4"
    accelerator: Annotated[str, Field(description="Accelerator type such as NVIDIA_L4; none for CPUs (vertex)")] = ""
    service_account: Annotated[str, Field(description="Service account that the container runs as (vertex)")] = ""
    tracking_uri: TrackingUri = ""
    models: Annotated[Path, LOCATION, Field(description="Folder that keeps downloaded versions")] = Path(
        ".cappy/models"
    )
    work: Work = DEFAULT_WORK
    fresh: Fresh = ""

    def __post_init__(self) -> None:
        if self.platform != "local" and not re.fullmatch(r".+@sha256:[0-9a-f]{64}", self.image):
            raise ValueError(f"image: {self.platform} needs the serving image by digest, host/name@sha256:...")
        if self.platform == "vertex" and not (self.project and self.bucket.startswith("gs://")):
            raise ValueError("project: vertex needs --project and --bucket gs://...")
        if self.max_replicas < self.min_replicas:
            raise ValueError("max-replicas: is below min-replicas")
        if self.storage and not re.match(r"(gs|s3|pvc|hdfs|https?)://", self.storage):
            raise ValueError("storage: is no address that KServe copies from, such as gs://bucket/folder")
        if self.storage and re.search(r"[@?]", self.storage):
            raise ValueError("storage: holds a password or a signature, which would be written down; use --secret")
