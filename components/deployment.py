"""Deployment: checks that the registered version gives the scores of its evaluation."""

from kfp.dsl import Artifact, Input, Output

from components import component


@component()
def deployment(
    version: Input[Artifact],
    report: Input[Artifact],
    endpoint: Output[Artifact],
    settings: str = "",
    fingerprint: str = "",
    run: str = "",
) -> None:
    """Check the registered version against stored scores, and write the command that serves it."""
    from cappy.worker import launch

    folders = {"version": version.path, "report": report.path, "target": endpoint.path}
    manifest = launch("deployment", settings, fingerprint=fingerprint, run=run, **folders)
    endpoint.metadata.update(manifest=manifest.hash)
