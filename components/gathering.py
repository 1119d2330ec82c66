"""Gathering: joins the output folders of a step's shards."""

from typing import List  # noqa: UP035 (kfp only accepts this name for a list of artifacts)

from kfp.dsl import Dataset, Input, Output

from components import component


@component()
def gathering(
    parts: Input[List[Dataset]],  # noqa: UP006 (as above)
    gathered: Output[Dataset],
    settings: str = "",
    fingerprint: str = "",
) -> None:
    """Join the folders that the shards of a step wrote, in the order of the shards."""
    from cappy.worker import launch

    folders = {"source": [part.path for part in parts], "target": gathered.path}
    manifest = launch("gathering", settings, fingerprint=fingerprint, **folders)
    gathered.metadata.update(manifest=manifest.hash, rows=manifest.rows, candidates=manifest.candidates)
