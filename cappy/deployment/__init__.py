"""Deployment: proof that a registered version answers as it did when it was evaluated, and the command that serves it.

Nothing is started: a service that outlives the step is the platform's to run.
"""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from cappy.config import DEFAULT_WORK, LOCATION, Location, Work, code_version, identity, settings
from cappy.errors import FolderError
from cappy.progress import Progress, silent
from cappy.records import Manifest, read_manifest
from cappy.records.folder import describe_files, write_bytes
from cappy.registry.promotion import read_version
from cappy.registry.registration import TrackingUri

__all__ = ["DeploymentConfig", "run"]

TOLERANCES = {"fp32": 1e-4, "bf16": 5e-3}


@settings
class DeploymentConfig:
    """A registered version, and the pairs that its evaluation scored."""

    version: Annotated[Location, Field(description="Folder of the registration")]
    report: Annotated[Location, Field(description="Folder of the evaluation, for its probe.json")]
    target: Annotated[Location, Field(description="Folder to write endpoint.json to")]
    port: Annotated[int, Field(ge=1, le=65535, description="Port that the command names")] = 8080
    tracking_uri: TrackingUri = ""
    models: Annotated[Path, LOCATION, Field(description="Folder that keeps downloaded versions")] = Path(
        ".cappy/models"
    )
    work: Work = DEFAULT_WORK


def run(config: DeploymentConfig, progress: Progress = silent) -> Manifest:
    """Downloads the version, scores the stored pairs again and writes endpoint.json; FolderError if they differ."""
    from cappy import registry
    from cappy.records.work import claim, finish

    uri = read_version(config.version)
    probes = read_probes(config.report)
    parents = (read_manifest(config.version).hash, read_manifest(config.report).hash)
    with claim(config.work, "deployment", identity(config), parents) as folder:
        version = registry.resolve(uri, tracking_uri=config.tracking_uri)
        local = registry.download(uri, tracking_uri=config.tracking_uri, cache=config.models)
        worst = largest_difference(local, probes, uri)
        values = {
            "version": version.number,
            "uri": version.uri,
            "manifest_hash": version.manifest_hash,
            "command": f"cappy serve --scorer {version.served_as} --port {config.port}",
            "verified_pairs": len(probes),
            "max_difference": worst,
        }
        write_bytes(folder / "endpoint.json", json.dumps(values, indent=1).encode())
        manifest = Manifest(
            step="deployment",
            files=describe_files(folder),
            config=identity(config),
            code=code_version(),
            parents=parents,
            metrics={"verified_pairs": float(len(probes)), "max_difference": worst},
            facts=values,
        )
        progress(len(probes), len(probes), unit="pairs")
        return finish(folder, config.target, manifest)


def read_probes(report: Path) -> list[tuple[str, str, float]]:
    """The (instruction, response, score) triples of an evaluation; FolderError if there are none."""
    read_manifest(report)
    path = report / "probe.json"
    triples: list[Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    if not triples:
        raise FolderError(f"{path}: holds no stored pair to check the version against; evaluate again")
    return [(instruction, response, float(score)) for instruction, response, score in triples]


def largest_difference(folder: Path, probes: list[tuple[str, str, float]], uri: str) -> float:
    """How far the scores of the scorer in `folder` are from the stored ones; FolderError beyond its precision."""
    from cappy.scoring import Scorer

    scorer = Scorer.load(str(folder))
    scores = scorer.score([(instruction, response) for instruction, response, _ in probes])
    worst = max(abs(score - stored) for score, (_, _, stored) in zip(scores, probes, strict=True))
    if worst > TOLERANCES[scorer.precision]:
        remedy = "evaluate on the machine and with the versions that serve, then run again"
        raise FolderError(f"{uri}: answers differ from its evaluation's by up to {worst:.2g}; {remedy}")
    return worst
