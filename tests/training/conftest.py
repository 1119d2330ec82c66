"""A task that is learned in seconds, and the settings that train on it."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from cappy.config import build
from cappy.records import Candidate, Instance, write
from cappy.training.finetuning import FinetuningConfig

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


@pytest.fixture(scope="session")
def instances() -> list[Instance]:
    """60 train, 20 validation and 20 test instances of the copy task."""
    return copy_task(100)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, instances: list[Instance]) -> Path:
    """A finished folder of them."""
    folder = tmp_path_factory.mktemp("records") / "annotated"
    write(folder, instances)
    return folder


@pytest.fixture
def plan(source: Path, scorer_folder: Path, tmp_path: Path) -> Callable[..., FinetuningConfig]:
    """plan(name, **settings) -> a short finetuning whose folders lie in a place of its own under that name."""
    return planner(source, scorer_folder, tmp_path)


@pytest.fixture(scope="module")
def shared_plan(
    source: Path, scorer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., FinetuningConfig]:
    """As `plan`, for runs that several tests of a module look at."""
    return planner(source, scorer_folder, tmp_path_factory.mktemp("shared"))


def planner(source: Path, scorer_folder: Path, folder: Path) -> Callable[..., FinetuningConfig]:
    def make(name: str = "a", **values: object) -> FinetuningConfig:
        root = folder / name
        given = {
            "source": source,
            "scorer": str(scorer_folder),
            "target": root / "scorer",
            "work": root / "work",
            "epochs": 2.0,
            "checks": 3,
            "batch_instances": 8,
            "batch_tokens": 256,
            "learning_rate": 1e-3,
            "checkpoint_updates": 1,
        }
        return build(FinetuningConfig, {**given, **values})

    return make
