"""Cross-fitting: the recipe of a scorer is trained once per fold, so that every instance is tested by one that never
saw it (and never saw a template of its row).

What comes out is worth of the recipe, not of the scorer that was given: that one is trained on more instances, and on
some of these.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cappy.config import build
from cappy.errors import ConfigError, FolderError
from cappy.evaluation.leaks import TrainedOn, seen_in_training
from cappy.evaluation.out_of_fold import read_out_of_fold
from cappy.evaluation.parts import Part, part_of, pools_of
from cappy.evaluation.pools import AnyScorer
from cappy.evaluation.remembered import remembered
from cappy.evaluation.step import EvaluationConfig
from cappy.preparation import neighbours
from cappy.progress import Progress
from cappy.records import Instance, Manifest, Split, prompt_hash, read, write
from cappy.records.folder import MANIFEST, verify
from cappy.steps import TRAINING_STEPS

Load = Callable[[str], AnyScorer]
"""Makes a scorer of a folder."""
Train = Callable[[str, Mapping[str, Any], Progress], None]
"""Runs a training step with these settings."""


Recipe = tuple[str, Mapping[str, Any]]
"""The training step of a scorer and its settings."""


@dataclass(frozen=True, kw_only=True)
class Fold:
    """The folder of the instances with this fold's splits, and where its scorer goes."""

    number: int
    annotated: Path
    scorer: Path


def folds(instances: Sequence[Instance], count: int, seed: int) -> Iterator[list[Instance]]:
    """The instances `count` times, each time with other splits: every one is tested once and held out once.

    A fold's test instances are the next fold's validation ones, the others train it. Groups stay together, and every
    task is spread over all folds as evenly as its groups allow. Near-duplicates of a fold's test instances, which the
    leak check would find, are left out of what it trains on, and so are those of its validation ones. ConfigError where
    there are fewer groups than folds.
    """
    place = _places(instances, count, seed)
    for number in range(count):
        splits: dict[int, Split] = {number: "test", (number + 1) % count: "validation"}
        yield _without_near_held_out(
            [replace(one, split=splits.get(place[one.group_id], "train")) for one in instances]
        )


def _without_near_held_out(instances: Sequence[Instance]) -> list[Instance]:
    rows = neighbours.Rows()
    for one in instances:
        rows.add(one, one.split)
    left_out = rows.left_out()
    return [one for one in instances if one.split == "test" or prompt_hash(one.instruction) not in left_out]


def prepare(instances: Sequence[Instance], count: int, seed: int, work: Path) -> Iterator[Fold]:
    """Writes each fold's instances under `work`, unless a run before this one did."""
    for number, own in enumerate(folds(instances, count, seed), start=1):
        fold = Fold(number=number, annotated=work / f".fold-{number}", scorer=_scorer(work, number))
        if not (fold.annotated / MANIFEST).is_file():
            write(fold.annotated, own)
        yield fold


def recipe(scorer: Manifest, folder: Path) -> Recipe:
    """The step and the settings that made a scorer; ConfigError where its manifest does not say."""
    if scorer.step not in TRAINING_STEPS:
        raise ConfigError(
            f"--folds: {folder} was not made by {' or '.join(TRAINING_STEPS)} (its manifest says "
            f"{scorer.step or 'nothing'}), so its recipe is not known; train a scorer with cappy first"
        )
    return scorer.step, scorer.config


def parts(
    config: EvaluationConfig,
    instances: Sequence[Instance],
    made: Recipe,
    work: Path,
    *,
    load: Load,
    progress: Progress,
    train: Train | None = None,
) -> tuple[list[Part], int]:
    """A part for each fold, scored by the scorer that was trained on its other folds, and how many instances are empty.

    A killed run goes on where it was: at the fold's training checkpoint, or at the scores that it had; a fold whose
    scorer is there, every sha256 right, is not trained again.
    """
    step, settings = made
    found, skipped = [], 0
    for fold in prepare(instances, config.folds, config.seed, work):
        if not _is_whole(fold.scorer):
            own = {**settings, "source": fold.annotated, "target": fold.scorer, "work": config.work}
            (train or train_fold)(step, own, _of_fold(progress, fold.number, config.folds))
        pools, held_out, empty = pools_of(read(fold.annotated), metric=config.metric, split="test")
        score = remembered(load(str(fold.scorer)).score, work, f"fold-{fold.number}")
        probed = config.probe and fold.number == 1
        found.append(part_of(pools, held_out, score, metric=config.metric, seed=config.seed, probe=probed))
        skipped += empty
    return found, skipped


def leaks(found: Sequence[Part], work: Path, trained_on: TrainedOn) -> int:
    """How many instances were tested by a scorer that had been trained on their prompt."""
    scorers = [trained_on(_scorer(work, number)) for number in range(1, len(found) + 1)]
    tested = ([pool.instance for pool in part.pools] for part in found)
    return sum(seen_in_training(own, hashes) for own, hashes in zip(tested, scorers, strict=True))


def with_champion(found: Sequence[Part], champion: Path, metric: str) -> tuple[list[Part], dict[str, int]]:
    """The parts with the champion's out-of-fold scores, and its leaks; without them, why the parts have none."""
    stored = read_out_of_fold(champion)
    if stored is None:
        return _without_champion(found, "it has no out-of-fold picks; cross-fit it with --folds and register it again")
    scores = stored.of([pool for part in found for pool in part.pools], metric)
    if isinstance(scores, str):
        return _without_champion(found, scores)
    rest = iter(scores)
    joined = [
        replace(
            part,
            rules=replace(
                part.rules,
                values={**part.rules.values, "champion": [next(rest) for _ in part.pools]},
                unavailable={name: why for name, why in part.rules.unavailable.items() if name != "champion"},
            ),
        )
        for part in found
    ]
    return joined, {"champion": stored.leaks}


def _without_champion(found: Sequence[Part], why: str) -> tuple[list[Part], dict[str, int]]:
    return [
        replace(part, rules=replace(part.rules, unavailable={**part.rules.unavailable, "champion": why}))
        for part in found
    ], {}


def train_fold(step: str, settings: Mapping[str, Any], progress: Progress) -> None:
    """Trains by the step itself; a killed run goes on at its checkpoint."""
    from cappy.training import finetuning, pretraining

    if step == "pretraining":
        pretraining.run(build(pretraining.PretrainingConfig, settings), progress)
    else:
        finetuning.run(build(finetuning.FinetuningConfig, settings), progress)


def _of_fold(progress: Progress, number: int, count: int) -> Progress:
    """Training's progress, with the fold in front of its note."""

    def told(done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = "") -> None:
        fold = f"fold {number} of {count}"
        progress(done, total, unit=unit, resumed=resumed, note=f"{fold}, {note}" if note else fold)

    return told


def _is_whole(scorer: Path) -> bool:
    """Whether a run before this one trained the fold: the work folder is named by recipe, instances and code."""
    try:
        verify(scorer)
    except FolderError:
        return False
    return True


def _scorer(work: Path, number: int) -> Path:
    return work / f".fold-{number}-scorer"


def _places(instances: Sequence[Instance], count: int, seed: int) -> dict[str, int]:
    """Group -> its fold: groups are shuffled, then dealt out task by task."""
    first = {instance.group_id: instance.task for instance in reversed(instances)}
    if len(first) < count:
        raise ConfigError(f"--folds {count}: there are {len(first)} groups of instances; ask for fewer folds")
    groups = sorted(first)
    order = np.random.default_rng(seed).permutation(len(groups))
    dealt = sorted((groups[index] for index in order), key=lambda group: first[group])
    return {group: index % count for index, group in enumerate(dealt)}
