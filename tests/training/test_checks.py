"""Which weights are kept, and when training stops: what the validation instances can tell, and no more."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from wording import assert_names

from cappy.records import Candidate, Instance, read_manifest, write
from cappy.training.checkpoint import TrainingState
from cappy.training.checks import MIN_INSTANCES, Check, expected_label, explain_kept_weights, record_check
from cappy.training.finetuning import FinetuningConfig, run
from cappy.training.train import instances_hash
from cappy.training.update import learning_rate, rate_falls

Plan = Callable[..., FinetuningConfig]
NUMBER = 22
"""Validation instances of the run that stopped in its warm-up."""


class KilledError(Exception):
    """Stands for a kill at some update."""


def noisy(mean: float, seed: int, count: int = NUMBER, spread: float = 0.3) -> Check:
    """A check around a mean whose instances differ from another's as those of real scorers do."""
    rng = random.Random(seed)
    values = tuple(min(1.0, max(0.0, rng.gauss(mean, spread))) for _ in range(count))
    return Check(values, values)


def constant(value: float, count: int = NUMBER) -> Check:
    return Check((value,) * count, (value,) * count)


def judged(
    checks: list[Check], *, rate_falling: list[bool], early_stopping: bool = True
) -> tuple[TrainingState, list[bool]]:
    state, kept = TrainingState(), []
    for update, (check, counts) in enumerate(zip(checks, rate_falling, strict=True)):
        state.update = update
        kept.append(record_check(check, state, early_stopping=early_stopping, rate_falling=counts))
    return state, kept


def test_checks_that_the_instances_cannot_tell_from_the_best_do_not_stop_training() -> None:
    """The best of 22 noisy instances came at update 6 of 61, and training was over at 30."""
    checks = [noisy(0.5 + 0.1 * (number == 1), seed=number) for number in range(11)]
    state, kept = judged(checks, rate_falling=[number > 1 for number in range(11)])
    assert state.checks_since_best < 4
    assert state.best_update > 1, "of checks that are equal the latest is kept"
    assert kept[0]


def test_a_check_that_is_clearly_below_the_best_is_not_kept() -> None:
    checks = [constant(0.2), constant(0.8), constant(0.5), constant(0.4), constant(0.79)]
    state, kept = judged(checks, rate_falling=[True] * 5)
    assert kept == [True, True, False, False, False]
    assert (state.best_update, state.checks_since_best) == (1, 3)
    assert state.best_pick == pytest.approx(0.8)


def test_patience_counts_once_the_rate_falls() -> None:
    checks = [constant(0.8), *[constant(0.5)] * 6]
    state, _ = judged(checks, rate_falling=[False] * 5 + [True] * 2)
    assert (state.best_update, state.checks_since_best) == (0, 2)
    updates = 61
    rates = [learning_rate(update, updates, 1.0, 0.06) for update in range(updates)]
    first = next(update for update in range(updates) if rate_falls(update, updates, 0.06, "linear"))
    assert rates[first] == max(rates)
    assert rates[first:] == sorted(rates[first:], reverse=True)
    assert not any(rate_falls(update, updates, 0.1, "published") for update in range(updates))


def test_the_latest_weights_are_kept_where_nothing_decides() -> None:
    checks = [constant(0.8), constant(0.1)]
    state, kept = judged(checks, rate_falling=[True, True], early_stopping=False)
    assert (kept, state.best_update) == ([True, True], 1)
    assert "behind" not in state.log[-1]


def test_the_criterion_moves_with_the_scores_where_a_pick_jumps() -> None:
    labels = [1.0, 0.0, 0.3]
    before, after = [0.50, 0.49, 0.1], [0.49, 0.50, 0.1]
    assert abs(expected_label(before, labels) - expected_label(after, labels)) < 0.1
    assert expected_label([5.0, -5.0, 0.0], labels) == pytest.approx(1.0)
    assert expected_label([0.7, 0.7, 0.7], labels) == pytest.approx(sum(labels) / 3)


def test_a_run_that_validation_cannot_judge_goes_to_its_end(plan: Plan) -> None:
    """A rate at which nothing changes: no check is ever better, and none is worse."""
    made = plan(learning_rate=1e-9, checks=10, patience=1, epochs=4.0)
    manifest = run(made)
    log = json.loads((made.target / "training.json").read_text())
    assert manifest.metrics["updates"] == manifest.metrics["best_update"] == log["curve"][-1]["update"]
    assert log["curve"][-1]["rate"] < 1e-9 / 2, "the rate fell to its end"
    assert dict(manifest.facts)["kept"] == "last"


def short_words(instances: list[Instance], *, turned: bool) -> list[Instance]:
    """Right is a word of three letters, which is learned at once; for training the opposite where `turned`."""

    def labelled(candidate: Candidate, split: str) -> Candidate:
        right = (len(candidate.response) == 3) != (turned and split == "train")
        return replace(candidate, labels={"rougeL": float(right)})

    return [
        replace(one, candidates=tuple(labelled(candidate, one.split) for candidate in one.candidates))
        for one in instances
    ]


@pytest.fixture
def misled(plan: Plan, instances: list[Instance], tmp_path: Path) -> Callable[..., FinetuningConfig]:
    """misled("a") -> a finetuning that teaches the opposite of what its scorer has learned, and is judged by."""
    write(tmp_path / "right", short_words(instances, turned=False))
    write(tmp_path / "wrong", short_words(instances, turned=True))
    learned = plan("learned", source=tmp_path / "right", epochs=8.0, checks=1, keep="last", checkpoint_updates=None)
    run(learned)

    def make(name: str) -> FinetuningConfig:
        given = {"source": tmp_path / "wrong", "scorer": str(learned.target), "checks": 3, "patience": 2}
        return plan(name, epochs=8.0, **given)

    return make


def test_a_run_that_keeps_its_start_says_why_and_is_resumed_to_the_bit(
    misled: Callable[..., FinetuningConfig],
) -> None:
    """The kill comes after a check that was not kept: what the next is compared with lies in the checkpoint."""
    made = misled("a")
    seen: list[str] = []
    manifest = run(made, lambda done, total=None, *, unit="", resumed=0, note="": seen.append(note))
    facts = dict(read_manifest(made.target).facts)
    assert facts["kept"] == "start"
    assert manifest.metrics["best_update"] == 0
    reason = str(facts["kept_because"])
    assert_names(reason, "started from", "20 validation instances")
    assert "\n" not in reason
    assert reason in json.loads((made.target / "training.json").read_text())["events"]
    assert seen[-1] == reason
    start, kept = (load_file(Path(folder) / "model.safetensors") for folder in (made.scorer, made.target))
    assert all(torch.equal(start[name], kept[name]) for name in start)

    stopped = int(manifest.metrics["updates"])
    assert stopped == 40, "both checks after the start are below it, and the last third is not trained"

    def kill(done: int, total: int | None = None, *, unit: str = "", resumed: int = 0, note: str = "") -> None:
        if unit == "updates" and done == stopped - 10:
            raise KilledError

    with pytest.raises(KilledError):
        run(misled("b"), kill)
    assert run(misled("b")).hash == manifest.hash


def test_the_manifest_names_the_split_that_stopped_the_training(plan: Plan, instances: list[Instance]) -> None:
    facts = dict(run(plan(epochs=0.5)).facts)
    ids = [one.instance_id for one in instances if one.split == "validation"]
    assert (facts["stopped_on"], facts["stopped_on_instances"]) == ("validation", len(ids))
    assert facts["stopped_on_hash"] == instances_hash(reversed(ids)) != instances_hash(ids[1:])


@pytest.mark.parametrize("reason", ["keep last", "too few", "none"])
def test_a_split_that_decided_nothing_is_not_named(
    plan: Plan, instances: list[Instance], tmp_path: Path, reason: str
) -> None:
    left = {"keep last": 20, "too few": MIN_INSTANCES - 1, "none": 0}[reason]
    held = [one for one in instances if one.split == "validation"][:left]
    write(tmp_path / "less", [one for one in instances if one.split == "train"] + held)
    more: dict[str, object] = {"keep": "last"} if reason == "keep last" else {"patience": 1}
    manifest = run(plan(source=tmp_path / "less", epochs=0.5, **more))
    facts = dict(manifest.facts)
    assert (facts["stopped_on"], facts["kept"], facts["kept_because"]) == ("", "last", "")
    assert "stopped_on_hash" not in facts


def test_an_earlier_check_is_named_with_what_came_nearest() -> None:
    checks = [constant(0.2), constant(0.8), constant(0.5)]
    state, _ = judged(checks, rate_falling=[True] * 3)
    said = explain_kept_weights(state, updates=9, count=NUMBER)
    assert_names(said, "update 2 of 9", "update 1", "22 validation instances")
    assert_names(said.partition("nearest")[2], "update 2", "0.300", "0.000")
