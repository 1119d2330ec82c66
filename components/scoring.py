"""Scoring: scores every candidate of a dataset."""

from kfp.dsl import Dataset, Input, Output

from components.component import component


@component()
def scoring(
    instances: Input[Dataset],
    scored: Output[Dataset],
    scorer: str = "builtin",
    settings: str = "",
    fingerprint: str = "",
    part: str = "",
    run: str = "",
) -> None:
    """Score the candidates of a dataset, or of its shard i/N."""
    from cappy.worker import launch

    values = {"scorer": scorer, "shard": part}
    folders = {"source": instances.path, "target": scored.path}
    done = launch("scoring", settings, fingerprint=fingerprint, part=part, run=run, **values, **folders)
    scored.metadata.update(manifest=done.hash, rows=done.rows, candidates=done.candidates)
