"""What training is judged by on the validation instances, which weights are kept, and when it stops.

A check scores the validation instances. Its value is the mean over them of the expected label under a softmax of the
scores (at the temperature of the listwise loss): it moves with every score, where the label of the best-scored response
jumps with one. Two checks are compared by the differences instance by instance (paired), with the standard error of
their mean. The weights kept are those of the latest check that is not below the best one by more than that error and a
thousandth: where the instances tell nothing apart, training longer wins.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cappy.scoring.forward import batch_by_length
from cappy.scoring.scorer import Scorer
from cappy.training.checkpoint import State
from cappy.training.corpus import Corpus
from cappy.training.distributed import Ranks
from cappy.training.feed import Drawn, pool
from cappy.training.losses import LISTWISE_TEMPERATURE
from cappy.training.settings import TrainingSettings

CANDIDATES = 16
"""Responses of a validation instance that a pick is made from, at most: more cost more, and leave less to chance."""
CHUNK = 64
"""Instances scored at a time: what memory holds, and how long a wish to stop waits."""
FEWEST = 8
"""Validation instances that a decision takes: of fewer a standard error is itself a guess, and nothing stops early."""
MARGIN = 0.001
"""A difference in the expected label, on its scale of 0 to 1, that no one would act on, however sure it is."""


@dataclass(frozen=True, slots=True)
class Check:
    """Of each validation instance the label of the response picked, and the expected label of a softmax; 0 to 1."""

    picks: tuple[float, ...]
    expected: tuple[float, ...]


def check_scorer(
    scorer: Scorer,
    validation: Corpus,
    config: TrainingSettings,
    *,
    ranks: Ranks,
    lockstep: bool = False,
    asked: Callable[[], bool] = lambda: False,
) -> Check | None:
    """The check of a scorer as it is; of equal scores the first response is picked.

    Every rank scores its share, or all of it in `lockstep`. None, on all ranks, where `asked` turns true on one.
    """
    scorer.model.eval()
    count = len(validation)
    numbers = range(count) if lockstep else range(ranks.rank, count, ranks.count)
    values = [0.0] * (2 * count)
    stopped = False
    for start in range(0, len(numbers), CHUNK):
        stopped = not lockstep and asked()
        if stopped:
            break
        own = numbers[start : start + CHUNK]
        pools = [pool(validation, index, CANDIDATES, seed=config.seed) for index in own]
        for index, labels in zip(own, _labels(scorer, validation, pools), strict=True):
            values[index], values[count + index] = labels
    *values, stops = (ranks.all_reduce if not lockstep else list)([*values, float(stopped)])
    return None if stops else Check(tuple(values[:count]), tuple(values[count:]))


def decides(config: TrainingSettings, validation: Corpus) -> bool:
    """Whether the validation instances decide which weights are kept and when training stops."""
    return config.keep == "best" and len(validation) >= FEWEST


def judge(check: Check | None, state: State, *, deciding: bool, falling: bool) -> bool:
    """Notes a check in the state; whether its weights are kept from now on.

    They always are where validation instances do not decide (`deciding`), or there are none (None). Checks that are not
    kept count against the patience once the learning rate is `falling`: before, the weights are on their way.
    """
    entry = {"update": state.update, "loss": round(state.running_loss, 6)}
    behind = error = 0.0
    if check is not None:
        if state.best_values:
            behind, error = _paired_difference(state.best_values, check.expected)
        if not state.best_values or behind < 0:
            state.best_values = list(check.expected)
        entry |= {"pick": round(_mean(check.picks), 6), "expected": round(_mean(check.expected), 6)}
        if deciding:
            entry |= {"behind": round(behind, 6), "error": round(error, 6)}
    state.log.append(entry)
    if deciding and behind > max(error, MARGIN):
        state.checks_since_best += falling
        return False
    state.best_pick = _mean(check.picks) if check is not None else state.best_pick
    state.best_update, state.checks_since_best = state.update, 0
    return True


def explain(state: State, updates: int, count: int) -> str:
    """Why other weights than the last were kept, of `count` validation instances; empty where the last were.

    `updates` is how many were planned.
    """
    if state.best_update == state.update:
        return ""
    later = [entry for entry in state.log if entry["update"] > state.best_update]
    nearest = min(later, key=lambda entry: entry["behind"] - entry["error"])
    kept = (
        f"the weights of update {state.best_update}" if state.best_update else "the scorer that training started from"
    )
    ended = f"stopped after update {state.update} of {updates}" if state.update < updates else f"{updates} updates"
    return (
        f"{ended}, kept {kept}: on {count} validation instances every later check is below the best by more than a "
        f"standard error (nearest: update {nearest['update']:.0f}, {nearest['behind']:.3f} below, error "
        f"{nearest['error']:.3f})"
    )


@torch.no_grad()
def _labels(scorer: Scorer, validation: Corpus, pools: Sequence[Drawn]) -> list[tuple[float, float]]:
    """The label of the pick and the expected label of each pool."""
    encoded = [pair for drawn in pools for pair in validation.pairs(drawn.index, drawn.chosen)]
    scores = [0.0] * len(encoded)
    for batch in batch_by_length(encoded, scorer.batch_tokens):
        logits = scorer.logits([encoded[number] for number in batch]).tolist()
        for number, value in zip(batch, logits, strict=True):
            scores[number] = value
    remaining = iter(scores)
    labels = []
    for drawn in pools:
        own = list(itertools.islice(remaining, len(drawn.chosen)))
        of_pool = validation.labels(drawn.index, drawn.chosen)
        labels.append((of_pool[own.index(max(own))], expected_label(own, of_pool)))
    return labels


def expected_label(scores: Sequence[float], labels: Sequence[float]) -> float:
    """The mean of the labels, each weighing as the softmax of its score."""
    highest = max(scores)
    weights = [math.exp((score - highest) / LISTWISE_TEMPERATURE) for score in scores]
    return sum(weight * label for weight, label in zip(weights, labels, strict=True)) / sum(weights)


def _paired_difference(best: Sequence[float], now: Sequence[float]) -> tuple[float, float]:
    """How far `now` is below `best` in the mean, and the standard error of that; infinite of a single instance."""
    differences = np.asarray(best) - np.asarray(now)
    count = len(differences)
    return float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(count)) if count > 1 else math.inf


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
