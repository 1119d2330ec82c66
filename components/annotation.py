"""Annotation: labels every candidate."""

from kfp.dsl import Dataset, Input, Output

from components import component


@component()
def annotation(
    candidates: Input[Dataset],
    annotated: Output[Dataset],
    metric: str = "rougeL",
    settings: str = "",
    fingerprint: str = "",
    shard: str = "",
) -> None:
    """Label every candidate with its similarity to the references, from 0 to 1."""
    from cappy.worker import launch

    folders = {"source": candidates.path, "target": annotated.path}
    manifest = launch("annotation", settings, fingerprint=fingerprint, part=shard, metric=metric, **folders)
    annotated.metadata.update(manifest=manifest.hash, rows=manifest.rows, candidates=manifest.candidates)
