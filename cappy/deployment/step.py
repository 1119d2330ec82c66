"""The deployment step: checks that a registered version gives the scores of its evaluation, then deploys it.

Platform `local` only writes the serving command to endpoint.json. `kserve` writes the manifest of an InferenceService
for `kubectl apply`. `vertex` uploads the version and gives it a share of an endpoint's traffic.
"""

import json
import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cappy import registry
from cappy.config import (
    ADVANCED,
    DEFAULT_WORK,
    RESULT_NEUTRAL,
    Cores,
    Fresh,
    Location,
    Memory,
    Renames,
    Work,
    changed_settings,
    result_settings,
    settings,
)
from cappy.deployment import kserve
from cappy.errors import ConfigError, FolderError
from cappy.evaluation import read_values
from cappy.progress import Progress, silent
from cappy.records import Manifest, read_manifest
from cappy.records.folder import describe_files, write_bytes
from cappy.records.work import claim, finish
from cappy.registry.models import Version
from cappy.registry.promotion import read_version_uri
from cappy.registry.registration import TrackingUri
from cappy.scoring.calibration import VERIFICATION_PAIRS, ScoredPair, read_verification_pairs
from cappy.steps import step_version

__all__ = ["DeploymentConfig", "run"]

TOLERANCES = {"fp32": 1e-4, "bf16": 5e-3}
"""Maximum absolute difference of a score, by the precision of the scorer."""

Platform = Literal["local", "kserve", "vertex"]


@settings
class KServeSettings:
    """Settings of an InferenceService."""

    gpus: Annotated[int, Field(ge=0, le=8, description="GPUs of a replica")] = 0
    cpu: Annotated[Cores, Field(min_length=1, description="CPUs of a replica")] = "2"
    memory: Annotated[Memory, Field(min_length=1, description="Memory of a replica")] = "4Gi"
    namespace: Annotated[
        str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$", description="Kubernetes namespace")
    ] = "default"
    storage: Annotated[
        str, Field(description="Address of a copy of the scorer's folder, gs://, s3:// or pvc://; default: MLflow")
    ] = ""
    secret: Annotated[
        str, Field(description="Secret whose entries become environment variables: keys for MLflow or the bucket")
    ] = ""

    def __post_init__(self) -> None:
        if self.storage and not re.match(r"(gs|s3|pvc|hdfs|https?)://", self.storage):
            raise ConfigError(
                "--kserve.storage: expected an address that KServe can download, such as gs://bucket/folder"
            )
        if self.storage and re.search(r"[@?]", self.storage):
            remedy = "use --kserve.secret"
            raise ConfigError(
                f"--kserve.storage: contains a password or a signature, which the manifest would show; {remedy}"
            )


@settings
class VertexSettings:
    """Settings of a Vertex AI endpoint."""

    project: Annotated[str, Field(description="Google Cloud project")] = ""
    region: Annotated[str, Field(description="Region of the endpoint")] = "us-central1"
    bucket: Annotated[str, Field(description="gs:// bucket that the scorer is copied to")] = ""
    machine: Annotated[str, Field(description="Machine type")] = "n2-standard-4"
    accelerator: Annotated[str, Field(description="Accelerator type such as NVIDIA_L4; none for CPUs")] = ""
    service_account: Annotated[str, Field(description="Service account that the container runs as")] = ""


@settings
class DeploymentConfig:
    """Settings of deployment: a registered version, the report of its evaluation, and the platform to deploy to."""

    RENAMED: ClassVar[Renames] = {
        **{name: f"kserve.{name}" for name in ("gpus", "cpu", "memory", "namespace", "storage", "secret")},
        **{name: f"vertex.{name}" for name in ("project", "region", "bucket", "machine", "accelerator")},
        "service_account": "vertex.service_account",
    }

    version: Annotated[Location, Field(description="Folder of the registration")]
    report: Annotated[Location, Field(description="Folder of the evaluation, for its verification pairs (probe.json)")]
    target: Annotated[Location, Field(description="Folder to write endpoint.json to")]
    platform: Annotated[Platform, Field(description="Platform to deploy to")] = "local"
    port: Annotated[int, Field(ge=1, le=65535, description="Port in the serving command (local)")] = 8080
    image: Annotated[str, Field(description="Serving image, by digest: host/name@sha256:... (kserve, vertex)")] = ""
    service: Annotated[
        str, Field(pattern=r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$", description="Name of the service (kserve, vertex)")
    ] = "cappy"
    traffic: Annotated[
        int, Field(ge=1, le=100, description="Percent of the requests that this version gets; below 100 it is a canary")
    ] = 100
    min_replicas: Annotated[int, Field(ge=1, description="Minimum number of replicas (kserve, vertex)")] = 1
    max_replicas: Annotated[int, Field(ge=1, description="Maximum number of replicas (kserve, vertex)")] = 3
    kserve: Annotated[KServeSettings, ADVANCED] = KServeSettings()
    vertex: Annotated[VertexSettings, ADVANCED] = VertexSettings()
    tracking_uri: TrackingUri = ""
    models: Annotated[Path, RESULT_NEUTRAL, Field(description="Folder that keeps downloaded versions")] = Path(
        ".cappy/models"
    )
    work: Work = DEFAULT_WORK
    fresh: Fresh = ""

    def __post_init__(self) -> None:
        if self.platform != "local" and not re.fullmatch(r".+@sha256:[0-9a-f]{64}", self.image):
            raise ValueError(f"image: {self.platform} needs the digest of the serving image, host/name@sha256:...")
        vertex = self.vertex
        if self.platform == "vertex" and not (vertex.project and vertex.bucket.startswith("gs://")):
            raise ValueError("vertex.project: vertex needs --vertex.project and --vertex.bucket gs://...")
        for platform, group in (("kserve", self.kserve), ("vertex", self.vertex)):
            if self.platform != platform and (changed := changed_settings(group)):
                remedy = f"give --platform {platform}, or leave it out"
                raise ValueError(
                    f"{platform}.{changed[0].replace('_', '-')}: has no effect on {self.platform}; {remedy}"
                )
        if self.max_replicas < self.min_replicas:
            remedy = f"give {self.min_replicas} or more"
            raise ValueError(f"max-replicas: {self.max_replicas} is below min-replicas; {remedy}")


def run(config: DeploymentConfig, progress: Progress = silent) -> Manifest:
    """Downloads the version, scores the verification pairs of its evaluation again, and deploys it.

    Raises FolderError if the scores differ by more than `TOLERANCES`, or the report is of another scorer.
    """
    uri = read_version_uri(config.version)  # `config.version` is the folder of the registration.
    verification_pairs = _read_verification_pairs(config.report)
    parents = (read_manifest(config.version).hash, read_manifest(config.report).hash)
    with claim(config.work, "deployment", result_settings(config), parents, fresh=config.fresh) as folder:
        version = registry.resolve(uri, tracking_uri=config.tracking_uri)
        _check_report_version(config.report, version)
        local = registry.download(uri, tracking_uri=config.tracking_uri, cache=config.models)
        difference = largest_difference(local, verification_pairs, uri)
        progress(len(verification_pairs), len(verification_pairs), unit="pairs")
        values = {
            "platform": config.platform,
            "version": version.number,
            "uri": version.uri,
            "manifest_hash": version.manifest_hash,
            **deploy(config, version, local, folder),
            "verified_pairs": len(verification_pairs),
            "max_difference": difference,
        }
        write_bytes(folder / "endpoint.json", json.dumps(values, indent=1).encode())
        manifest = Manifest(
            step="deployment",
            files=describe_files(folder),
            config=result_settings(config),
            step_version=step_version("deployment"),
            parents=parents,
            metrics={"verified_pairs": float(len(verification_pairs)), "max_difference": difference},
            facts=values,
        )
        return finish(folder, config.target, manifest)


def _check_report_version(report: Path, version: Version) -> None:
    """Raises FolderError if the report is about another scorer than this version."""
    scorer_hash = read_values(report).get("versions", {}).get("challenger", "")
    if scorer_hash and not version.manifest_hash.startswith(scorer_hash):
        hashes = f"scorer in the report: {scorer_hash}, registered scorer: {version.manifest_hash[:12]}"
        raise FolderError(
            f"{report}: is about another scorer than {version.uri} ({hashes}); give the report of that version"
        )


def deploy(config: DeploymentConfig, version: Version, scorer: Path, folder: Path) -> dict[str, object]:
    """Deploys to the platform; returns fields of endpoint.json, including `command`, the next command to run."""
    if config.platform == "kserve":
        name = "inference_service.yaml"
        write_bytes(folder / name, kserve.to_yaml(kserve.inference_service(config, version)).encode())
        return {"command": f"kubectl apply -f {config.target / name}", "traffic": config.traffic}
    if config.platform == "vertex":
        from cappy.deployment import vertex

        return vertex.deploy(config, version, scorer)
    return {"command": f"cappy serve --scorer {version.serving_spec} --port {config.port}"}


def _read_verification_pairs(report: Path) -> list[ScoredPair]:
    """The verification pairs of an evaluation; raises FolderError if there are none."""
    read_manifest(report)
    verification_pairs = read_verification_pairs(report)
    if not verification_pairs:
        path = report / VERIFICATION_PAIRS
        raise FolderError(f"{path}: has no scored pairs to check the version with; evaluate again")
    return verification_pairs


def largest_difference(folder: Path, verification_pairs: list[ScoredPair], uri: str) -> float:
    """The largest absolute difference from the stored scores; raises FolderError if it exceeds the tolerance."""
    from cappy.scoring import Scorer

    scorer = Scorer.load(str(folder))
    scores = scorer.score([(instruction, response) for instruction, response, _ in verification_pairs])
    difference = max(abs(score - stored) for score, (_, _, stored) in zip(scores, verification_pairs, strict=True))
    if difference > TOLERANCES[scorer.precision]:
        remedy = "evaluate on the serving machine with the same package versions, then run again"
        raise FolderError(f"{uri}: scores differ from its evaluation by up to {difference:.2g}; {remedy}")
    return difference
