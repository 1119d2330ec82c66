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
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
from pydantic import TypeAdapter, ValidationError

from cappy.config import build, rename_settings
from cappy.errors import ConfigError, FolderError, quote
from cappy.evaluation.findings import OUT_OF_FOLD
from cappy.evaluation.protocol import (
    AnyScorer,
    EvaluatedSplit,
    ScoredSplit,
    cached_scores,
    get_scorer_scores,
    mark_unavailable,
    score_split,
    select_split,
    split_pools,
)
from cappy.preparation.leakage import SplitRows
from cappy.progress import Progress
from cappy.records import Instance, Manifest, Split, prompt_hash, read, write
from cappy.records.folder import MANIFEST, verify
from cappy.scoring.training_data import ReadTrainingData, count_seen
from cappy.selection.pools import Pool, ScoreFunction, Vector
from cappy.steps import TRAINING_STEPS
from cappy.untrusted import JSON

Load = Callable[[str], AnyScorer]
"""Loads a scorer from a folder."""
ValueUnseen = Callable[[Sequence[Pool]], list[Vector] | None]
"""The values that the champion's selector gives to pools; None if the champion was trained on one of them."""
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

    `values` are those of the selector that was fitted on the other folds; earlier releases stored none, since they
    picked by the score. `leaks` counts the instances that were tested by a scorer that was trained on their prompt.
    """

    metric: str
    folds: int
    leaks: int
    scores: Mapping[str, Sequence[float]]
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def look_up(
        self, pools: Sequence[Pool], metric: str, value_unseen: "ValueUnseen | None" = None
    ) -> list[Vector] | str:
        """The selector's values of the candidates of `pools`, or the reason why they cannot be compared.

        Pools that are not stored are valued by `value_unseen`, if the scorer was not trained on them.
        """
        if metric != self.metric:
            return f"its out-of-fold picks are labelled by {self.metric}, this report by {metric}"
        values = self.values or self.scores
        unknown = [pool for pool in pools if pool_hash(pool) not in values]
        valued = value_unseen(unknown) if unknown and value_unseen is not None else None
        if unknown and valued is None:
            return (
                f"its out-of-fold picks cover {len(values)} instances, this report {len(pools)}, and only "
                f"{len(pools) - len(unknown)} of them are the same with the same candidates"
            )
        left = iter(valued or ())
        stored = (values.get(pool_hash(pool)) for pool in pools)
        return [next(left) if each is None else np.array(each, dtype=np.float64) for each in stored]


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
    others: Mapping[str, ScoreFunction] = MappingProxyType({}),
) -> tuple[list[EvaluatedSplit], int]:
    """Evaluates each fold's test split with the scorer trained on the other folds; counts instances without candidates.

    The selector of a fold is fitted on the out-of-fold scores of all other folds, whose scorers were trained on this
    fold too: what its at most four weights take over from that was not measured. `others` score every pool too. An
    interrupted run resumes at the
    fold's training checkpoint, or reuses the scores that it stored. A fold is not trained again if its scorer is
    complete (every sha256 matches).
    """
    step, settings = recipe
    count, seed, metric = cross_fitting.folds, cross_fitting.seed, cross_fitting.metric
    scored_splits: list[ScoredSplit] = []
    skipped = 0
    for fold in prepare_folds(instances, count, seed, folder):
        if not _is_trained(fold.scorer):
            paths = {"source": fold.annotated, "target": fold.scorer, "work": cross_fitting.work}
            fold_settings = {**settings, **paths, "fresh": cross_fitting.fresh}
            (train or _train_fold)(step, fold_settings, _prefix_progress(progress, fold.number, count))
        pools, held_out, num_empty = split_pools(read(fold.annotated), metric=metric, split="test")
        score = cached_scores(load(str(fold.scorer)).score, folder, f"fold-{fold.number}")
        with_probes = cross_fitting.with_probes and fold.number == 1
        scored_splits.append(score_split(pools, held_out, score, others, seed=seed, with_probes=with_probes))
        skipped += num_empty
    return [
        select_split(
            scored,
            metric=metric,
            seed=seed,
            fit_on=[pool for other in scored_splits if other is not scored for pool in other.pools],
            evidence="out-of-fold",
        )
        for scored in scored_splits
    ], skipped


def count_leaks(evaluated_splits: Sequence[EvaluatedSplit], folder: Path, read_training_data: ReadTrainingData) -> int:
    """How many instances were tested by a scorer that was trained on their prompt."""
    training_of_folds = [
        read_training_data(_scorer_folder(folder, number)) for number in range(1, len(evaluated_splits) + 1)
    ]
    tested = ([pool.instance for pool in evaluated.pools] for evaluated in evaluated_splits)
    return sum(count_seen(instances, training) for instances, training in zip(tested, training_of_folds, strict=True))


def add_champion_scores(
    evaluated_splits: Sequence[EvaluatedSplit],
    champion: Path,
    metric: str,
    value_unseen: "ValueUnseen | None" = None,
) -> tuple[list[EvaluatedSplit], dict[str, int]]:
    """Adds the champion's out-of-fold values to the splits, or the reason why it has none; also returns its leaks.

    Instances that are new since its cross-fitting are valued by `value_unseen`.
    """
    stored = read_out_of_fold(champion)
    if stored is None:
        reason = "it has no out-of-fold picks; cross-fit it with --folds and register it again"
        return [mark_unavailable(evaluated, "champion", reason) for evaluated in evaluated_splits], {}
    pools = [pool for evaluated in evaluated_splits for pool in evaluated.pools]
    scores = stored.look_up(pools, metric, value_unseen)
    if isinstance(scores, str):
        return [mark_unavailable(evaluated, "champion", scores) for evaluated in evaluated_splits], {}
    scores_left = iter(scores)
    joined = []
    for evaluated in evaluated_splits:
        values = {**evaluated.selection.values, "champion": [next(scores_left) for _ in evaluated.pools]}
        unavailable = {name: reason for name, reason in evaluated.selection.unavailable.items() if name != "champion"}
        joined.append(
            replace(evaluated, selection=replace(evaluated.selection, values=values, unavailable=unavailable))
        )
    return joined, {"champion": stored.leaks}


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
    """Wraps `progress` so that it counts over all folds, which are equally long, and every note names the fold."""

    def report(done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = "") -> None:
        fold = f"fold {number} of {count}"
        if total is not None:
            done, total = (number - 1) * total + done, count * total
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
    selector_values = [value for evaluated in evaluated_splits for value in evaluated.selection.values["selector"]]
    if len(rows) != len(pools):
        repeated, _ = Counter(pool_hash(pool) for pool in pools).most_common(1)[0]
        name = next(pool.instance.instance_id for pool in pools if pool_hash(pool) == repeated)
        raise FolderError(f"instance {quote(name)} is in the data twice; prepare the instances again")
    values = {
        "metric": metric,
        "folds": len(evaluated_splits),
        "leaks": leaks,
        "scores": rows,
        "values": {pool_hash(pool): value.tolist() for pool, value in zip(pools, selector_values, strict=True)},
    }
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
