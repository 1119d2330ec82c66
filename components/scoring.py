"""Scoring: scores every candidate of a dataset."""

from kfp.dsl import Dataset, Input, Output

from components import component


@component()
def scoring(
    instances: Input[Dataset],
    scored: Output[Dataset],
    scorer: str = "builtin",
    settings: str = "",
    fingerprint: str = "",
    shard: str = "",
) -> None:
    """Score the candidates of a dataset, or of its shard i/N."""
    from cappy.worker import launch

    values = {"scorer": scorer, "shard": shard}
    folders = {"source": instances.path, "target": scored.path}
    manifest = launch("scoring", settings, fingerprint=fingerprint, part=shard, **values, **folders)
    scored.metadata.update(manifest=manifest.hash, rows=manifest.rows, candidates=manifest.candidates)
