"""Tracking: the exit step, which logs the run to MLflow even if a step failed."""

from kfp.dsl import PipelineTaskFinalStatus

from components import component


@component()
def tracking(
    status: PipelineTaskFinalStatus, fingerprints: str = "{}", settings: str = "", run: str = "", created: str = ""
) -> None:
    """Log the pipeline run with one nested run per step; steps answered from the cache are marked."""
    import json

    from cappy.registry import track_run

    track_run(json.loads(fingerprints), settings, run=run, created=created, state=status.state)
