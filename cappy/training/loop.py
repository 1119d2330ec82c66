"""The loop: whole instances in, a scorer out, the one that validation instances do not speak against."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from cappy.errors import TrainingError
from cappy.progress import Progress
from cappy.scoring.precision import has_bf16, keep_heads_exact
from cappy.scoring.scorer import Scorer
from cappy.training import checkpoint
from cappy.training.checkpoint import Checkpoint, State
from cappy.training.checks import check_scorer, decides, explain, judge
from cappy.training.corpus import Corpus
from cappy.training.ending import CONTINUES, Clock, Ending
from cappy.training.feed import Drawn, batch, micro_batches, padded, updates_of
from cappy.training.guards import refuse_unfit
from cappy.training.meter import Meter, flops_of_pair, layer_weights, peak_of, told
from cappy.training.plan import TrainingSettings, default_rate, falls, rate
from cappy.training.ranks import ALONE, Ranks
from cappy.training.strategies import start
from cappy.training.update import UnwellError, update

NAMED = 16
"""Instances that an error names."""
POINTS = 200
"""Points of a run's curve."""


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
    scorer: Scorer,
    train: Corpus,
    validation: Corpus,
    plan: TrainingSettings,
    *,
    checkpoints: Path,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Trains the scorer in place, from the last checkpoint if there is one, and leaves the best weights in it.

    Order, draws and dropout depend on the seed and the update's number alone, so a resumed run equals an unbroken one.
    Of several ranks the first alone reads and writes checkpoints, and it alone has the best weights in the end.
    """
    refuse_unfit(train, plan, ranks)
    run = Run(scorer, train, validation, plan, checkpoints, ranks)
    state, resumed_at = run.state, run.state.update
    with Ending() as ending:
        while True:
            if run.check_due:
                run.check(ending)
            if state.stopped or state.update >= run.updates:
                break
            run.update()
            run.save_if_due(ending)
            progress(state.update, run.updates, unit="updates", resumed=resumed_at, note=run.told)
    reason = explain(state, run.updates, len(validation))
    progress(state.update, state.update, unit="updates", resumed=resumed_at, note=reason or run.told)
    if ranks.first:
        scorer.model, scorer.through = run.strategy.finished(run.best).eval(), None
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
        self,
        scorer: Scorer,
        train: Corpus,
        validation: Corpus,
        plan: TrainingSettings,
        checkpoints: Path,
        ranks: Ranks,
    ) -> None:
        self.scorer, self.train, self.validation = scorer, train, validation
        self.plan, self.checkpoints, self.ranks = plan, checkpoints, ranks
        self.updates = updates_of(train, plan)
        self.every = max(1, self.updates // plan.checks)
        self.peak = plan.learning_rate or default_rate(scorer.model.config.hidden_size)
        self.layer_weights = layer_weights(scorer.model)
        scorer.autocast = _in_bf16(plan, scorer.device)
        if scorer.autocast:
            keep_heads_exact(scorer.model)
        self.meter = Meter(peak_of(scorer.device, ranks.count, bf16=scorer.autocast))
        self.strategy = start(scorer, plan, ranks)
        self.clock = Clock(plan.checkpoint_seconds, plan.checkpoint_updates)
        self.state, self.best, self.note = State(budget=plan.batch_tokens), dict[str, Tensor](), ""
        self._resume()

    def _resume(self) -> None:
        """Puts the first rank's checkpoint, or its weights as they are, in place on all ranks."""
        found, note = checkpoint.load(self.checkpoints) if self.ranks.first else (None, "")
        state, self.note = self.ranks.told((found and asdict(found.state), note))
        if state is not None:
            weights = self.ranks.given(found.weights if found else {})
            self.strategy.restore(weights, self.ranks.given(found.moments if found else {}))
            self.state, self.best = State(**state), found.best if found else {}
        elif self.ranks.count > 1:
            self.strategy.restore(self.ranks.given(self.strategy.weights()), {})

    @property
    def told(self) -> str:
        """What a person wants to know beside how far it is."""
        now = self.state.update - 1
        figures = told(self.state.running_loss, self.rate(now), self.meter.figures()) if now >= 0 else ""
        return ", ".join(filter(None, (figures, self.note)))

    def rate(self, update: int) -> float:
        """Learning rate of an update (0-based)."""
        return rate(update, self.updates, self.peak, self.plan.warmup, self.plan.schedule)

    @property
    def check_due(self) -> bool:
        """Whether the validation instances are to be scored before the next update."""
        state = self.state
        due = state.update % self.every == 0 or state.update == self.updates
        return due and not (state.log and state.log[-1]["update"] == state.update)

    def check(self, ending: Ending) -> None:
        """Scores the validation instances and keeps the weights unless they are clearly below the best."""
        check, plan, state = None, self.plan, self.state
        if len(self.validation):
            check = check_scorer(
                self.scorer,
                self.validation,
                plan,
                ranks=self.ranks,
                lockstep=self.strategy.lockstep,
                asked=ending.asked,
            )
            if check is None:
                self._end()
        falling = falls(state.update, self.updates, plan.warmup, plan.schedule)
        if judge(check, state, deciding=decides(plan, self.validation), falling=falling):
            weights = self.strategy.weights()
            self.best = weights if self.ranks.first else {}
        state.stopped = state.checks_since_best >= plan.patience

    def update(self) -> None:
        """One step of the optimizer on the next instances; TrainingError where there is nothing to go on with."""
        plan, state = self.plan, self.state
        drawn = batch(self.train, state.update, plan.batch_instances, plan.max_candidates, seed=plan.seed)
        now = self.rate(state.update)
        try:
            with self.meter.timed():
                loss = update(self.scorer, self.strategy, self.train, drawn, plan, state, rate=now, ranks=self.ranks)
        except UnwellError as error:
            names = ", ".join(self.train.name(one.index) for one in drawn[:NAMED])
            names += f" and {len(drawn) - NAMED} more" if len(drawn) > NAMED else ""
            good = f"last good checkpoint: {self.ranks.told(checkpoint.newest(self.checkpoints))}"
            remedy = "give a smaller --learning-rate, or look at these instances"
            raise TrainingError(f"update {state.update + 1}: {error}, instances {names}; {good}; {remedy}") from None
        state.running_loss = loss if state.update == 0 else 0.95 * state.running_loss + 0.05 * loss
        state.update += 1
        self._measure(drawn, now)

    def _measure(self, drawn: Sequence[Drawn], rate: float) -> None:
        """Notes what the update cost, and a point of the curve now and then."""
        lengths = [length for one in drawn for length in self.train.tokens(one.index, one.chosen)]
        config, state = self.scorer.model.config, self.state
        passes = micro_batches(drawn, state.budget, self.ranks.count)
        self.meter.add(
            pairs=len(lengths),
            tokens=sum(lengths),
            padded=sum(map(padded, passes)) if self.scorer.pads else sum(lengths),
            flops=sum(flops_of_pair(config, self.layer_weights, n) for n in lengths) if self.layer_weights else 0.0,
        )
        if state.update % max(1, self.updates // POINTS) == 0 or state.update == self.updates:
            point = {"update": state.update, "loss": round(state.running_loss, 6), "rate": rate}
            state.curve.append({**point, **self.meter.figures()})

    def save_if_due(self, ending: Ending) -> None:
        """A checkpoint where it is time for one; the last one and a TrainingError where the machine wants us to end."""
        wishes = self.ranks.first and self.clock.due(self.state.update), ending.asked()
        due, ended = self.ranks.summed([float(wish) for wish in wishes])
        if ended:
            self._end()
        if due:
            self._save()

    def _save(self) -> None:
        weights, moments = self.strategy.weights(), self.strategy.moments()
        if self.ranks.first:
            found = Checkpoint(state=self.state, weights=weights, moments=moments, best=self.best)
            checkpoint.save(self.checkpoints, found)

    def _end(self) -> NoReturn:
        self._save()
        self.ranks.told(None)  # A rank that ends takes the others with it: not before the first has written.
        done = f"stopped by SIGTERM after update {self.state.update} of {self.updates}"
        raise TrainingError(f"{done}; the checkpoint is written, {CONTINUES}")


def _in_bf16(plan: TrainingSettings, device: torch.device) -> bool:
    """Whether matrix products run in bf16: where asked, and by `auto` on a GPU that has instructions for it."""
    return plan.precision == "bf16" or (plan.precision == "auto" and device.type == "cuda" and has_bf16(device))
