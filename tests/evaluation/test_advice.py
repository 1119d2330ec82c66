"""The advice follows from the numbers, and gives them as its reason."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from wording import assert_names

from cappy.evaluation import Difference, MeanEstimate, Report, evaluate
from cappy.evaluation.findings import MIN_GROUPS, Power
from cappy.evaluation.verdict import advice, verdict
from cappy.records import Instance
from cappy.registry import gate
from cappy.registry.gate import decide

Score = Callable[[Sequence[tuple[str, str]]], list[float]]


@pytest.fixture
def report(instances: list[Instance], score: Score) -> Report:
    """A scorer that was compared with everything but a champion."""
    return evaluate(instances, score=score, with_probes=False)


def test_callers_who_know_too_little_are_warned_and_the_gate_says_so(report: Report) -> None:
    won = report.comparisons["selector-random"]
    lost = replace(won, difference=-0.03, low=-0.05, high=-0.01)
    rows = {"selector_texts-greedy": lost, "selector_no_likelihood-greedy": replace(lost, high=0.01)}
    warned = replace(report, comparisons={**report.comparisons, **rows})
    (caution,) = [each for each in verdict(warned) if each.startswith("Caution: for callers")]
    assert_names(caution, "texts only", "greedy response", "−3.0")
    (reason,) = [each for each in decide(warned.to_dict(), has_champion=False).reasons if "for callers" in each]
    assert_names(reason, "For information", "texts only")
    assert not [each for each in verdict(report) if "for callers" in each]


def change(
    report: Report, needed: int | None = 60, spread: float | None = 0.5, **bounds: tuple[float, float]
) -> Report:
    """The report with these intervals of the selector's differences, and of MBR's to random.

    `spread` is how far the scores of an instance's responses are apart.
    """
    named = {"mbr_random": "mbr-random", "scorer_initial": "scorer-initial"}
    made = {
        named.get(name, f"selector-{name}"): Difference(
            difference=sum(ends) / 2,
            low=ends[0],
            high=ends[1],
            p_value=0.5,
            standard_error=(ends[1] - ends[0]) / 4,
            skewness=0.0,
            degrees_of_freedom=39.0,
            groups=40,
        )
        for name, ends in bounds.items()
    }
    power = {key: Power(groups=40, smallest=0.03, groups_needed=needed) for key in made}
    assert report.calibration is not None
    return replace(report, comparisons=made, power=power, calibration=replace(report.calibration, spread=spread))


def with_means(report: Report, **means: float) -> Report:
    """The report with selectors of these mean labels, greedy's among them."""
    row = report.selectors["random"]
    rows = {name: replace(row, estimate=MeanEstimate(mean=mean, low=0.0, high=1.0)) for name, mean in means.items()}
    return replace(report, selectors={**report.selectors, **rows})


Bounds = tuple[float, float]
WON, LOST, OPEN = (0.02, 0.06), (-0.06, -0.02), (-0.01, 0.03)


def test_a_scorer_that_beats_everything_is_promoted(report: Report) -> None:
    level = replace(
        report, curve={"selector": (MeanEstimate(mean=0.5, low=0.4, high=0.6),) * 6}, num_worthwhile_candidates=1
    )
    assert advice(change(level, random=WON, mbr=WON)).startswith("Promote:")


def test_a_curve_that_still_rises_asks_for_more_samples(report: Report) -> None:
    curve = tuple(MeanEstimate(mean=0.5 + n / 100, low=0.4, high=0.6) for n in range(6))
    rising = replace(report, curve={"selector": curve}, num_worthwhile_candidates=6)
    assert_names(advice(change(rising, random=WON, mbr=WON)), "Promote", "sample more", "candidate 6", "1.0")


def test_a_cross_fitted_report_promotes_as_the_gate_does(report: Report) -> None:
    recipe = replace(change(report, random=WON, mbr=WON), folds=5)
    assert advice(recipe).startswith("Promote")
    assert decide(recipe.to_dict(), has_champion=False).decision == "promote"


def test_a_leak_comes_before_everything(report: Report) -> None:
    leaking = replace(change(report, random=WON, mbr=WON), leaks={"challenger": 2})
    assert advice(leaking).startswith("Hold")
    assert_names(advice(leaking), "challenger", "in training", "splits")


def test_a_scorer_below_mbr_gives_way_to_it(report: Report) -> None:
    text = advice(change(report, random=WON, mbr=LOST))
    assert text.startswith("Use MBR")
    assert_names(text, "worse", "−4.0")


def test_an_open_gain_says_how_many_groups_would_show_it(report: Report) -> None:
    text = advice(change(report, random=OPEN))
    assert text.startswith("More data")
    assert_names(text, "+1.0", "random choice", "40 groups", "about 60")


def test_the_same_picks_as_the_champion_are_no_reason_to_promote(instances: list[Instance], score: Score) -> None:
    tested = [instance for instance in instances if instance.split == "test"]
    both = evaluate(tested, score=score, champion=score, with_probes=False)
    assert advice(both).startswith("Hold")
    assert_names(advice(both), "exactly as well", "champion")


def test_what_no_data_would_show_is_held(report: Report) -> None:
    text = advice(change(report, needed=100_000, random=OPEN))
    assert text.startswith("Hold")
    assert_names(text, "not shown", "random choice", "40 groups", "below 3.0")


def test_a_scorer_that_adaptation_worsened_is_not_advised(report: Report) -> None:
    made = with_means(report, scorer=0.5, initial=0.6)
    gain = (0.1, 0.2)
    same = change(made, random=gain, likelihood=gain, mbr=gain, scorer_initial=(-0.01, 0.1))
    assert advice(same).startswith("Promote")
    worse = change(made, random=gain, likelihood=gain, mbr=gain, scorer_initial=(-0.1, -0.01))
    assert advice(worse).startswith("Hold: adaptation worsened the scorer's picks by −5.5")
    (sentence,) = (each for each in verdict(worse) if each.startswith("Adaptation"))
    assert_names(sentence, "worsened", "50.0 after adaptation", "60.0 before", "−5.5")


@pytest.mark.parametrize(("needed", "reach"), [(800, True), (801, False)])
def test_the_verdict_and_the_advice_agree_on_how_much_data_is_within_reach(
    report: Report, needed: int, reach: bool
) -> None:
    made = change(report, needed=needed, random=OPEN)
    said = next(sentence for sentence in verdict(made) if "random choice" in sentence and "are detectable" in sentence)
    assert advice(made).startswith("More data") == ("would need about" in said) == reach
    assert ("far smaller" in said) == (not reach)


def test_a_scorer_worse_than_chance_is_held(report: Report) -> None:
    assert advice(change(report, random=LOST)).startswith("Hold")
    assert_names(advice(change(report, random=LOST)), "worse", "random choice")


@pytest.mark.parametrize(("bounds", "start"), [(WON, "Promote: "), (LOST, "Hold: "), (OPEN, "More data: ")])
def test_beside_a_champion_the_champion_decides(
    instances: list[Instance], score: Score, bounds: tuple[float, float], start: str
) -> None:
    both = evaluate(instances, score=score, champion=score, with_probes=False)
    assert advice(change(both, random=WON, mbr=LOST, champion=bounds)).startswith(start)


def test_a_pool_without_headroom_is_promoted_and_asks_for_other_candidates(instances: list[Instance]) -> None:
    labels = {(i.instruction, c.response): c.labels["rougeL"] for i in instances for c in i.candidates}
    report = evaluate(instances, score=lambda p: [labels[x] for x in p], with_probes=False)
    assert_names(advice(report), "Promote", "other candidates", "oracle", "0.0 above")


def test_closed_choices_are_never_asked_for_more_samples(report: Report) -> None:
    curve = tuple(MeanEstimate(mean=0.5 + n / 100, low=0.4, high=0.6) for n in range(6))
    choices = replace(
        report, curve={"selector": curve}, num_worthwhile_candidates=6, tasks=(replace(report.tasks[0], kind="choice"),)
    )
    text = advice(change(choices, random=WON))
    assert text.startswith("Promote:")
    assert "sample" not in text


def test_a_scorer_below_the_likelihood_is_held_whatever_else_it_beats(report: Report) -> None:
    text = advice(change(report, random=WON, likelihood=LOST, mbr=WON))
    assert text.startswith("Hold")
    assert_names(text, "worse", "likelihood", "−4.0")


def test_nothing_is_advised_to_be_promoted_that_the_gate_would_hold(report: Report) -> None:
    """Every outcome of every comparison, on groups that are too few, on the validation split, or without variance."""
    names = ("random", "likelihood", "mbr", "greedy", "best_system")
    one_of: tuple[Bounds | None, ...] = (WON, OPEN, LOST, None)
    promoted = 0
    for ends in itertools.product(one_of[:3], one_of, one_of, one_of, (WON, OPEN, None)):
        given: dict[str, Any] = {name: own for name, own in zip(names, ends, strict=True) if own is not None}
        made = change(report, **given)
        same = {key: replace(one, standard_error=0.0) for key, one in made.comparisons.items()}
        for case in (
            made,
            replace(made, facts={**made.facts, "groups": 29}),
            replace(made, split="validation"),
            replace(made, comparisons=same),
        ):
            if advice(case).startswith("Promote"):
                promoted += 1
                assert decide({**vars(case), "tasks": ()}, has_champion=False).decision == "promote", given
    assert promoted > 20


def test_the_fewest_groups_are_those_of_the_gate() -> None:
    assert vars(gate)["MIN_GROUPS"] == MIN_GROUPS


def test_with_fewer_groups_than_decide_anything_more_test_instances_are_asked_for(report: Report) -> None:
    few = change(replace(report, facts={**report.facts, "groups": 12}), random=WON, mbr=WON)
    assert advice(few).startswith("Hold")
    assert_names(advice(few), "12 groups", "30", "more test instances", "--folds")


def test_a_champion_that_could_not_be_compared_with_is_no_reason_to_promote(report: Report) -> None:
    lacking = replace(change(report, random=WON, mbr=WON), unavailable={"champion": "its picks are of other instances"})
    assert advice(lacking).startswith("Hold")
    assert_names(advice(lacking), "champion: its picks are of other instances")


@pytest.mark.parametrize("random", [OPEN, LOST])
def test_a_scorer_that_hardly_tells_responses_apart_needs_another_encoder_and_not_more_data(
    report: Report, random: Bounds
) -> None:
    """GSM8K from the built-in start: the scores of four solutions differ by 0.001, and no such data mends it."""
    text = advice(change(report, spread=0.001, random=random))
    assert_names(text, "0.1 of 100", "median", "larger encoder", "use MBR")
    assert "More data" not in text
    assert "more instances" not in text


def test_close_scores_that_pick_well_are_no_fault(report: Report) -> None:
    assert advice(change(report, spread=0.001, random=WON, mbr=WON)).startswith("Promote")


@pytest.mark.parametrize("random", [OPEN, LOST])
def test_where_mbr_is_proven_and_the_scorer_is_not_mbr_is_advised(report: Report, random: Bounds) -> None:
    proven = with_means(change(report, random=random, mbr=OPEN, mbr_random=WON), mbr=0.9)
    assert advice(proven).startswith("Use MBR")
    assert_names(advice(proven), "random choice", "+4.0", "2.0 to 6.0", "the selector")
    unproven = with_means(change(report, random=random, mbr=OPEN, mbr_random=OPEN), mbr=0.9)
    assert not advice(unproven).startswith("Use MBR")


def test_where_one_greedy_call_is_better_than_the_scorers_pick_it_is_advised(report: Report) -> None:
    made = with_means(change(report, random=WON, greedy=LOST, mbr=OPEN, mbr_random=WON), greedy=0.8, mbr=0.7)
    assert advice(made).startswith("Use one greedy")
    assert_names(advice(made), "worse", "−4.0")
    ahead = with_means(change(report, random=WON, greedy=LOST, mbr=OPEN, mbr_random=WON), greedy=0.7, mbr=0.8)
    assert advice(ahead).startswith("Use MBR")


def test_a_greedy_response_that_may_be_as_good_is_no_reason_to_promote(report: Report) -> None:
    made = with_means(change(report, random=WON, greedy=OPEN, mbr=WON), greedy=0.7)
    assert advice(made).startswith("More data")
    assert_names(advice(made), "+1.0", "greedy response")


def test_how_far_an_instances_scores_are_apart_is_in_the_report(instances: list[Instance]) -> None:
    def level(pairs: Sequence[tuple[str, str]]) -> list[float]:
        return [0.5 + 1e-6 * len(response) for _, response in pairs]

    flat, wide = (
        evaluate(instances, score=score, with_probes=False)
        for score in (level, lambda pairs: [len(response) / 100 for _, response in pairs])
    )
    assert flat.calibration is not None
    assert wide.calibration is not None
    assert flat.calibration.spread is not None
    assert wide.calibration.spread == pytest.approx(1e4 * flat.calibration.spread)
    assert flat.calibration.spread < 1e-4


def test_without_a_scorer_the_advice_is_to_train_one(instances: list[Instance]) -> None:
    report = evaluate(instances, score=None)
    assert "train a scorer" in advice(report).casefold()
