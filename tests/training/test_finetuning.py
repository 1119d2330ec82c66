"""The loop learns, resumes exactly, and keeps the best."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cappy.config import build
from cappy.errors import ConfigError
from cappy.records import Candidate, Instance, prompt_hash, read_manifest, write
from cappy.records.folder import verify
from cappy.scoring import Scorer, trained_on
from cappy.training.finetuning import FinetuningConfig, run
from cappy.training.plan import default_rate, rate

WORDS = "cat dog bird mat tree blue red one two three".split()


def copy_task(count: int) -> list[Instance]:
    """The right response repeats the instruction's last word: learnable in seconds, unknown at the start."""
    rng = random.Random(0)
    instances = []
    for number in range(count):
        words = rng.sample(WORDS, 5)
        candidates = tuple(Candidate(response=word, labels={"rougeL": float(word == words[-1])}) for word in words[1:])
        split = "test" if number % 5 == 4 else "validation" if number % 5 == 3 else "train"
        instances.append(
            Instance(
                instance_id=str(number),
                instruction=f"{number} {' '.join(words)}",
                references=(words[-1],),
                split=split,  # type: ignore[arg-type]
                candidates=candidates,
            )
        )
    return instances


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records") / "annotated"
    write(folder, copy_task(100))
    return folder


def config(source: Path, scorer: Path, root: Path, name: str = "scorer", **values: object) -> FinetuningConfig:
    given = {
        "epochs": 2.0,
        "checks": 3,
        "batch_instances": 8,
        "learning_rate": 1e-3,
        "checkpoint_seconds": 0.0,
        **values,
    }
    return build(
        FinetuningConfig,
        {"source": source, "scorer": str(scorer), "target": root / name, "work": root / "work", **given},
    )


class KilledError(Exception):
    """Stands for a kill at some update."""


def test_a_killed_run_continues_and_ends_with_the_same_weights(
    source: Path, scorer_folder: Path, tmp_path: Path
) -> None:
    unbroken = run(config(source, scorer_folder, tmp_path / "a"))
    seen: list[int] = []

    def killed_after_four(
        done: int, total: int | None = None, *, unit: str = "", resumed: int = 0, note: str = ""
    ) -> None:
        if done == 4:
            raise KilledError

    def remember(done: int, total: int | None = None, *, unit: str = "", resumed: int = 0, note: str = "") -> None:
        seen.append(done)

    with pytest.raises(KilledError):
        run(config(source, scorer_folder, tmp_path / "b"), killed_after_four)
    assert not (tmp_path / "b" / "scorer").exists()
    resumed = run(config(source, scorer_folder, tmp_path / "b"), remember)
    assert seen[0] == 5, "updates before the checkpoint are not done again"
    first, second = (load_file(tmp_path / side / "scorer" / "model.safetensors") for side in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert resumed.hash == unbroken.hash


def test_training_learns_and_keeps_the_best_check(source: Path, scorer_folder: Path, tmp_path: Path) -> None:
    manifest = run(config(source, scorer_folder, tmp_path, epochs=30.0, checks=10, patience=10))
    log = json.loads((tmp_path / "scorer" / "training.json").read_text())
    assert log[-1]["loss"] < log[1]["loss"]
    assert manifest.metrics["validation_pick"] == pytest.approx(max(entry["pick"] for entry in log), abs=1e-6)
    assert manifest.metrics["validation_pick"] > 0.25, "chance is 1 in 4"


def test_the_folder_is_finished_names_its_parents_and_its_prompts(
    source: Path, scorer_folder: Path, tmp_path: Path
) -> None:
    run(config(source, scorer_folder, tmp_path, epochs=0.2))
    manifest = verify(tmp_path / "scorer")
    assert manifest.parents == (read_manifest(source).hash, read_manifest(scorer_folder).hash)
    hashes = set(trained_on(tmp_path / "scorer").tolist())
    by_split = {
        split: {prompt_hash(i.instruction) for i in copy_task(100) if i.split == split} for split in ("train", "test")
    }
    assert by_split["train"] <= hashes
    assert not by_split["test"] & hashes
    assert Scorer.load(str(tmp_path / "scorer")).version == manifest.hash[:12]


def test_nothing_to_learn_from_is_said(tmp_path: Path, scorer_folder: Path) -> None:
    only_test = [i for i in copy_task(20) if i.split == "test"]
    write(tmp_path / "in", only_test)
    with pytest.raises(ConfigError, match="has no instance of split train"):
        run(config(tmp_path / "in", scorer_folder, tmp_path))


def test_the_rate_rises_falls_and_is_counted_in_updates() -> None:
    rates = [rate(update, 100, 1.0, 0.1) for update in range(100)]
    assert rates[9] == 1.0 == max(rates)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 0.02
    assert default_rate(1024) == pytest.approx(2e-5)
