"""The loop: whole instances in, a scorer out, the best by what its picks are worth on held-out instances."""

import itertools
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cappy.errors import ConfigError
from cappy.progress import Progress
from cappy.scoring.scorer import Scorer
from cappy.training import checkpoint
from cappy.training.checkpoint import State
from cappy.training.feed import Group, batches, micro_batches, pools_to_check
from cappy.training.losses import instance_losses
from cappy.training.plan import TrainingSettings, default_rate, rate


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What training came to: `best_pick` is the mean label of the picks on the validation instances, 0 to 1."""

    updates: int
    best_update: int
    best_pick: float
    log: tuple[dict[str, float], ...]


def fit(
    scorer: Scorer,
    train: Sequence[Group],
    validation: Sequence[Group],
    plan: TrainingSettings,
    *,
    checkpoints: Path,
    progress: Progress,
) -> Outcome:
    """Trains the scorer in place, from the last checkpoint if there is one, and leaves the best weights in it.

    Order, draws and dropout depend on the seed and the update's number alone, so a resumed run equals an unbroken one.
    """
    train = [group for group in train if len(group.responses) > 1]
    if not train:
        raise ConfigError("training: no training instance has two different responses; sample more candidates")
    updates = max(1, math.ceil(len(train) / plan.batch_instances * plan.epochs))
    optimizer = _optimizer(scorer, plan)
    peak = plan.learning_rate or default_rate(scorer.model.config.hidden_size)
    resumed = checkpoint.load(checkpoints, scorer.model, optimizer)
    pools = pools_to_check(validation, plan.max_candidates, plan.seed)
    state, best = resumed or (State(), checkpoint.copy_weights(scorer.model))
    if resumed is None:
        _check(scorer, pools, state)
    started_at, saved_at = state.update, time.monotonic()
    every = max(1, updates // plan.checks)

    for batch in itertools.islice(_stream(train, plan), state.update, None):
        if state.stopped or state.update >= updates:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate(state.update, updates, peak, plan.warmup)
        loss = _update(scorer, optimizer, batch, plan, state.update)
        state.running_loss = loss if state.update == 0 else 0.95 * state.running_loss + 0.05 * loss
        state.update += 1
        if state.update % every == 0 or state.update == updates:
            if _check(scorer, pools, state):
                best = checkpoint.copy_weights(scorer.model)
            state.stopped = state.checks_since_best >= plan.patience
        if time.monotonic() - saved_at >= plan.checkpoint_seconds:
            checkpoint.save(checkpoints, scorer.model, optimizer, state, best)
            saved_at = time.monotonic()
        progress(state.update, updates, unit="updates", resumed=started_at)

    progress(state.update, state.update, unit="updates", resumed=started_at)
    scorer.model.load_state_dict(best)
    scorer.model.eval()
    return Outcome(updates=state.update, best_update=state.best_update, best_pick=state.best_pick, log=tuple(state.log))


def mean_pick(scorer: Scorer, pools: Sequence[Group]) -> float:
    """Mean label of the response that the scorer picks, 0 to 1; of equal scores the first response is picked."""
    scorer.model.eval()
    scores = iter(scorer.score([(pool.instruction, response) for pool in pools for response in pool.responses]))
    picks = []
    for pool in pools:
        own = list(itertools.islice(scores, len(pool.labels)))
        picks.append(pool.labels[own.index(max(own))])
    return sum(picks) / len(picks)


def _check(scorer: Scorer, pools: Sequence[Group], state: State) -> bool:
    """Scores the validation instances; whether they are picked better than ever before.

    Without validation instances there is nothing to stop early by, and the last weights are the best.
    """
    pick = mean_pick(scorer, pools) if pools else state.best_pick + 1e-9
    state.log.append({"update": state.update, "loss": round(state.running_loss, 6), "pick": round(pick, 6)})
    if pick > state.best_pick:
        state.best_pick, state.best_update, state.checks_since_best = pick, state.update, 0
        return True
    state.checks_since_best += 1
    return False


def _stream(train: Sequence[Group], plan: TrainingSettings) -> Iterator[list[Group]]:
    for epoch in itertools.count():
        yield from batches(train, plan.batch_instances, plan.max_candidates, seed=plan.seed, epoch=epoch)


def _update(
    scorer: Scorer, optimizer: torch.optim.AdamW, batch: Sequence[Group], plan: TrainingSettings, update: int
) -> float:
    """One step of the optimizer over whole instances, in micro-batches that fit the memory; the mean loss."""
    torch.manual_seed(random.Random(f"{plan.seed} {update}").getrandbits(63))
    scorer.model.train()
    optimizer.zero_grad()
    encoded = [scorer.encoder.encode([(group.instruction, text) for text in group.responses]) for group in batch]
    lengths = [[len(pair.ids) for pair in pairs] for pairs in encoded]
    total = 0.0
    for micro in micro_batches(batch, lengths, plan.batch_tokens):
        logits = scorer.logits([pair for index in micro for pair in encoded[index]])
        labels = torch.tensor([label for index in micro for label in batch[index].labels], device=logits.device)
        numbers = [number for number, index in enumerate(micro) for _ in batch[index].labels]
        groups = torch.tensor(numbers, device=logits.device)
        losses = instance_losses(
            logits, labels, groups, len(micro), head=scorer.head, relative=plan.relative, listwise=plan.listwise
        )
        loss = losses.sum() / len(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(scorer.model.parameters(), plan.clip)
    optimizer.step()
    return total


def _optimizer(scorer: Scorer, plan: TrainingSettings) -> torch.optim.AdamW:
    parameters = list(scorer.model.parameters())
    decayed = [parameter for parameter in parameters if parameter.ndim >= 2]
    plain = [parameter for parameter in parameters if parameter.ndim < 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": plain, "weight_decay": 0.0}], lr=0.0
    )
