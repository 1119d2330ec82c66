"""Annotation: labels every candidate."""

from kfp.dsl import Dataset, Input, Output

from components.component import component


@component()
def annotation(
    candidates: Input[Dataset],
    annotated: Output[Dataset],
    metric: str = "rougeL",
    settings: str = "",
    fingerprint: str = "",
    part: str = "",
    run: str = "",
) -> None:
    """Label every candidate with its similarity to the references, from 0 to 1."""
    from cappy.worker import launch

    folders = {"source": candidates.path, "target": annotated.path}
    done = launch("annotation", settings, fingerprint=fingerprint, part=part, run=run, metric=metric, **folders)
    annotated.metadata.update(manifest=done.hash, rows=done.rows, candidates=done.candidates)
