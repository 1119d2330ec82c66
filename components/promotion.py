"""Promotion: the statistical test that decides whether the challenger replaces the champion."""

from kfp.dsl import Artifact, Input, Output

from components import component


@component()
def promotion(
    version: Input[Artifact],
    report: Input[Artifact],
    decision: Output[Artifact],
    margin: float = 0.0,
    settings: str = "",
    fingerprint: str = "",
    run: str = "",
) -> str:
    """Move the champion alias if the challenger is significantly better; returns promote or hold."""
    from cappy.worker import launch

    folders = {"version": version.path, "report": report.path, "target": decision.path}
    manifest = launch("promotion", settings, fingerprint=fingerprint, run=run, margin=margin, **folders)
    decision.metadata.update(manifest=manifest.hash)
    return str(manifest.facts["decision"])
