"""The loop: whole instances in, a scorer out, the one that validation instances do not speak against.

And a trial of it: a few real updates, and from them the time and memory of the whole.
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
from cappy.scoring.forward import has_bf16, keep_heads_in_fp32
from cappy.scoring.scorer import Scorer
from cappy.training import checkpoint
from cappy.training.checkpoint import CONTINUES, Checkpoint, CheckpointClock, Shutdown, State
from cappy.training.checks import CANDIDATES, check_scorer, decides, explain, judge
from cappy.training.corpus import Corpora, Corpus
from cappy.training.distributed import Ranks, Replicas, Strategy
from cappy.training.feed import Drawn, batch, micro_batches, padded_tokens, updates_of
from cappy.training.meter import Meter, describe, flops_of_pair, layer_weights, peak_of
from cappy.training.settings import TrainingSettings
from cappy.training.update import DivergedError, default_rate, falls, rate, update

NAMED = 16
"""Instances that an error names."""
POINTS = 200
"""Points of a run's curve."""
TRIAL_UPDATES = 20
WARM = 2
"""First updates of a trial, which also load and allocate: they are not timed."""
FORWARD = 1 / 3
"""Cost of scoring a pair, as a share of training on it: the backward pass is twice the forward one."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What training came to: `best_pick` is the mean label of the picks on the validation instances, 0 to 1, of the
    weights that were kept, those of `best_update`; `reason` says why others than the last were, or is empty.

    `log` has an entry per check, `curve` one per `POINTS`th of the run; `events` tells what went otherwise than
    planned, such as a smaller token budget.
    """

    updates: int
    best_update: int
    best_pick: float
    reason: str
    log: tuple[dict[str, float], ...]
    curve: tuple[dict[str, float], ...] = ()
    events: tuple[str, ...] = ()


def fit(
    scorer: Scorer, corpora: Corpora, config: TrainingSettings, checkpoints: Path, ranks: Ranks, progress: Progress
) -> Outcome:
    """Trains the scorer in place, from the last checkpoint if there is one, and leaves the best weights in it.

    Order, draws and dropout depend on the seed and the update's number alone, so a resumed run equals an unbroken one.
    Of several ranks the first alone reads and writes checkpoints, and it alone has the best weights in the end.
    """
    refuse_unfit(corpora.train, config, ranks)
    run = Run(scorer, corpora, config, checkpoints, ranks)
    state, resumed_at = run.state, run.state.update
    with Shutdown() as shutdown:
        while True:
            if run.check_due:
                run.check(shutdown)
            if state.stopped or state.update >= run.updates:
                break
            run.update()
            run.save_if_due(shutdown)
            progress(state.update, run.updates, unit="updates", resumed=resumed_at, note=run.summary)
    reason = explain(state, run.updates, len(run.validation))
    progress(state.update, state.update, unit="updates", resumed=resumed_at, note=reason or run.summary)
    if ranks.first:
        scorer.model, scorer.through = run.strategy.best_model(run.best).eval(), None
        scorer.autocast = False
    return Outcome(
        updates=state.update,
        best_update=state.best_update,
        best_pick=state.best_pick,
        reason=reason,
        log=tuple(state.log),
        curve=tuple(state.curve),
        events=(*state.events, *([reason] if reason else [])),
    )


class Run:
    """One training run: what it works on, how far it is, and the best weights so far (the first rank's alone)."""

    def __init__(
        self, scorer: Scorer, corpora: Corpora, config: TrainingSettings, checkpoints: Path, ranks: Ranks
    ) -> None:
        self.scorer, self.train, self.validation = scorer, corpora.train, corpora.validation
        self.config, self.checkpoints, self.ranks = config, checkpoints, ranks
        self.updates = updates_of(self.train, config)
        self.every = max(1, self.updates // config.checks)
        self.peak = config.learning_rate or default_rate(scorer.model.config.hidden_size)
        self.layer_weights = layer_weights(scorer.model)
        scorer.autocast = _in_bf16(config, scorer.device)
        if scorer.autocast:
            keep_heads_in_fp32(scorer.model)
        self.meter = Meter(peak_of(scorer.device, ranks.count, bf16=scorer.autocast))
        self.strategy = _start_strategy(scorer, config, ranks)
        self.clock = CheckpointClock(config.checkpoint_seconds, config.checkpoint_updates)
        self.state, self.best, self.note = State(budget=config.batch_tokens), dict[str, Tensor](), ""
        self._resume()

    def _resume(self) -> None:
        """Puts the first rank's checkpoint, or its weights as they are, in place on all ranks."""
        saved, note = checkpoint.load(self.checkpoints) if self.ranks.first else (None, "")
        state, self.note = self.ranks.broadcast_object((saved and asdict(saved.state), note))
        if state is not None:
            weights = self.ranks.broadcast_tensors(saved.weights if saved else {})
            self.strategy.restore(weights, self.ranks.broadcast_tensors(saved.moments if saved else {}))
            self.state, self.best = State(**state), saved.best if saved else {}
        elif self.ranks.count > 1:
            self.strategy.restore(self.ranks.broadcast_tensors(self.strategy.weights()), {})

    @property
    def summary(self) -> str:
        """What a person wants to know beside how far it is."""
        now = self.state.update - 1
        figures = describe(self.state.running_loss, self.rate(now), self.meter.figures()) if now >= 0 else ""
        return ", ".join(filter(None, (figures, self.note)))

    def rate(self, update: int) -> float:
        """Learning rate of an update (0-based)."""
        return rate(update, self.updates, self.peak, self.config.warmup, self.config.schedule)

    @property
    def check_due(self) -> bool:
        """Whether the validation instances are to be scored before the next update."""
        state = self.state
        due = state.update % self.every == 0 or state.update == self.updates
        return due and not (state.log and state.log[-1]["update"] == state.update)

    def check(self, shutdown: Shutdown) -> None:
        """Scores the validation instances and keeps the weights unless they are clearly below the best."""
        check, config, state = None, self.config, self.state
        if len(self.validation):
            check = check_scorer(
                self.scorer,
                self.validation,
                config,
                ranks=self.ranks,
                lockstep=self.strategy.lockstep,
                asked=shutdown.requested,
            )
            if check is None:
                self._end()
        falling = falls(state.update, self.updates, config.warmup, config.schedule)
        if judge(check, state, deciding=decides(config, self.validation), falling=falling):
            weights = self.strategy.weights()
            self.best = weights if self.ranks.first else {}
        state.stopped = state.checks_since_best >= config.patience

    def update(self) -> None:
        """One step of the optimizer on the next instances; TrainingError where there is nothing to go on with."""
        config, state = self.config, self.state
        drawn = batch(self.train, state.update, config.batch_instances, config.max_candidates, seed=config.seed)
        now = self.rate(state.update)
        try:
            with self.meter.time_update():
                loss = update(self.scorer, self.strategy, self.train, drawn, config, state, rate=now, ranks=self.ranks)
        except DivergedError as error:
            names = ", ".join(self.train.name(one.index) for one in drawn[:NAMED])
            names += f" and {len(drawn) - NAMED} more" if len(drawn) > NAMED else ""
            good = f"last good checkpoint: {self.ranks.broadcast_object(checkpoint.newest(self.checkpoints))}"
            remedy = "give a smaller --learning-rate, or look at these instances"
            raise TrainingError(f"update {state.update + 1}: {error}, instances {names}; {good}; {remedy}") from None
        state.running_loss = loss if state.update == 0 else 0.95 * state.running_loss + 0.05 * loss
        state.update += 1
        self._measure(drawn, now)

    def _measure(self, drawn: Sequence[Drawn], rate: float) -> None:
        """Notes what the update cost, and a point of the curve now and then."""
        lengths = [length for one in drawn for length in self.train.tokens(one.index, one.chosen)]
        encoder, state = self.scorer.model.config, self.state
        passes = micro_batches(drawn, state.budget, self.ranks.count)
        self.meter.add(
            pairs=len(lengths),
            tokens=sum(lengths),
            padded=sum(map(padded_tokens, passes)) if self.scorer.pads else sum(lengths),
            flops=sum(flops_of_pair(encoder, self.layer_weights, n) for n in lengths) if self.layer_weights else 0.0,
        )
        if state.update % max(1, self.updates // POINTS) == 0 or state.update == self.updates:
            point = {"update": state.update, "loss": round(state.running_loss, 6), "rate": rate}
            state.curve.append({**point, **self.meter.figures()})

    def save_if_due(self, shutdown: Shutdown) -> None:
        """A checkpoint where it is time for one; the last one and a TrainingError where the machine wants us to end."""
        wishes = self.ranks.first and self.clock.due(self.state.update), shutdown.requested()
        due, ended = self.ranks.all_reduce([float(wish) for wish in wishes])
        if ended:
            self._end()
        if due:
            self._save()

    def _save(self) -> None:
        weights, moments = self.strategy.weights(), self.strategy.moments()
        if self.ranks.first:
            whole = Checkpoint(state=self.state, weights=weights, moments=moments, best=self.best)
            checkpoint.save(self.checkpoints, whole)

    def _end(self) -> NoReturn:
        self._save()
        self.ranks.broadcast_object(
            None
        )  # A rank that ends takes the others with it: not before the first has written.
        done = f"stopped by SIGTERM after update {self.state.update} of {self.updates}"
        raise TrainingError(f"{done}; the checkpoint is written, {CONTINUES}")


def trial(
    scorer: Scorer, corpora: Corpora, config: TrainingSettings, ranks: Ranks, progress: Progress
) -> dict[str, float]:
    """Trains `TRIAL_UPDATES` updates and forgets them; seconds and bytes, this rank's alone.

    `projected_seconds` are of the whole run on these ranks: every epoch, and the checks, a pair of which is taken to
    cost a third of a pair trained on. Early stopping would make it shorter.
    """
    refuse_unfit(corpora.train, config, ranks)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(scorer, corpora, config, Path(folder), ranks)
        count = min(TRIAL_UPDATES, run.updates)
        ends = [time.perf_counter()]
        for done in range(1, count + 1):
            if done == WARM + 1:
                run.meter.forget()
            run.update()
            ends.append(time.perf_counter())
            progress(done, count, unit="updates of the trial", note=run.summary)
    warm = min(WARM, count - 1)
    per_update = (ends[-1] - ends[warm]) / (count - warm)
    figures = run.meter.figures()
    checked = sum(min(CANDIDATES, len(run.validation.selectable(index))) for index in range(len(run.validation)))
    checks = len({*range(0, run.updates, run.every), run.updates})
    checking = FORWARD * checked / max(figures["pairs_per_second"], 1e-9) * checks
    return {
        "batch_tokens": float(run.state.budget),
        "trial_updates": float(count),
        "seconds_per_update": per_update,
        **figures,
        "peak_bytes": float(_peak_bytes(scorer.device)),
        "updates": float(run.updates),
        "projected_seconds": per_update * run.updates + checking,
    }


def _start_strategy(scorer: Scorer, config: TrainingSettings, ranks: Ranks) -> Strategy:
    """The strategy that the settings name, around the scorer's model.

    ConfigError where what it needs cannot be imported.
    """
    if config.parallelism == "deepspeed":
        from cappy.training.deepspeed import DeepSpeedStrategy

        sharded = DeepSpeedStrategy(scorer.model, config, ranks)
        scorer.through = sharded.engine  # It gathers sharded weights for a pass.
        return sharded
    if config.parallelism != "jax":
        return Replicas(scorer.model, config, ranks)
    if config.precision == "bf16":
        raise ConfigError("--precision bf16: the strategy jax computes in fp32; leave the precision at auto or fp32")
    try:
        from cappy.training.tpu.strategy import OnDevices
    except ImportError as error:
        remedy = "pip install 'cappy-scorer[tpu]', or --parallelism single"
        raise ConfigError(f"--parallelism jax: cannot be imported ({error}); {remedy}") from error
    return OnDevices(scorer, config)


def refuse_unfit(train: Corpus, config: TrainingSettings, ranks: Ranks) -> None:
    """ConfigError where these instances cannot be learned from as the settings say."""
    if not len(train):
        raise ConfigError("training: no training instance has two different responses; sample more candidates")
    facts = train.facts
    if facts.lowest == facts.highest:
        remedy = "nothing can be learned; choose another --metric or sample more candidates"
        raise ConfigError(f"training: every label {config.metric!r} is {facts.lowest:g}; {remedy}")
    if config.schedule == "published" and updates_of(train, config) < 2:
        raise ConfigError("--schedule published: begins at rate 0, and this is one update; give more --train-rows")
    if len(train) < ranks.count:
        raise ConfigError(f"training: {len(train)} instances for {ranks.count} ranks; give fewer --devices or --nodes")
    if config.batch_instances < ranks.count:
        remedy = f"give --batch-instances {ranks.count} or more, or fewer --devices"
        raise ConfigError(f"--batch-instances {config.batch_instances}: is less than the {ranks.count} ranks; {remedy}")
    if config.batch_tokens < train.longest_pair:
        remedy = f"give --batch-tokens {train.longest_pair} or more"
        raise ConfigError(
            f"--batch-tokens {config.batch_tokens}: a pair may have {train.longest_pair} tokens; {remedy}"
        )


def _in_bf16(config: TrainingSettings, device: torch.device) -> bool:
    """Whether matrix products run in bf16: where asked, and by `auto` on a GPU that has instructions for it."""
    return config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda" and has_bf16(device))


def _peak_bytes(device: torch.device) -> int:
    """Most memory so far: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
