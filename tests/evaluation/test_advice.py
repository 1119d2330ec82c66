"""The advice follows from the numbers, and gives them as its reason."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from cappy.evaluation import Difference, Estimate, Report, evaluate
from cappy.evaluation.advice import advice
from cappy.evaluation.findings import Power
from cappy.evaluation.verdict import verdict
from cappy.records import Instance
from cappy.registry.gate import decide

Score = Callable[[Sequence[tuple[str, str]]], list[float]]


@pytest.fixture
def report(instances: list[Instance], score: Score) -> Report:
    """A scorer that was compared with everything but a champion."""
    return evaluate(instances, score=score, probe=False)


def found(report: Report, needed: int | None = 60, **bounds: tuple[float, float]) -> Report:
    """The report with these intervals of the scorer's differences, and of the hybrid's to MBR."""
    keys = {("hybrid_mbr-mbr" if name == "hybrid" else f"scorer-{name}"): ends for name, ends in bounds.items()}
    made = {
        key: Difference(difference=sum(ends) / 2, low=ends[0], high=ends[1], probability=0.5)
        for key, ends in keys.items()
    }
    power = {key: Power(groups=40, smallest=0.03, groups_needed=needed) for key in made}
    return replace(report, comparisons=made, power=power)


Bounds = tuple[float, float]
WON, LOST, OPEN = (0.02, 0.06), (-0.06, -0.02), (-0.01, 0.03)


def test_a_scorer_that_beats_everything_is_promoted(report: Report) -> None:
    level = replace(report, curve={"scorer": (Estimate(mean=0.5, low=0.4, high=0.6),) * 6}, pays_until=1)
    assert advice(found(level, random=WON, mbr=WON)).startswith("Promote: the scorer beats")


def test_a_curve_that_still_rises_asks_for_more_samples(report: Report) -> None:
    curve = tuple(Estimate(mean=0.5 + n / 100, low=0.4, high=0.6) for n in range(6))
    rising = replace(report, curve={"scorer": curve}, pays_until=6)
    assert advice(found(rising, random=WON, mbr=WON)) == "Promote, and sample more: candidate 6 still adds 1.0."


def test_a_cross_fitted_report_promotes_no_scorer(report: Report) -> None:
    recipe = replace(found(report, random=WON, mbr=WON), folds=5)
    assert advice(recipe).startswith("Keep the recipe: evaluate the scorer")


def test_a_leak_comes_before_everything(report: Report) -> None:
    leaking = replace(found(report, random=WON, mbr=WON), leaks={"challenger": 2})
    assert advice(leaking).startswith("Hold: the challenger saw reported prompts")


def test_a_scorer_below_mbr_gives_way_to_it(report: Report) -> None:
    assert advice(found(report, random=WON, mbr=LOST, hybrid=OPEN)).startswith(
        "Use MBR: the scorer is below it by −4.0"
    )


def test_a_hybrid_that_wins_is_used(report: Report) -> None:
    assert "pick by scorer + MBR (weight" in advice(found(report, random=WON, mbr=OPEN, hybrid=WON))


def test_an_open_gain_says_how_many_groups_would_show_it(report: Report) -> None:
    assert advice(found(report, random=OPEN)) == (
        "More data: +1.0 against random choice is not proven on 40 groups, about 60 would show it."
    )


def test_the_same_picks_as_the_champion_are_no_reason_to_promote(instances: list[Instance], score: Score) -> None:
    both = evaluate(instances, score=score, champion=score, probe=False)
    assert advice(both).startswith("Hold: the scorer does exactly as well as the champion")


def test_what_no_data_would_show_is_held(report: Report) -> None:
    text = advice(found(report, needed=100_000, random=OPEN))
    assert text.startswith("Hold: the scorer is not shown to beat random choice")
    assert "40 groups show no difference below 3.0" in text


@pytest.mark.parametrize(("needed", "reach"), [(800, True), (801, False)])
def test_the_verdict_and_the_advice_agree_on_how_much_data_is_within_reach(
    report: Report, needed: int, reach: bool
) -> None:
    made = found(report, needed=needed, random=OPEN)
    said = next(sentence for sentence in verdict(made) if "may or may not beat random choice" in sentence)
    assert advice(made).startswith("More data") == ("would show this one" in said) == reach
    assert ("this one is far below" in said) == (not reach)


def test_a_scorer_worse_than_chance_is_held(report: Report) -> None:
    assert advice(found(report, random=LOST)).startswith("Hold: the scorer does worse than random choice")


@pytest.mark.parametrize(("bounds", "start"), [(WON, "Promote: "), (LOST, "Hold: "), (OPEN, "More data: ")])
def test_beside_a_champion_the_champion_decides(
    instances: list[Instance], score: Score, bounds: tuple[float, float], start: str
) -> None:
    both = evaluate(instances, score=score, champion=score, probe=False)
    assert advice(found(both, random=WON, mbr=LOST, champion=bounds)).startswith(start)


def test_a_pool_without_room_is_promoted_and_asks_for_other_candidates(instances: list[Instance]) -> None:
    labels = {(i.instruction, c.response): c.labels["rougeL"] for i in instances for c in i.candidates}
    report = evaluate(instances, score=lambda p: [labels[x] for x in p], probe=False)
    assert advice(report).startswith("Promote, and sample other candidates: the oracle is only 0.0 above")


def test_closed_choices_are_never_asked_for_more_samples(report: Report) -> None:
    curve = tuple(Estimate(mean=0.5 + n / 100, low=0.4, high=0.6) for n in range(6))
    choices = replace(report, curve={"scorer": curve}, pays_until=6, tasks=(replace(report.tasks[0], kind="choice"),))
    assert advice(found(choices, random=WON)) == (
        "Promote: the scorer beats random choice and what needs no training among these choices."
    )


def test_a_scorer_below_the_likelihood_is_held_whatever_else_it_beats(report: Report) -> None:
    assert advice(found(report, random=WON, likelihood=LOST, mbr=WON)).startswith(
        "Hold: the scorer is below the better likelihood selector by −4.0"
    )


@pytest.mark.parametrize("random", [WON, OPEN, LOST])
@pytest.mark.parametrize("likelihood", [WON, OPEN, LOST, None])
@pytest.mark.parametrize("mbr", [WON, OPEN, LOST, None])
@pytest.mark.parametrize("hybrid", [WON, OPEN, None])
def test_nothing_is_advised_to_be_promoted_that_the_gate_would_hold(
    report: Report, random: Bounds, likelihood: Bounds | None, mbr: Bounds | None, hybrid: Bounds | None
) -> None:
    bounds = {"random": random, "likelihood": likelihood, "mbr": mbr, "hybrid": hybrid}
    made = found(report, **{name: ends for name, ends in bounds.items() if ends is not None})
    if advice(made).startswith("Promote"):
        assert decide(made.to_dict(), has_champion=False).decision == "promote"


def test_without_a_scorer_the_advice_is_to_train_one(instances: list[Instance]) -> None:
    report = evaluate(instances, score=None)
    assert "train a scorer" in advice(report).casefold()
