"""Pretraining: trains a general scorer."""

from kfp.dsl import Dataset, Input, Model, Output

from components import TRAINER_IMAGE, component


@component(base_image=TRAINER_IMAGE)
def pretraining(
    annotated: Input[Dataset],
    pretrained: Output[Model],
    seed: int = 0,
    settings: str = "",
    fingerprint: str = "",
) -> None:
    """Train a scorer on labelled candidates of many tasks."""
    from cappy.worker import launch

    folders = {"source": annotated.path, "target": pretrained.path}
    manifest = launch("pretraining", settings, fingerprint=fingerprint, seed=seed, **folders)
    pretrained.metadata.update(manifest=manifest.hash)
