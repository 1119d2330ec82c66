"""The registration step: registers a scorer and its report as a version, which becomes the challenger."""

import json
from typing import Annotated

from pydantic import Field

from cappy.config import DEFAULT_WORK, RESULT_NEUTRAL, Fresh, Location, Work, result_settings, settings
from cappy.errors import FolderError
from cappy.evaluation import read_values
from cappy.evaluation.findings import ReportValues
from cappy.model_folder import open_model_folder
from cappy.progress import Progress, silent
from cappy.records import Manifest, read_manifest
from cappy.records.folder import describe_files, write_bytes
from cappy.records.work import claim, finish
from cappy.steps import step_version

TrackingUri = Annotated[
    str, RESULT_NEUTRAL, Field(description="MLflow's address; empty for MLFLOW_TRACKING_URI, else .cappy/mlflow.db")
]


@settings
class RegistrationConfig:
    """A scorer to register, and its evaluation report."""

    scorer: Annotated[Location, Field(description="Folder of the scorer")]
    report: Annotated[Location, Field(description="Folder of its evaluation")]
    target: Annotated[Location, Field(description="Folder to write version.json to")]
    name: Annotated[str, Field(min_length=1, pattern=r"^[^/:@'\"`]+$", description="Name of the registered model")] = (
        "cappy"
    )
    licence: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9.+-]*$", description="Licence of the encoder that training started from, such as mit"
        ),
    ] = ""
    experiment: Annotated[str, Field(min_length=1, description="MLflow experiment to log to")] = "cappy"
    tracking_uri: TrackingUri = ""
    pipeline_run: Annotated[str, RESULT_NEUTRAL, Field(description="Id of the pipeline run that this belongs to")] = ""
    work: Work = DEFAULT_WORK
    fresh: Fresh = ""


def run(config: RegistrationConfig, progress: Progress = silent) -> Manifest:
    """Registers the scorer as challenger and writes version.json; the same scorer and selector keep their version."""
    scorer = read_manifest(config.scorer)
    open_model_folder(config.scorer)
    report = read_report(config, scorer)
    parents = (scorer.hash, read_manifest(config.report).hash)
    # The claim prevents two simultaneous registrations of one scorer from creating two versions.
    with claim(config.work, "registration", result_settings(config), [scorer.hash], fresh=config.fresh) as folder:
        from cappy.registry.recording import Registration, register

        version = register(
            Registration(
                scorer=config.scorer,
                manifest=scorer,
                report=config.report,
                report_values=report,
                name=config.name,
                licence=config.licence,
                experiment=config.experiment,
                pipeline_run=config.pipeline_run,
                tracking_uri=config.tracking_uri,
                staging=folder,
            )
        )
        values = {
            "name": version.name,
            "version": version.number,
            "alias": version.alias,
            "uri": version.uri,
            "manifest_hash": version.manifest_hash,
        }
        write_bytes(folder / "version.json", json.dumps(values, indent=1).encode())
        manifest = Manifest(
            step="registration",
            files=describe_files(folder),
            config=result_settings(config),
            step_version=step_version("registration"),
            parents=parents,
            facts=values,
        )
        progress(1, 1, unit="versions")
        return finish(folder, config.target, manifest)


def read_report(config: RegistrationConfig, scorer: Manifest) -> ReportValues:
    """The report on this scorer. Raises FolderError if it is about another one."""
    report = read_values(config.report, check_hashes=True)
    scorer_hash = report.get("versions", {}).get("challenger", "")
    if scorer_hash and not scorer.hash.startswith(scorer_hash):
        hashes = f"scorer {scorer.hash[:12]}, report on {scorer_hash}"
        raise FolderError(f"{config.report}: is about another scorer ({hashes}); evaluate {config.scorer} first")
    return report
