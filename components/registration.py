"""Registration: registers the scorer in MLflow as challenger."""

from kfp.dsl import Artifact, Input, Model, Output

from components import component


@component()
def registration(
    scorer: Input[Model],
    report: Input[Artifact],
    version: Output[Artifact],
    name: str = "cappy",
    settings: str = "",
    fingerprint: str = "",
    run: str = "",
) -> None:
    """Register the scorer in MLflow with its model card; a scorer that is already registered gets no second version."""
    from cappy.worker import launch

    folders = {"scorer": scorer.path, "report": report.path, "target": version.path}
    manifest = launch(
        "registration", settings, fingerprint=fingerprint, run=run, name=name, pipeline_run=run, **folders
    )
    version.metadata.update(manifest=manifest.hash, uri=str(manifest.facts["uri"]))
