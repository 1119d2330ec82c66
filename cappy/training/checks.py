"""Early stopping: checks the weights on the validation instances, and decides which are kept and when training stops.

A check scores the validation instances. Its value is the expected label under a softmax of the scores, at the
temperature of the listwise loss, averaged over the instances. Unlike the label of the best-scored response, this is
smooth in the scores. Two checks are compared by their paired differences per instance and the standard error of the
mean. The weights kept are those of the latest check that is not below the best by more than that error and
`MIN_DIFFERENCE`: if the instances cannot tell checks apart, longer training wins.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cappy.scoring.model import batch_by_length
from cappy.scoring.scorer import Scorer
from cappy.training.checkpoint import TrainingState
from cappy.training.corpus import Corpus
from cappy.training.distributed import World
from cappy.training.feed import DrawnInstance, draw_validation
from cappy.training.losses import LISTWISE_TEMPERATURE
from cappy.training.settings import TrainingSettings

CHECK_CANDIDATES = 16
"""Maximum responses scored per validation instance; more take longer and reduce the variance of a check."""
CHUNK = 64
"""Instances scored at a time; this bounds memory, and the time until a request to stop is noticed."""
MIN_INSTANCES = 8
"""Minimum number of validation instances for early stopping: with fewer, the standard error is too uncertain."""
MIN_DIFFERENCE = 0.001
"""Differences in the expected label (0 to 1) up to this are ignored, however significant."""


@dataclass(frozen=True, slots=True)
class Check:
    """For each validation instance, the label of the picked response and the expected label, both 0 to 1."""

    pick_labels: tuple[float, ...]
    expected: tuple[float, ...]


def check_scorer(
    scorer: Scorer,
    validation: Corpus,
    config: TrainingSettings,
    *,
    world: World,
    lockstep: bool = False,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Check | None:
    """Scores the validation instances; among equal scores, the first response is picked.

    Every rank scores its share, or all instances if `lockstep`. Returns None on all ranks if `stop_requested` returns
    true on one of them.
    """
    scorer.model.eval()
    count = len(validation)
    own_indices = range(count) if lockstep else range(world.rank, count, world.size)
    values = [0.0] * (2 * count)
    stop = False
    for start in range(0, len(own_indices), CHUNK):
        stop = not lockstep and stop_requested()
        if stop:
            break
        indices = own_indices[start : start + CHUNK]
        pools = [draw_validation(validation, index, CHECK_CANDIDATES, seed=config.seed) for index in indices]
        for index, (pick_label, expected) in zip(indices, _score_pools(scorer, validation, pools), strict=True):
            values[index], values[count + index] = pick_label, expected
    *values, stops = (world.all_reduce if not lockstep else list)([*values, float(stop)])
    return None if stops else Check(tuple(values[:count]), tuple(values[count:]))


def stops_early(config: TrainingSettings, validation: Corpus) -> bool:
    """Whether the validation instances decide which weights are kept and when training stops (early stopping)."""
    return config.keep == "best" and len(validation) >= MIN_INSTANCES


def record_check(check: Check | None, state: TrainingState, *, early_stopping: bool, rate_falling: bool) -> bool:
    """Records a check in the state and returns whether its weights are kept from now on.

    Without `early_stopping`, or without validation instances (`check` is None), they always are. A check whose weights
    are not kept counts against the patience only while the learning rate decays (`rate_falling`).
    """
    entry = {"update": state.update, "loss": round(state.running_loss, 6)}
    behind = error = 0.0
    if check is not None:
        if state.best_values:
            behind, error = _paired_difference(state.best_values, check.expected)
        if not state.best_values or behind < 0:
            state.best_values = list(check.expected)
        entry |= {"pick": round(_mean(check.pick_labels), 6), "expected": round(_mean(check.expected), 6)}
        if early_stopping:
            entry |= {"behind": round(behind, 6), "error": round(error, 6)}
    state.log.append(entry)
    if early_stopping and behind > max(error, MIN_DIFFERENCE):
        state.checks_since_best += rate_falling
        return False
    state.best_pick = _mean(check.pick_labels) if check is not None else state.best_pick
    state.best_update, state.checks_since_best = state.update, 0
    return True


def explain_kept_weights(state: TrainingState, updates: int, count: int) -> str:
    """Why the kept weights are not the last ones, as text; "" if they are.

    `updates` is the planned number of updates, `count` the number of validation instances.
    """
    if state.best_update == state.update:
        return ""
    later = [entry for entry in state.log if entry["update"] > state.best_update]
    nearest = min(later, key=lambda entry: entry["behind"] - entry["error"])
    source = (
        f"the weights of update {state.best_update}" if state.best_update else "the scorer that training started from"
    )
    outcome = f"stopped after update {state.update} of {updates}" if state.update < updates else f"{updates} updates"
    return (
        f"{outcome}, kept {source}: on {count} validation instances every later check is below the best by more than a "
        f"standard error (nearest: update {nearest['update']:.0f}, {nearest['behind']:.3f} below, error "
        f"{nearest['error']:.3f})"
    )


@torch.no_grad()
def _score_pools(scorer: Scorer, validation: Corpus, pools: Sequence[DrawnInstance]) -> list[tuple[float, float]]:
    """Scores the drawn responses of each instance; returns the label of the pick and the expected label of each."""
    encoded = [pair for draw in pools for pair in validation.pairs(draw.index, draw.responses)]
    scores = [0.0] * len(encoded)
    for batch in batch_by_length(encoded, scorer.batch_tokens):
        logits = scorer.training_logits([encoded[index] for index in batch]).tolist()
        for index, value in zip(batch, logits, strict=True):
            scores[index] = value
    remaining = iter(scores)
    results = []
    for draw in pools:
        pool_scores = list(itertools.islice(remaining, len(draw.responses)))
        pool_labels = validation.labels(draw.index, draw.responses)
        results.append((pool_labels[pool_scores.index(max(pool_scores))], expected_label(pool_scores, pool_labels)))
    return results


def expected_label(scores: Sequence[float], labels: Sequence[float]) -> float:
    """The mean of the labels, weighted by the softmax of the scores at `LISTWISE_TEMPERATURE`."""
    highest = max(scores)
    weights = [math.exp((score - highest) / LISTWISE_TEMPERATURE) for score in scores]
    return sum(weight * label for weight, label in zip(weights, labels, strict=True)) / sum(weights)


def _paired_difference(best: Sequence[float], current: Sequence[float]) -> tuple[float, float]:
    """How far `current` is below `best` on average, and the standard error of that (infinite for one instance)."""
    differences = np.asarray(best) - np.asarray(current)
    count = len(differences)
    return float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(count)) if count > 1 else math.inf


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
