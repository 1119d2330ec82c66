"""The training loop: runs updates, checks on the validation instances and checkpoints, and keeps the best weights.

`run_trial` runs a few real updates and projects the time and memory of the whole run.
"""

import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from cappy.errors import ConfigError, TrainingError
from cappy.progress import Progress
from cappy.scoring.model import has_bf16, keep_heads_in_fp32
from cappy.scoring.scorer import Scorer
from cappy.training import checkpoint
from cappy.training.checkpoint import CONTINUE_REMEDY, Checkpoint, CheckpointClock, Shutdown, TrainingState
from cappy.training.checks import CHECK_CANDIDATES, check_scorer, explain_kept_weights, record_check, stops_early
from cappy.training.corpus import Corpora, Corpus
from cappy.training.distributed import ReplicatedStrategy, Strategy, World
from cappy.training.feed import DrawnInstance, count_updates, draw_batch, padded_tokens, split_batch
from cappy.training.launch import check_batch
from cappy.training.meter import Meter, count_layer_weights, describe_progress, pair_flops, peak_flops
from cappy.training.settings import TrainingSettings
from cappy.training.update import DivergedError, default_learning_rate, learning_rate, rate_falls, run_update

MAX_NAMED_INSTANCES = 16
"""Maximum number of instances listed in an error."""
CURVE_POINTS = 200
"""Approximate number of points of a run's curve."""
TRIAL_UPDATES = 20
UNTIMED_UPDATES = 2
"""First updates of a trial, which are not timed because they also load and allocate."""
FORWARD_COST_SHARE = 1 / 3
"""Cost of scoring a pair relative to training on it: a backward pass costs twice a forward pass."""


@dataclass(frozen=True, kw_only=True)
class TrainingOutcome:
    """The result of a training run.

    The weights that were kept are those after `best_update` updates; `reason` says why they are not the last ones, ""
    if they are. `best_pick_label` is the mean label, 0 to 1, of the responses that they pick on the validation
    instances, -1 without such instances. `log` has an entry per check, `curve` about `CURVE_POINTS` points; `events`
    lists deviations such as a smaller token budget.
    """

    updates: int
    best_update: int
    best_pick_label: float
    reason: str
    log: tuple[dict[str, float], ...]
    curve: tuple[dict[str, float], ...] = ()
    events: tuple[str, ...] = ()


def fit(
    scorer: Scorer, corpora: Corpora, config: TrainingSettings, checkpoints: Path, world: World, progress: Progress
) -> TrainingOutcome:
    """Trains the scorer in place, from the last checkpoint if there is one, and leaves the best weights in it.

    Order, draws and dropout depend only on the seed and the update's index, so a resumed run equals an uninterrupted
    one. Only the first rank reads and writes checkpoints, and only it has the best weights at the end.

    Raises ConfigError if the settings cannot train on these instances, and TrainingError if the loss diverges, memory
    runs out, or SIGTERM stops the run.
    """
    check_trainable(corpora.train, config, world)
    run = TrainingRun(scorer, corpora, config, checkpoints, world)
    state, resumed_at = run.state, run.state.update
    with Shutdown() as shutdown:
        while True:
            if run.check_due:
                run.check(shutdown)
            if state.stopped or state.update >= run.updates:
                break
            run.run_update()
            run.save_if_due(shutdown)
            progress(state.update, run.updates, unit="updates", resumed=resumed_at, note=run.summary)
    reason = explain_kept_weights(state, run.updates, len(run.validation))
    progress(state.update, state.update, unit="updates", resumed=resumed_at, note=reason or run.summary)
    if world.first:
        scorer.model, scorer.forward_wrapper = run.strategy.best_model(run.best).eval(), None
        scorer.autocast = False
    return TrainingOutcome(
        updates=state.update,
        best_update=state.best_update,
        best_pick_label=state.best_pick,
        reason=reason,
        log=tuple(state.log),
        curve=tuple(state.curve),
        events=(*state.events, *([reason] if reason else [])),
    )


class TrainingRun:
    """One training run: its inputs, its state, and the best weights so far (on the first rank only)."""

    def __init__(
        self, scorer: Scorer, corpora: Corpora, config: TrainingSettings, checkpoints: Path, world: World
    ) -> None:
        self.scorer, self.train, self.validation = scorer, corpora.train, corpora.validation
        self.config, self.checkpoints, self.world = config, checkpoints, world
        self.updates = count_updates(self.train, config)
        self.check_interval = max(1, self.updates // config.checks)
        self.peak_rate = config.learning_rate or default_learning_rate(scorer.model.config.hidden_size)
        self.layer_weights = count_layer_weights(scorer.model)
        scorer.autocast = _uses_bf16(config, scorer.device)
        if scorer.autocast:
            keep_heads_in_fp32(scorer.model)
        self.meter = Meter(peak_flops(scorer.device, world.size, bf16=scorer.autocast))
        self.strategy = _start_strategy(scorer, config, world)
        self.clock = CheckpointClock(config.checkpoint_seconds, config.checkpoint_updates)
        self.state, self.best, self.note = TrainingState(budget=config.batch_tokens), dict[str, Tensor](), ""
        self._resume()

    def _resume(self) -> None:
        """Restores the first rank's checkpoint on all ranks, or copies the first rank's weights if it has none."""
        saved, note = checkpoint.load(self.checkpoints) if self.world.first else (None, "")
        state, self.note = self.world.broadcast_object((saved and asdict(saved.state), note))
        if state is not None:
            weights = self.world.broadcast_tensors(saved.weights if saved else {})
            self.strategy.restore(weights, self.world.broadcast_tensors(saved.moments if saved else {}))
            self.state, self.best = TrainingState(**state), saved.best if saved else {}
        elif self.world.size > 1:
            self.strategy.restore(self.world.broadcast_tensors(self.strategy.weights()), {})

    @property
    def summary(self) -> str:
        """The text shown with the progress: loss, rate, speed and the note about damaged checkpoints."""
        update_index = self.state.update - 1
        figures = ""
        if update_index >= 0:
            figures = describe_progress(self.state.running_loss, self.rate_at(update_index), self.meter.figures())
        return ", ".join(filter(None, (figures, self.note)))

    def rate_at(self, update_index: int) -> float:
        """The learning rate of an update, counted from 0."""
        return learning_rate(update_index, self.updates, self.peak_rate, self.config.warmup, self.config.schedule)

    @property
    def check_due(self) -> bool:
        """Whether the validation instances must be scored before the next update; a new head first learns."""
        state = self.state
        if state.update == 0 and self.scorer.has_new_head:
            return False
        at_interval = state.update % self.check_interval == 0 or state.update == self.updates
        return at_interval and not (state.log and state.log[-1]["update"] == state.update)

    def check(self, shutdown: Shutdown) -> None:
        """Scores the validation instances and keeps the weights unless this check is clearly below the best one."""
        check, config, state = None, self.config, self.state
        if len(self.validation):
            check = check_scorer(
                self.scorer,
                self.validation,
                config,
                world=self.world,
                lockstep=self.strategy.lockstep,
                stop_requested=shutdown.requested,
            )
            if check is None:
                self._save_and_stop()
        rate_falling = rate_falls(state.update, self.updates, config.warmup, config.schedule)
        early_stopping = stops_early(config, self.validation)
        if record_check(check, state, early_stopping=early_stopping, rate_falling=rate_falling):
            weights = self.strategy.weights()
            self.best = weights if self.world.first else {}
        state.stopped = state.checks_since_best >= config.patience

    def run_update(self) -> None:
        """Runs an optimizer step on the next instances; raises TrainingError if the run has diverged."""
        config, state = self.config, self.state
        draws = draw_batch(self.train, state.update, config.batch_instances, config.max_candidates, seed=config.seed)
        rate = self.rate_at(state.update)
        try:
            with self.meter.time_update():
                loss = run_update(
                    self.scorer, self.strategy, self.train, draws, config, state, rate=rate, world=self.world
                )
        except DivergedError as error:
            names = ", ".join(self.train.name(draw.index) for draw in draws[:MAX_NAMED_INSTANCES])
            names += f" and {len(draws) - MAX_NAMED_INSTANCES} more" if len(draws) > MAX_NAMED_INSTANCES else ""
            last_checkpoint = (
                f"last good checkpoint: {self.world.broadcast_object(checkpoint.describe_newest(self.checkpoints))}"
            )
            remedy = "give a smaller --learning-rate, or check these instances"
            raise TrainingError(
                f"update {state.update + 1}: {error}, instances {names}; {last_checkpoint}; {remedy}"
            ) from None
        state.running_loss = loss if state.update == 0 else 0.95 * state.running_loss + 0.05 * loss
        state.update += 1
        self._measure(draws, rate)

    def _measure(self, draws: Sequence[DrawnInstance], rate: float) -> None:
        """Records the cost of the update and, at intervals, a point of the curve."""
        lengths = [length for draw in draws for length in self.train.token_counts(draw.index, draw.responses)]
        encoder, state = self.scorer.model.config, self.state
        passes = split_batch(draws, state.budget, self.world.size)
        self.meter.add(
            pairs=len(lengths),
            tokens=sum(lengths),
            padded_tokens=sum(map(padded_tokens, passes)) if self.scorer.pads else sum(lengths),
            flops=sum(pair_flops(encoder, self.layer_weights, n) for n in lengths) if self.layer_weights else 0.0,
        )
        if state.update % max(1, self.updates // CURVE_POINTS) == 0 or state.update == self.updates:
            point = {"update": state.update, "loss": round(state.running_loss, 6), "rate": rate}
            state.curve.append({**point, **self.meter.figures()})

    def save_if_due(self, shutdown: Shutdown) -> None:
        """Writes a checkpoint if one is due; after SIGTERM, writes a last one and raises TrainingError."""
        flags = self.world.first and self.clock.due(self.state.update), shutdown.requested()
        due, stop = self.world.all_reduce([float(flag) for flag in flags])
        if stop:
            self._save_and_stop()
        if due:
            self._save()

    def _save(self) -> None:
        weights, moments = self.strategy.weights(), self.strategy.moments()
        if self.world.first:
            saved = Checkpoint(state=self.state, weights=weights, moments=moments, best=self.best)
            checkpoint.save(self.checkpoints, saved)

    def _save_and_stop(self) -> NoReturn:
        self._save()
        # When a rank exits, the launcher ends the others: wait until the first rank has written the checkpoint.
        self.world.broadcast_object(None)
        message = f"stopped by SIGTERM after update {self.state.update} of {self.updates}"
        raise TrainingError(f"{message}; the checkpoint is written, {CONTINUE_REMEDY}")


def run_trial(
    scorer: Scorer, corpora: Corpora, config: TrainingSettings, world: World, progress: Progress
) -> dict[str, float]:
    """Runs `TRIAL_UPDATES` updates, discards them, and returns their figures for this rank, in seconds and bytes.

    `projected_seconds` is the time of the whole run on these ranks without early stopping: all epochs and the checks,
    which are assumed to cost `FORWARD_COST_SHARE` of training per pair.
    """
    check_trainable(corpora.train, config, world)
    with tempfile.TemporaryDirectory() as folder:
        run = TrainingRun(scorer, corpora, config, Path(folder), world)
        count = min(TRIAL_UPDATES, run.updates)
        ends = [time.perf_counter()]
        for done in range(1, count + 1):
            if done == UNTIMED_UPDATES + 1:
                run.meter.reset()
            run.run_update()
            ends.append(time.perf_counter())
            progress(done, count, unit="updates of the trial", note=run.summary)
    untimed = min(UNTIMED_UPDATES, count - 1)
    seconds_per_update = (ends[-1] - ends[untimed]) / (count - untimed)
    figures = run.meter.figures()
    pairs_per_check = sum(
        min(CHECK_CANDIDATES, len(run.validation.selectable(index))) for index in range(len(run.validation))
    )
    check_count = len({*range(0, run.updates, run.check_interval), run.updates})
    check_seconds = FORWARD_COST_SHARE * pairs_per_check / max(figures["pairs_per_second"], 1e-9) * check_count
    return {
        "batch_tokens": float(run.state.budget),
        "trial_updates": float(count),
        "seconds_per_update": seconds_per_update,
        **figures,
        "peak_bytes": float(_peak_memory(scorer.device)),
        "updates": float(run.updates),
        "projected_seconds": seconds_per_update * run.updates + check_seconds,
    }


def _start_strategy(scorer: Scorer, config: TrainingSettings, world: World) -> Strategy:
    """Creates the strategy `config.parallelism` for the scorer; ConfigError if its packages cannot be imported."""
    if config.parallelism == "deepspeed":
        from cappy.training.deepspeed import DeepSpeedStrategy

        strategy = DeepSpeedStrategy(scorer.model, config, world)
        scorer.forward_wrapper = strategy.engine  # The engine gathers sharded weights for a pass.
        return strategy
    if config.parallelism != "jax":
        return ReplicatedStrategy(scorer.model, config, world)
    if config.precision == "bf16":
        raise ConfigError("--precision bf16: --parallelism jax computes in fp32; give --precision auto or fp32")
    try:
        from cappy.training.tpu.strategy import JaxStrategy
    except ImportError as error:
        remedy = "pip install 'cappy-scorer[tpu]', or --parallelism single"
        raise ConfigError(f"--parallelism jax: JAX or optax cannot be imported ({error}); {remedy}") from error
    return JaxStrategy(scorer, config)


def check_trainable(train: Corpus, config: TrainingSettings, world: World) -> None:
    """Raises ConfigError if the settings cannot train on these instances."""
    if not len(train):
        raise ConfigError("training: no training instance has two different responses; sample more candidates")
    facts = train.facts
    if facts.lowest == facts.highest:
        remedy = "nothing can be learned; choose another --metric or sample more candidates"
        raise ConfigError(f"training: every label {config.metric!r} is {facts.lowest:g}; {remedy}")
    if config.schedule == "published" and count_updates(train, config) < 2:
        raise ConfigError("--schedule published: starts at rate 0, and there is one update; give more --train-rows")
    if len(train) < world.size:
        raise ConfigError(f"training: {len(train)} instances for {world.size} ranks; give fewer --devices or --nodes")
    check_batch(config, world.size)
    if config.batch_tokens < train.longest_pair:
        remedy = f"give --batch-tokens {train.longest_pair} or more"
        raise ConfigError(
            f"--batch-tokens {config.batch_tokens}: a pair can have {train.longest_pair} tokens; {remedy}"
        )


def _uses_bf16(config: TrainingSettings, device: torch.device) -> bool:
    """Whether matrix products run in bf16: with `bf16`, and with `auto` on a GPU that supports it."""
    return config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda" and has_bf16(device))


def _peak_memory(device: torch.device) -> int:
    """Peak memory so far in bytes: of the GPU if there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
