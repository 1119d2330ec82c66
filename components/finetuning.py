"""Finetuning: trains a general scorer further on one task."""

from kfp.dsl import Dataset, Input, Model, Output

from components import TRAINER_IMAGE, component


@component(base_image=TRAINER_IMAGE)
def finetuning(
    annotated: Input[Dataset],
    finetuned: Output[Model],
    scorer: str = "builtin",
    seed: int = 0,
    settings: str = "",
    fingerprint: str = "",
) -> None:
    """Train a scorer further on the labelled candidates of one task."""
    from cappy.worker import launch

    folders = {"source": annotated.path, "target": finetuned.path}
    manifest = launch("finetuning", settings, fingerprint=fingerprint, scorer=scorer, seed=seed, **folders)
    finetuned.metadata.update(manifest=manifest.hash)
