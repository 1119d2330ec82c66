"""Cross-fitting: trains the recipe of a scorer once per fold, so that every instance is tested by a scorer that was not
trained on it, nor on another template of its row.

The result is an estimate for the recipe, not for the evaluated scorer, which was trained on more instances, including
some of the tested ones. The out-of-fold scores are registered with the scorer, so that another recipe can be compared
with its recipe on the same instances with the same candidates.
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
from cappy.scoring.training_data import ReadTrainingData, count_seen
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
    """The settings of a cross-fitting: folds and their seed, the metric, and where the folds are trained.

    `with_probes` says whether to run the probes of the report.
    """

    folds: int
    seed: int
    metric: str
    with_probes: bool
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
    """Scores of the candidates of each pool, by `pool_hash`, from a scorer that was trained on the other folds.

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
        is_stored = [pool_hash(pool) in self.scores for pool in pools]
        if not all(is_stored) or len(pools) != len(self.scores):
            return (
                f"its out-of-fold picks cover {len(self.scores)} instances, this report {len(pools)}, and only "
                f"{sum(is_stored)} of them are the same with the same candidates"
            )
        return [np.array(self.scores[pool_hash(pool)], dtype=np.float64) for pool in pools]


def split_folds(instances: Sequence[Instance], count: int, seed: int) -> Iterator[list[Instance]]:
    """Yields the instances `count` times, with different splits.

    Every instance is in test once and in validation once. The validation instances of a fold are the test instances of
    the next one; the others are for training. Groups stay together, and every task is spread over the folds as evenly
    as its groups allow. Training and validation instances that the leak check would report as near-duplicates of the
    fold's held-out instances are dropped. Raises ConfigError if there are fewer groups than folds.
    """
    fold_of = _assign_folds(instances, count, seed)
    for number in range(count):
        splits: dict[int, Split] = {number: "test", (number + 1) % count: "validation"}
        yield _drop_near_duplicates(
            [replace(instance, split=splits.get(fold_of[instance.group_id], "train")) for instance in instances]
        )


def _drop_near_duplicates(instances: Sequence[Instance]) -> list[Instance]:
    """Drops training and validation instances that are near-duplicates of held-out ones."""
    rows = SplitRows()
    for instance in instances:
        rows.add(instance, instance.split)
    leaks = rows.find_leaks()
    return [each for each in instances if each.split == "test" or prompt_hash(each.instruction) not in leaks]


def prepare_folds(instances: Sequence[Instance], count: int, seed: int, work: Path) -> Iterator[Fold]:
    """Writes the instances of each fold under `work`, unless an earlier run did, and yields the folds."""
    for number, fold_instances in enumerate(split_folds(instances, count, seed), start=1):
        fold = Fold(number=number, annotated=work / f".fold-{number}", scorer=_scorer_folder(work, number))
        if not (fold.annotated / MANIFEST).is_file():
            write(fold.annotated, fold_instances)
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
    """Evaluates each fold's test split with the scorer trained on the other folds; counts instances without candidates.

    An interrupted run resumes at the fold's training checkpoint, or reuses the scores that it stored. A fold is not
    trained again if its scorer is complete (every sha256 matches).
    """
    step, settings = recipe
    count, seed, metric = cross_fitting.folds, cross_fitting.seed, cross_fitting.metric
    evaluated_splits, skipped = [], 0
    for fold in prepare_folds(instances, count, seed, folder):
        if not _is_trained(fold.scorer):
            paths = {"source": fold.annotated, "target": fold.scorer, "work": cross_fitting.work}
            fold_settings = {**settings, **paths, "fresh": cross_fitting.fresh}
            (train or _train_fold)(step, fold_settings, _prefix_progress(progress, fold.number, count))
        pools, held_out, num_empty = split_pools(read(fold.annotated), metric=metric, split="test")
        score = cached_scores(load(str(fold.scorer)).score, folder, f"fold-{fold.number}")
        with_probes = cross_fitting.with_probes and fold.number == 1
        split = evaluate_split(pools, held_out, score, metric=metric, seed=seed, with_probes=with_probes)
        evaluated_splits.append(split)
        skipped += num_empty
    return evaluated_splits, skipped


def count_leaks(evaluated_splits: Sequence[EvaluatedSplit], folder: Path, read_training_data: ReadTrainingData) -> int:
    """How many instances were tested by a scorer that was trained on their prompt."""
    training_of_folds = [
        read_training_data(_scorer_folder(folder, number)) for number in range(1, len(evaluated_splits) + 1)
    ]
    tested = ([pool.instance for pool in evaluated.pools] for evaluated in evaluated_splits)
    return sum(count_seen(instances, training) for instances, training in zip(tested, training_of_folds, strict=True))


def add_champion_scores(
    evaluated_splits: Sequence[EvaluatedSplit], champion: Path, metric: str
) -> tuple[list[EvaluatedSplit], dict[str, int]]:
    """Adds the champion's out-of-fold scores to the splits, or the reason why it has none; also returns its leaks."""
    stored = read_out_of_fold(champion)
    if stored is None:
        reason = "it has no out-of-fold picks; cross-fit it with --folds and register it again"
        return [_mark_champion_unavailable(evaluated, reason) for evaluated in evaluated_splits], {}
    scores = stored.look_up([pool for evaluated in evaluated_splits for pool in evaluated.pools], metric)
    if isinstance(scores, str):
        return [_mark_champion_unavailable(evaluated, scores) for evaluated in evaluated_splits], {}
    scores_left = iter(scores)
    joined = []
    for evaluated in evaluated_splits:
        values = {**evaluated.selection.values, "champion": [next(scores_left) for _ in evaluated.pools]}
        unavailable = {name: reason for name, reason in evaluated.selection.unavailable.items() if name != "champion"}
        joined.append(
            replace(evaluated, selection=replace(evaluated.selection, values=values, unavailable=unavailable))
        )
    return joined, {"champion": stored.leaks}


def _mark_champion_unavailable(evaluated: EvaluatedSplit, reason: str) -> EvaluatedSplit:
    unavailable = {**evaluated.selection.unavailable, "champion": reason}
    return replace(evaluated, selection=replace(evaluated.selection, unavailable=unavailable))


def _train_fold(step: str, settings: Mapping[str, object], progress: Progress) -> None:
    """Runs the training step, which resumes at its checkpoint."""
    from cappy.training import finetuning, pretraining

    if step == "pretraining":
        values = rename_settings(pretraining.PretrainingConfig, settings)
        pretraining.run(build(pretraining.PretrainingConfig, values), progress)
    elif step == "finetuning":
        values = rename_settings(finetuning.FinetuningConfig, settings)
        finetuning.run(build(finetuning.FinetuningConfig, values), progress)
    else:
        raise ConfigError(f"--folds: step {quote(step)} is not a training step")


def _prefix_progress(progress: Progress, number: int, count: int) -> Progress:
    """Wraps `progress` so that every note starts with the fold."""

    def report(done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = "") -> None:
        fold = f"fold {number} of {count}"
        progress(done, total, unit=unit, resumed=resumed, note=f"{fold}, {note}" if note else fold)

    return report


def _is_trained(scorer: Path) -> bool:
    """Whether an earlier run trained this scorer.

    The work folder is named after recipe, instances and version, so a complete scorer in it is the right one.
    """
    try:
        verify(scorer)
    except FolderError:
        return False
    return True


def _scorer_folder(work: Path, number: int) -> Path:
    return work / f".fold-{number}-scorer"


def _assign_folds(instances: Sequence[Instance], count: int, seed: int) -> dict[str, int]:
    """Group -> index of its fold. Groups are shuffled within each task and assigned to the folds in turn."""
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


def out_of_fold_json(evaluated_splits: Sequence[EvaluatedSplit], *, metric: str, leaks: int) -> str:
    """The text of out_of_fold.json. Raises FolderError if two instances are the same."""
    pools = [pool for evaluated in evaluated_splits for pool in evaluated.pools]
    rows = {pool_hash(pool): scores.tolist() for pool, scores in zip(pools, get_scorer_scores(pools), strict=True)}
    if len(rows) != len(pools):
        repeated, _ = Counter(pool_hash(pool) for pool in pools).most_common(1)[0]
        name = next(pool.instance.instance_id for pool in pools if pool_hash(pool) == repeated)
        raise FolderError(f"instance {quote(name)} is in the data twice; prepare the instances again")
    values = {"metric": metric, "folds": len(evaluated_splits), "leaks": leaks, "scores": rows}
    return json.dumps(values, allow_nan=False) + "\n"


def read_out_of_fold(folder: Path) -> OutOfFoldScores | None:
    """Reads the out-of-fold scores in a scorer's folder; None without them. Raises FolderError if they are damaged."""
    path = folder / OUT_OF_FOLD
    if not path.is_file():
        return None
    try:
        return TypeAdapter(OutOfFoldScores).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise FolderError(f"{path}: {field}: {first['msg']}; evaluate again with --folds") from error
