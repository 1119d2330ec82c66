"""Cross-fitting: trains the recipe of a scorer once per fold, so that every instance is tested by a scorer that was not
trained on it, nor on another template of its row.

The result is an estimate for the recipe, not for the scorer that was given, which was trained on more instances, and on
some of these. The out-of-fold scores are kept beside the scorer and registered with it, so that another recipe can be
compared with it on the same instances with the same candidates.
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
from cappy.evaluation.protocol import (
    AnyScorer,
    EvaluatedSplit,
    cached_scores,
    evaluate_split,
    get_scorer_scores,
    split_pools,
)
from cappy.preparation.leakage import SplitRows
from cappy.progress import Progress
from cappy.records import Instance, Manifest, Split, prompt_hash, read, write
from cappy.records.folder import MANIFEST, verify
from cappy.scoring.training_data import TrainedOn, count_seen
from cappy.selection.pools import Pool, Vector
from cappy.steps import TRAINING_STEPS
from cappy.untrusted import JSON

Load = Callable[[str], AnyScorer]
"""Loads a scorer from a folder."""
Recipe = tuple[str, Mapping[str, JSON]]
"""The training step of a scorer and its settings."""
Train = Callable[[str, Mapping[str, object], Progress], None]
"""Runs a training step: (step, settings, progress)."""


@dataclass(frozen=True, kw_only=True)
class CrossFitting:
    """Number of folds, their seed, what is evaluated in each, and the work folder of the trainings."""

    folds: int
    seed: int
    metric: str
    probe: bool
    work: Path
    fresh: str = ""


@dataclass(frozen=True, kw_only=True)
class Fold:
    """A fold: the folder of its instances with their splits, and the folder of its scorer."""

    number: int
    annotated: Path
    scorer: Path


@dataclass(frozen=True, kw_only=True)
class OutOfFoldScores:
    """Scores by pool (see `pool_hash`), each from a scorer that was trained on the other folds.

    `leaks` counts the instances that were tested by a scorer that was trained on their prompt.
    """

    metric: str
    folds: int
    leaks: int
    scores: Mapping[str, Sequence[float]]

    def look_up(self, pools: Sequence[Pool], metric: str) -> list[Vector] | str:
        """The scores of the candidates of `pools`, or the reason why they cannot be compared."""
        if metric != self.metric:
            return f"its out-of-fold picks are labelled by {self.metric}, this report by {metric}"
        known = [pool_hash(pool) in self.scores for pool in pools]
        if not all(known) or len(pools) != len(self.scores):
            return (
                f"its out-of-fold picks cover {len(self.scores)} instances, this report {len(pools)}, and only "
                f"{sum(known)} of them are the same with the same candidates"
            )
        return [np.array(self.scores[pool_hash(pool)], dtype=np.float64) for pool in pools]


def split_folds(instances: Sequence[Instance], count: int, seed: int) -> Iterator[list[Instance]]:
    """Yields the instances `count` times with different splits: every instance is tested once and held out once.

    The validation instances of a fold are the test instances of the next one; the others are for training. Groups stay
    together, and every task is spread over the folds as evenly as its groups allow. Training and validation instances
    that the leak check would find to be near-duplicates of the fold's held-out instances are dropped. Raises
    ConfigError if there are fewer groups than folds.
    """
    fold_of = _assign_folds(instances, count, seed)
    for number in range(count):
        splits: dict[int, Split] = {number: "test", (number + 1) % count: "validation"}
        yield _drop_near_held_out(
            [replace(instance, split=splits.get(fold_of[instance.group_id], "train")) for instance in instances]
        )


def _drop_near_held_out(instances: Sequence[Instance]) -> list[Instance]:
    rows = SplitRows()
    for instance in instances:
        rows.add(instance, instance.split)
    leaks = rows.find_leaks()
    return [each for each in instances if each.split == "test" or prompt_hash(each.instruction) not in leaks]


def prepare_folds(instances: Sequence[Instance], count: int, seed: int, work: Path) -> Iterator[Fold]:
    """Writes the instances of each fold under `work`, unless an earlier run did, and yields the folds."""
    for number, own in enumerate(split_folds(instances, count, seed), start=1):
        fold = Fold(number=number, annotated=work / f".fold-{number}", scorer=_scorer_folder(work, number))
        if not (fold.annotated / MANIFEST).is_file():
            write(fold.annotated, own)
        yield fold


def read_recipe(scorer: Manifest, folder: Path) -> Recipe:
    """The step and the settings that made a scorer. Raises ConfigError if its manifest does not name them."""
    if scorer.step not in TRAINING_STEPS:
        raise ConfigError(
            f"--folds: the recipe of {folder} is unknown: it was not made by {' or '.join(TRAINING_STEPS)} (its "
            f"manifest names the step {scorer.step or 'none'}); train a scorer with cappy first"
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
    """Evaluates each fold's test split with the scorer trained on the other folds; also counts skipped instances.

    An interrupted run resumes at the fold's training checkpoint, or with the scores that it had stored. A fold whose
    scorer is complete (every sha256 matches) is not trained again.
    """
    step, settings = recipe
    count, seed, metric = cross_fitting.folds, cross_fitting.seed, cross_fitting.metric
    evaluated, skipped = [], 0
    for fold in prepare_folds(instances, count, seed, folder):
        if not _is_trained(fold.scorer):
            paths = {"source": fold.annotated, "target": fold.scorer, "work": cross_fitting.work}
            fold_settings = {**settings, **paths, "fresh": cross_fitting.fresh}
            (train or _train_fold)(step, fold_settings, _prefix_progress(progress, fold.number, count))
        pools, held_out, num_empty = split_pools(read(fold.annotated), metric=metric, split="test")
        score = cached_scores(load(str(fold.scorer)).score, folder, f"fold-{fold.number}")
        probe = cross_fitting.probe and fold.number == 1
        evaluated.append(evaluate_split(pools, held_out, score, metric=metric, seed=seed, probe=probe))
        skipped += num_empty
    return evaluated, skipped


def count_leaks(evaluated: Sequence[EvaluatedSplit], folder: Path, trained_on: TrainedOn) -> int:
    """How many instances were tested by a scorer that was trained on their prompt."""
    scorers = [trained_on(_scorer_folder(folder, number)) for number in range(1, len(evaluated) + 1)]
    tested = ([pool.instance for pool in own.pools] for own in evaluated)
    return sum(count_seen(own, hashes) for own, hashes in zip(tested, scorers, strict=True))


def add_champion_scores(
    evaluated: Sequence[EvaluatedSplit], champion: Path, metric: str
) -> tuple[list[EvaluatedSplit], dict[str, int]]:
    """Adds the champion's out-of-fold scores to the splits, or the reason why it has none; also returns its leaks."""
    stored = read_out_of_fold(champion)
    if stored is None:
        reason = "it has no out-of-fold picks; cross-fit it with --folds and register it again"
        return [_mark_champion_unavailable(own, reason) for own in evaluated], {}
    scores = stored.look_up([pool for own in evaluated for pool in own.pools], metric)
    if isinstance(scores, str):
        return [_mark_champion_unavailable(own, scores) for own in evaluated], {}
    scores_left = iter(scores)
    joined = []
    for own in evaluated:
        values = {**own.selection.values, "champion": [next(scores_left) for _ in own.pools]}
        unavailable = {name: reason for name, reason in own.selection.unavailable.items() if name != "champion"}
        joined.append(replace(own, selection=replace(own.selection, values=values, unavailable=unavailable)))
    return joined, {"champion": stored.leaks}


def _mark_champion_unavailable(own: EvaluatedSplit, reason: str) -> EvaluatedSplit:
    unavailable = {**own.selection.unavailable, "champion": reason}
    return replace(own, selection=replace(own.selection, unavailable=unavailable))


def _train_fold(step: str, settings: Mapping[str, object], progress: Progress) -> None:
    """Runs the training step, which resumes at its checkpoint."""
    from cappy.training import finetuning, pretraining

    if step == "pretraining":
        own = rename_settings(pretraining.PretrainingConfig, settings)
        pretraining.run(build(pretraining.PretrainingConfig, own), progress)
    elif step == "finetuning":
        own = rename_settings(finetuning.FinetuningConfig, settings)
        finetuning.run(build(finetuning.FinetuningConfig, own), progress)
    else:
        raise ConfigError(f"--folds: step {quote(step)} is not a training step")


def _prefix_progress(progress: Progress, number: int, count: int) -> Progress:
    """Progress of a training that names the fold before its note."""

    def report(done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = "") -> None:
        fold = f"fold {number} of {count}"
        progress(done, total, unit=unit, resumed=resumed, note=f"{fold}, {note}" if note else fold)

    return report


def _is_trained(scorer: Path) -> bool:
    """Whether an earlier run trained the fold; the work folder's name depends on recipe, instances and version."""
    try:
        verify(scorer)
    except FolderError:
        return False
    return True


def _scorer_folder(work: Path, number: int) -> Path:
    return work / f".fold-{number}-scorer"


def _assign_folds(instances: Sequence[Instance], count: int, seed: int) -> dict[str, int]:
    """Group -> index of its fold. The groups, shuffled within each task, go to the folds in turn."""
    task_of = {instance.group_id: instance.task for instance in reversed(instances)}
    if len(task_of) < count:
        raise ConfigError(f"--folds {count}: there are only {len(task_of)} groups of instances; choose fewer folds")
    groups = sorted(task_of)
    order = np.random.default_rng(seed).permutation(len(groups))
    by_task = sorted((groups[index] for index in order), key=lambda group: task_of[group])
    return {group: index % count for index, group in enumerate(by_task)}


def pool_hash(pool: Pool) -> str:
    """A hash of the instance, its instruction and its candidates in order."""
    instance = pool.instance
    parts = [instance.instance_id, instance.group_id, instance.instruction, *pool.responses]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def out_of_fold_json(evaluated: Sequence[EvaluatedSplit], *, metric: str, leaks: int) -> str:
    """The text of out_of_fold.json. Raises FolderError if two instances are the same."""
    pools = [pool for own in evaluated for pool in own.pools]
    rows = {pool_hash(pool): scores.tolist() for pool, scores in zip(pools, get_scorer_scores(pools), strict=True)}
    if len(rows) != len(pools):
        repeated, _ = Counter(pool_hash(pool) for pool in pools).most_common(1)[0]
        name = next(pool.instance.instance_id for pool in pools if pool_hash(pool) == repeated)
        raise FolderError(f"instance {quote(name)} is in the data twice; prepare the instances again")
    values = {"metric": metric, "folds": len(evaluated), "leaks": leaks, "scores": rows}
    return json.dumps(values, allow_nan=False) + "\n"


def read_out_of_fold(folder: Path) -> OutOfFoldScores | None:
    """Reads the out-of-fold scores beside a scorer; None if there are none. Raises FolderError if they are damaged."""
    path = folder / OUT_OF_FOLD
    if not path.is_file():
        return None
    try:
        return TypeAdapter(OutOfFoldScores).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise FolderError(f"{path}: {field}: {first['msg']}; evaluate again with --folds") from error
