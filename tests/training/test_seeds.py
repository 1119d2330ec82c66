"""The seed of training and the seed of the folds: cross-fitting keeps them apart."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cappy.evaluation import crossfit
from cappy.progress import silent
from cappy.records import Instance, read_manifest


class Lengths:
    """A scorer that prefers what is longer."""

    version = "abcdef123456"

    def score(self, pairs: Any) -> list[float]:
        return [float(len(response)) for _, response in pairs]


def trained(
    instances: list[Instance], folder: Path, *, training: int, folds: int = 0
) -> tuple[list[str], list[Mapping[str, Any]]]:
    """The manifest hashes of the folds that were trained on, and the settings that training was given."""
    four = crossfit.CrossFitting(folds=4, seed=folds, metric="rougeL", with_probes=True, work=folder)
    asked: list[Mapping[str, Any]] = []

    def train(step: str, settings: Mapping[str, Any], progress: object) -> None:
        asked.append(settings)
        Path(settings["target"]).mkdir(parents=True)

    made: Any = ("finetuning", {"scorer": "builtin:tiny", "seed": training})
    crossfit.evaluate_folds(four, instances, made, folder, load=lambda _: Lengths(), progress=silent, train=train)
    return [read_manifest(settings["source"]).hash for settings in asked], asked


def test_another_training_seed_trains_anew_on_the_same_folds(instances: list[Instance], tmp_path: Path) -> None:
    one, first = trained(instances, tmp_path / "one", training=0)
    other, second = trained(instances, tmp_path / "other", training=1)
    assert one == other, "the same instances in the same splits: tokens of the first run are used again"
    assert [settings["seed"] for settings in (*first, *second)] == [0] * 4 + [1] * 4


def test_the_folds_have_a_seed_of_their_own(instances: list[Instance], tmp_path: Path) -> None:
    one, _ = trained(instances, tmp_path / "one", training=0)
    other, asked = trained(instances, tmp_path / "other", training=0, folds=1)
    assert not set(one) & set(other)
    assert {settings["seed"] for settings in asked} == {0}


@pytest.mark.parametrize("seed", [0, 7])
def test_a_fold_keeps_the_training_seed_of_the_recipe(instances: list[Instance], tmp_path: Path, seed: int) -> None:
    _, asked = trained(instances, tmp_path, training=seed, folds=3)
    assert {settings["seed"] for settings in asked} == {seed}
