"""Preparation: reads instances from a source."""

from kfp.dsl import Dataset, Output

from components import component


@component()
def preparation(
    instances: Output[Dataset],
    source: str = "builtin",
    seed: int = 0,
    settings: str = "",
    fingerprint: str = "",
) -> None:
    """Turn a source of tasks into instances, with a fixed split for each group."""
    from cappy.worker import launch

    manifest = launch("preparation", settings, fingerprint=fingerprint, source=source, seed=seed, target=instances.path)
    instances.metadata.update(manifest=manifest.hash, rows=manifest.rows)
