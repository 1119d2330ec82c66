"""Cross-fitting: the recipe of a scorer is trained once per fold, so that every instance is tested by one that never
saw it (and never saw a template of its row).

What comes out is worth of the recipe, not of the scorer that was given: that one is trained on more instances, and on
some of these. The out-of-fold scores stay beside the scorer and travel with the registered version, so that another
recipe is compared with it on the picks of the same instances with the same candidates, each made by a scorer that saw
neither.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from cappy.config import build, rename_settings
from cappy.errors import ConfigError, FolderError, quote
from cappy.evaluation.findings import OUT_OF_FOLD
from cappy.evaluation.protocol import AnyScorer, EvaluatedSplit, cached_scores, evaluate_split, pools_of, scores_of
from cappy.preparation.leakage import SplitRows
from cappy.progress import Progress
from cappy.records import Instance, Manifest, Split, prompt_hash, read, write
from cappy.records.folder import MANIFEST, verify
from cappy.scoring.training_data import TrainedOn, seen_in_training
from cappy.selection.pools import Pool, Vector
from cappy.steps import TRAINING_STEPS
from cappy.untrusted import JSON

Load = Callable[[str], AnyScorer]
"""Makes a scorer of a folder."""
Recipe = tuple[str, Mapping[str, JSON]]
"""The training step of a scorer and its settings."""
Train = Callable[[str, Mapping[str, object], Progress], None]
"""Runs a training step with these settings."""


@dataclass(frozen=True, kw_only=True)
class CrossFitting:
    """How many folds by which seed, what is evaluated in each, and where the trainings work (anew for `fresh`)."""

    folds: int
    seed: int
    metric: str
    probe: bool
    work: Path
    fresh: str = ""


@dataclass(frozen=True, kw_only=True)
class Fold:
    """The folder of the instances with this fold's splits, and where its scorer goes."""

    number: int
    annotated: Path
    scorer: Path


@dataclass(frozen=True, kw_only=True)
class OutOfFold:
    """Scores by pool (see `identity`), each made by a scorer that was trained on the other folds.

    `leaks` counts the instances that were tested by a scorer which had been trained on their prompt.
    """

    metric: str
    folds: int
    leaks: int
    scores: Mapping[str, Sequence[float]]

    def of(self, pools: Sequence[Pool], metric: str) -> list[Vector] | str:
        """The scores of these pools' candidates, or why they cannot be compared."""
        if metric != self.metric:
            return f"its out-of-fold picks are by {self.metric}, this report is by {metric}"
        known = [identity(pool) in self.scores for pool in pools]
        if not all(known) or len(pools) != len(self.scores):
            return (
                f"its out-of-fold picks are of {len(self.scores)} instances, this report is on {len(pools)}, and "
                f"{sum(known)} of them are the same with the same candidates"
            )
        return [np.array(self.scores[identity(pool)], dtype=np.float64) for pool in pools]


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
        yield _drop_near_held_out([replace(one, split=splits.get(place[one.group_id], "train")) for one in instances])


def _drop_near_held_out(instances: Sequence[Instance]) -> list[Instance]:
    rows = SplitRows()
    for one in instances:
        rows.add(one, one.split)
    left_out = rows.find_leaks()
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


def evaluate_folds(
    cross_fitting: CrossFitting,
    instances: Sequence[Instance],
    recipe: Recipe,
    folder: Path,
    *,
    load: Load,
    progress: Progress,
    train: Train | None = None,
) -> tuple[list[EvaluatedSplit], int]:
    """Each fold's test split, scored by the scorer that was trained on its other folds; how many instances are empty.

    A killed run goes on where it was: at the fold's training checkpoint, or at the scores that it had; a fold whose
    scorer is there, every sha256 right, is not trained again.
    """
    step, settings = recipe
    count, seed, metric = cross_fitting.folds, cross_fitting.seed, cross_fitting.metric
    evaluated, skipped = [], 0
    for fold in prepare(instances, count, seed, folder):
        if not _is_whole(fold.scorer):
            places = {"source": fold.annotated, "target": fold.scorer, "work": cross_fitting.work}
            own = {**settings, **places, "fresh": cross_fitting.fresh}
            (train or _train_fold)(step, own, _of_fold(progress, fold.number, count))
        pools, held_out, empty = pools_of(read(fold.annotated), metric=metric, split="test")
        score = cached_scores(load(str(fold.scorer)).score, folder, f"fold-{fold.number}")
        probe = cross_fitting.probe and fold.number == 1
        evaluated.append(evaluate_split(pools, held_out, score, metric=metric, seed=seed, probe=probe))
        skipped += empty
    return evaluated, skipped


def leaks(evaluated: Sequence[EvaluatedSplit], folder: Path, trained_on: TrainedOn) -> int:
    """How many instances were tested by a scorer that had been trained on their prompt."""
    scorers = [trained_on(_scorer(folder, number)) for number in range(1, len(evaluated) + 1)]
    tested = ([pool.instance for pool in own.pools] for own in evaluated)
    return sum(seen_in_training(own, hashes) for own, hashes in zip(tested, scorers, strict=True))


def with_champion(
    evaluated: Sequence[EvaluatedSplit], champion: Path, metric: str
) -> tuple[list[EvaluatedSplit], dict[str, int]]:
    """The splits with the champion's out-of-fold scores, and its leaks; without them, why they have none."""
    stored = read_out_of_fold(champion)
    if stored is None:
        why = "it has no out-of-fold picks; cross-fit it with --folds and register it again"
        return [_without_champion(own, why) for own in evaluated], {}
    scores = stored.of([pool for own in evaluated for pool in own.pools], metric)
    if isinstance(scores, str):
        return [_without_champion(own, scores) for own in evaluated], {}
    rest = iter(scores)
    joined = []
    for own in evaluated:
        values = {**own.selection.values, "champion": [next(rest) for _ in own.pools]}
        unavailable = {name: why for name, why in own.selection.unavailable.items() if name != "champion"}
        joined.append(replace(own, selection=replace(own.selection, values=values, unavailable=unavailable)))
    return joined, {"champion": stored.leaks}


def _without_champion(own: EvaluatedSplit, why: str) -> EvaluatedSplit:
    unavailable = {**own.selection.unavailable, "champion": why}
    return replace(own, selection=replace(own.selection, unavailable=unavailable))


def _train_fold(step: str, settings: Mapping[str, object], progress: Progress) -> None:
    """Trains by the step itself; a killed run goes on at its checkpoint."""
    from cappy.training import finetuning, pretraining

    if step == "pretraining":
        own = rename_settings(pretraining.PretrainingConfig, settings)
        pretraining.run(build(pretraining.PretrainingConfig, own), progress)
    elif step == "finetuning":
        own = rename_settings(finetuning.FinetuningConfig, settings)
        finetuning.run(build(finetuning.FinetuningConfig, own), progress)
    else:
        raise ConfigError(f"--folds: no step {quote(step)} trains here")


def _of_fold(progress: Progress, number: int, count: int) -> Progress:
    """Training's progress, with the fold in front of its note."""

    def report(done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = "") -> None:
        fold = f"fold {number} of {count}"
        progress(done, total, unit=unit, resumed=resumed, note=f"{fold}, {note}" if note else fold)

    return report


def _is_whole(scorer: Path) -> bool:
    """Whether a run before this one trained the fold: the work folder is named by recipe, instances and version."""
    try:
        verify(scorer)
    except FolderError:
        return False
    return True


def _scorer(work: Path, number: int) -> Path:
    return work / f".fold-{number}-scorer"


def _places(instances: Sequence[Instance], count: int, seed: int) -> dict[str, int]:
    """Group -> its fold: groups are shuffled, then go to one fold after another, task by task."""
    first = {instance.group_id: instance.task for instance in reversed(instances)}
    if len(first) < count:
        raise ConfigError(f"--folds {count}: there are {len(first)} groups of instances; ask for fewer folds")
    groups = sorted(first)
    order = np.random.default_rng(seed).permutation(len(groups))
    by_task = sorted((groups[index] for index in order), key=lambda group: first[group])
    return {group: index % count for index, group in enumerate(by_task)}


def identity(pool: Pool) -> str:
    """A hash of what is picked from: the instance, its instruction and its candidates in their order."""
    instance = pool.instance
    parts = [instance.instance_id, instance.group_id, instance.instruction, *pool.responses]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def out_of_fold_json(evaluated: Sequence[EvaluatedSplit], *, metric: str, leaks: int) -> str:
    """The text of out_of_fold.json. FolderError where two instances are the same."""
    pools = [pool for own in evaluated for pool in own.pools]
    rows = {identity(pool): scores.tolist() for pool, scores in zip(pools, scores_of(pools), strict=True)}
    if len(rows) != len(pools):
        twice, _ = Counter(identity(pool) for pool in pools).most_common(1)[0]
        name = next(pool.instance.instance_id for pool in pools if identity(pool) == twice)
        raise FolderError(f"instance {quote(name)} stands in the data twice; prepare the instances again")
    values = {"metric": metric, "folds": len(evaluated), "leaks": leaks, "scores": rows}
    return json.dumps(values, allow_nan=False) + "\n"


def read_out_of_fold(folder: Path) -> OutOfFold | None:
    """The out-of-fold scores beside a scorer, None if there are none; FolderError if the file is damaged."""
    path = folder / OUT_OF_FOLD
    if not path.is_file():
        return None
    try:
        return TypeAdapter(OutOfFold).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise FolderError(f"{path}: {place}: {first['msg']}; evaluate again with --folds") from error
