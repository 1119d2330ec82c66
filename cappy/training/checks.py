"""What training is judged by: the mean label of the picks on the validation instances."""

import itertools
from collections.abc import Callable, Sequence

import torch

from cappy.scoring.batching import by_length
from cappy.scoring.scorer import Scorer
from cappy.training.checkpoint import State
from cappy.training.corpus import Corpus
from cappy.training.feed import Drawn, pool
from cappy.training.plan import TrainingSettings
from cappy.training.ranks import Ranks

CANDIDATES = 16
"""Responses of a validation instance that a pick is made from, at most: more cost more, and leave less to chance."""
CHUNK = 64
"""Instances scored at a time: what memory holds, and how long a wish to stop waits."""


def mean_pick(
    scorer: Scorer,
    validation: Corpus,
    plan: TrainingSettings,
    *,
    ranks: Ranks,
    lockstep: bool = False,
    asked: Callable[[], bool] = lambda: False,
) -> float | None:
    """Mean label of the response that the scorer picks, 0 to 1; of equal scores the first response is picked.

    Every rank scores its share, or all of it in `lockstep`. None, on all ranks, where `asked` turns true on one.
    """
    scorer.model.eval()
    numbers = range(len(validation)) if lockstep else range(ranks.rank, len(validation), ranks.count)
    picked = [0.0] * len(validation)
    stopped = False
    for start in range(0, len(numbers), CHUNK):
        stopped = not lockstep and asked()
        if stopped:
            break
        own = numbers[start : start + CHUNK]
        pools = [pool(validation, index, CANDIDATES, seed=plan.seed) for index in own]
        for index, label in zip(own, _picks(scorer, validation, pools), strict=True):
            picked[index] = label
    *picked, stops = (ranks.summed if not lockstep else list)([*picked, float(stopped)])
    return None if stops else sum(picked) / len(picked)


def judge(pick: float | None, state: State, *, last: bool = False) -> bool:
    """Notes a check in the state; whether its weights are the best so far.

    They are where the picks are better than ever before, where there are no validation instances (None), and always
    where the `last` weights are wanted: then nothing stops early.
    """
    value = state.best_pick + 1e-9 if pick is None else pick
    told = {} if pick is None else {"pick": round(pick, 6)}
    state.log.append({"update": state.update, "loss": round(state.running_loss, 6), **told})
    if last or value > state.best_pick:
        state.best_pick, state.best_update, state.checks_since_best = value, state.update, 0
        return True
    state.checks_since_best += 1
    return False


@torch.no_grad()
def _picks(scorer: Scorer, validation: Corpus, pools: Sequence[Drawn]) -> list[float]:
    """The label of the pick of each pool."""
    encoded = [pair for drawn in pools for pair in validation.pairs(drawn.index, drawn.chosen)]
    scores = [0.0] * len(encoded)
    for batch in by_length(encoded, scorer.batch_tokens):
        logits = scorer.logits([encoded[number] for number in batch]).tolist()
        for number, value in zip(batch, logits, strict=True):
            scores[number] = value
    found = iter(scores)
    picks = []
    for drawn in pools:
        own = list(itertools.islice(found, len(drawn.chosen)))
        picks.append(validation.labels(drawn.index, drawn.chosen)[own.index(max(own))])
    return picks
