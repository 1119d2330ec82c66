"""The loop of `cappy.training.loop` on JAX devices: the same order, losses, optimizer and choice of the best."""

import itertools
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cappy.errors import ConfigError
from cappy.progress import Progress
from cappy.scoring.scorer import Scorer
from cappy.training.checkpoint import State
from cappy.training.feed import Group, batches, pools_to_check
from cappy.training.loop import Outcome
from cappy.training.plan import TrainingSettings, default_rate, rate
from cappy.training.tpu import Compute, checkpoint
from cappy.training.tpu.batches import Rows, Shapes, Tokens, score_batches, update_batches
from cappy.training.tpu.encoder import architecture
from cappy.training.tpu.engine import Engine
from cappy.training.tpu.weights import from_model, into_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """The batches of one update, on the host, and how many instances they hold."""

    instances: int
    batches: tuple[Rows, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exam:
    """The validation pools, encoded once: `places[p]` are the numbers of pool p's responses among distinct pairs."""

    pools: tuple[Group, ...]
    places: tuple[tuple[int, ...], ...]
    batches: tuple[tuple[list[int], Tokens], ...]


def fit(
    scorer: Scorer,
    train: Sequence[Group],
    validation: Sequence[Group],
    plan: TrainingSettings,
    *,
    checkpoints: Path,
    progress: Progress,
    devices: Sequence[jax.Device] | None = None,
    compute: Compute = "float32",
) -> Outcome:
    """Trains the scorer in place, from the last checkpoint if there is one, and leaves the best weights in it.

    As `cappy.training.loop.fit`, over `devices` (all that JAX finds, if left out); `plan.batch_tokens` is per device.
    Order, draws and dropout depend on the seed and the update's number alone, so a resumed run equals an unbroken one,
    and one device equals many up to the order of float sums. Dropout is not the one that torch would draw.
    """
    train = [group for group in train if len(group.responses) > 1]
    if not train:
        raise ConfigError("training: no training instance has two different responses; sample more candidates")
    devices = devices or jax.devices()
    updates = max(1, math.ceil(len(train) / plan.batch_instances * plan.epochs))
    peak = plan.learning_rate or default_rate(scorer.model.config.hidden_size)
    engine = new_engine(scorer, plan, devices=devices, compute=compute)
    shapes = shapes_of(scorer, plan, devices=len(devices))
    resumed = checkpoint.load(checkpoints, engine)
    exam = new_exam(scorer, pools_to_check(validation, plan.max_candidates, plan.seed), shapes)
    state, best = resumed or (State(), engine.weights())
    if resumed is None:
        _check(engine, exam, state)
    started_at, saved_at = state.update, time.monotonic()
    every = max(1, updates // plan.checks)

    prepared = _prepared(scorer, train, plan, shapes, state.update)
    upcoming = next(prepared)
    while not state.stopped and state.update < updates:
        running = engine.update(
            upcoming.batches,
            instances=upcoming.instances,
            rate=rate(state.update, updates, peak, plan.warmup),
            seed=random.Random(f"{plan.seed} {state.update}").getrandbits(32),
        )
        # The host tokenizes the next update while the devices compute this one.
        upcoming = next(prepared)
        loss = float(running)
        state.running_loss = loss if state.update == 0 else 0.95 * state.running_loss + 0.05 * loss
        state.update += 1
        if state.update % every == 0 or state.update == updates:
            if _check(engine, exam, state):
                best = engine.weights()
            state.stopped = state.checks_since_best >= plan.patience
        if time.monotonic() - saved_at >= plan.checkpoint_seconds:
            checkpoint.save(checkpoints, engine, state, best)
            saved_at = time.monotonic()
        progress(state.update, updates, unit="updates", resumed=started_at)

    progress(state.update, state.update, unit="updates", resumed=started_at)
    into_model(scorer.model, best)
    scorer.model.eval()
    return Outcome(updates=state.update, best_update=state.best_update, best_pick=state.best_pick, log=tuple(state.log))


def new_engine(
    scorer: Scorer, plan: TrainingSettings, *, devices: Sequence[jax.Device], compute: Compute = "float32"
) -> Engine:
    """The scorer's weights on the devices; ConfigError where its architecture or its length is none of ours."""
    config = scorer.model.config
    arch = architecture(type(scorer.model).__name__, {**config.to_dict(), "num_labels": config.num_labels})
    if scorer.encoder.max_length > arch.positions:
        raise ConfigError(
            f"config.json: cappy.max_length: the model has {arch.positions} positions, "
            f"got {scorer.encoder.max_length}; set it to {arch.positions} or less"
        )
    dtype = jnp.dtype(compute)
    return Engine(from_model(scorer.model), arch, plan, head=scorer.head, devices=devices, dtype=dtype)


def shapes_of(scorer: Scorer, plan: TrainingSettings, *, devices: int) -> Shapes:
    """The shapes of a run: they depend on the plan and the number of devices, not on the data."""
    return Shapes(
        max_length=scorer.encoder.max_length,
        tokens=plan.batch_tokens * devices,
        largest=plan.max_candidates,
        most=plan.batch_instances * plan.max_candidates,
        devices=devices,
    )


def prepare(scorer: Scorer, batch: Sequence[Group], plan: TrainingSettings, shapes: Shapes) -> Update:
    """The instances of one update, encoded and padded."""
    encoded = [scorer.encoder.encode([(group.instruction, text) for text in group.responses]) for group in batch]
    rows = update_batches(batch, encoded, shapes, pad=scorer.tokenizer.pad_token_id, most_groups=plan.batch_instances)
    return Update(instances=len(batch), batches=tuple(rows))


def new_exam(scorer: Scorer, pools: Sequence[Group], shapes: Shapes) -> Exam:
    """The pools, with their distinct pairs encoded and padded."""
    pairs = [[(pool.instruction, response) for response in pool.responses] for pool in pools]
    distinct = {pair: number for number, pair in enumerate(dict.fromkeys(itertools.chain(*pairs)))}
    encoded = scorer.encoder.encode(list(distinct))
    return Exam(
        pools=tuple(pools),
        places=tuple(tuple(distinct[pair] for pair in of) for of in pairs),
        batches=tuple(score_batches(encoded, shapes, pad=scorer.tokenizer.pad_token_id)),
    )


def mean_pick(engine: Engine, exam: Exam) -> float:
    """Mean label of the response that the scores pick, 0 to 1; of equal scores the first response is picked."""
    scores = np.empty(sum(len(chosen) for chosen, _ in exam.batches), np.float32)
    for chosen, tokens in exam.batches:
        scores[chosen] = engine.scores(tokens)[: len(chosen)]
    picks = [pool.labels[scores[list(own)].argmax()] for pool, own in zip(exam.pools, exam.places, strict=True)]
    return sum(picks) / len(picks)


def _check(engine: Engine, exam: Exam, state: State) -> bool:
    """Scores the validation pools; whether they are picked better than ever before. Without pools, always."""
    pick = mean_pick(engine, exam) if exam.pools else state.best_pick + 1e-9
    state.log.append({"update": state.update, "loss": round(state.running_loss, 6), "pick": round(pick, 6)})
    if pick > state.best_pick:
        state.best_pick, state.best_update, state.checks_since_best = pick, state.update, 0
        return True
    state.checks_since_best += 1
    return False


def _prepared(
    scorer: Scorer, train: Sequence[Group], plan: TrainingSettings, shapes: Shapes, start: int
) -> Iterator[Update]:
    """The updates from number `start` on, without end."""
    size, most = plan.batch_instances, plan.max_candidates
    passes = (batches(train, size, most, seed=plan.seed, epoch=epoch) for epoch in itertools.count())
    for batch in itertools.islice(itertools.chain.from_iterable(passes), start, None):
        yield prepare(scorer, batch, plan, shapes)
