"""The evaluation keeps its promises on a small pool."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import ttest_1samp
from wording import assert_names, raises_naming

from cappy.errors import ConfigError, RecordError
from cappy.evaluation import Report, evaluate
from cappy.evaluation.protocol import score_split, select_split, split_pools
from cappy.evaluation.tables import PUBLISHED
from cappy.records import Candidate, Instance
from cappy.selection.fitting import out_of_fold_selectors
from cappy.selection.pools import CHUNK_PAIRS
from cappy.selection.selectors import SELECTORS

Score = Callable[[Sequence[tuple[str, str]]], list[float]]


def means(report: Report) -> dict[str, float]:
    return {name: row.estimate.mean for name, row in report.selectors.items()}


def test_every_selector_lies_between_the_worst_and_the_oracle(instances: list[Instance], score: Score) -> None:
    report = evaluate(instances, score=score, champion=score, initial=score)
    worst = np.mean([min(c.labels["rougeL"] for c in i.candidates) for i in instances if i.split == "test"])
    result = means(report)
    assert set(report.unavailable) == {"greedy"}
    assert list(result) == [name for name in SELECTORS if name != "greedy"]
    assert all(worst <= mean <= result["oracle"] for mean in result.values())
    assert all(row.estimate.low <= row.estimate.mean <= row.estimate.high for row in report.selectors.values())


def test_random_is_its_expected_value_and_so_does_not_depend_on_the_seed(instances: list[Instance]) -> None:
    expected = np.mean([np.mean([c.labels["rougeL"] for c in i.candidates]) for i in instances if i.split == "test"])
    for seed in (0, 1):
        assert means(evaluate(instances, score=None, seed=seed))["random"] == pytest.approx(expected)


def test_picks_do_not_depend_on_references(instances: list[Instance], score: Score) -> None:
    blind = [replace(instance, references=("nothing alike",)) for instance in instances]
    assert means(evaluate(blind, score=score)) == means(evaluate(instances, score=score))


def test_a_planted_reference_is_never_picked(instances: list[Instance], score: Score) -> None:
    planted = [
        replace(i, candidates=(*i.candidates, Candidate(response="gold", source="reference", labels={"rougeL": 1.0})))
        for i in instances
    ]
    assert means(evaluate(planted, score=score)) == means(evaluate(instances, score=score))


def test_a_scorer_that_knows_the_labels_is_the_oracle_and_the_selector_picks_by_it(
    instances: list[Instance],
) -> None:
    labels = {(i.instruction, c.response): c.labels["rougeL"] for i in instances for c in i.candidates}
    report = evaluate(instances, score=lambda pairs: [labels.get(pair, 0.0) for pair in pairs])
    result = means(report)
    assert result["scorer"] == result["selector"] == result["selector_texts"] == result["oracle"]
    assert report.selectors["selector"].detail == "score"
    assert report.curve["scorer"] == report.curve["selector"] == report.curve["oracle"]


def test_the_calibration_is_fitted_on_picks_of_selectors_that_did_not_see_them(
    make_instance: Callable[..., Instance], score: Score
) -> None:
    instances = [make_instance(index, split="validation") for index in range(40)]
    pools, held_out, _ = split_pools([*instances, make_instance(99)], metric="rougeL", split="test")
    scored = score_split(pools, held_out, lambda pairs: [len(text) / 99 for _, text in pairs], seed=0)
    split = select_split(scored, metric="rougeL", seed=0)
    assert split.held_out_selectors == out_of_fold_selectors(scored.held_out, metric="rougeL")


def test_equal_instances_give_an_equal_report(instances: list[Instance], score: Score) -> None:
    assert evaluate(iter(instances), score=score) == evaluate(instances, score=score)


def test_training_instances_are_passed_over(
    instances: list[Instance], score: Score, make_instance: Callable[..., Instance]
) -> None:
    train = [replace(make_instance(index, split="train"), candidates=()) for index in range(500, 505)]
    unlabelled = replace(train[0], candidates=(Candidate(response="no label"),))
    assert evaluate([*train, unlabelled, *instances], score=score) == evaluate(instances, score=score)


def test_an_initial_scorer_may_give_the_same_score_to_all(instances: list[Instance], score: Score) -> None:
    report = evaluate(instances, score=score, initial=lambda pairs: [0.5] * len(pairs))
    assert means(report)["initial"] == pytest.approx(means(report)["random"])
    with pytest.raises(ConfigError, match="the champion gave the same score"):
        evaluate(instances, score=score, champion=lambda pairs: [0.5] * len(pairs))


def test_test_instances_choose_no_weight_and_no_system(instances: list[Instance], score: Score) -> None:
    report = evaluate([i for i in instances if i.split == "test"], score=score)
    assert set(report.unavailable) == {"champion", "initial", "best_system", "greedy"}
    assert report.selectors["selector"].detail == "score"
    reported = evaluate(instances, score=score, split="validation")
    assert "held-out" in reported.unavailable["best_system"]


def decoded(instance: Instance, *decodings: str) -> Instance:
    """The instance with these decodings of its first candidates."""
    made = [
        replace(one, generator="llm", decoding=name) for one, name in zip(instance.candidates, decodings, strict=False)
    ]
    return replace(instance, candidates=(*made, *instance.candidates[len(made) :]))


def test_the_greedy_response_is_what_a_user_has_without_a_selector(instances: list[Instance], score: Score) -> None:
    given = [decoded(one, "topp0.95", "greedy") for one in instances]
    report = evaluate(given, score=score)
    expected = np.mean([one.candidates[1].labels["rougeL"] for one in given if one.split == "test"])
    assert means(report)["greedy"] == pytest.approx(expected)
    assert report.selectors["greedy"].detail == "llm greedy"
    result = report.comparisons["selector-greedy"]
    assert result.difference == pytest.approx(means(report)["selector"] - expected)


def test_of_several_greedy_responses_the_better_one_on_held_out_instances_is_compared(
    instances: list[Instance], score: Score
) -> None:
    given = [decoded(one, "greedy", "GREEDY") for one in instances]
    held = [one for one in given if one.split == "validation"]
    by_system = [np.mean([one.candidates[index].labels["rougeL"] for one in held]) for index in (0, 1)]
    expected = ("llm greedy", "llm GREEDY")[int(np.argmax(by_system))]
    assert evaluate(given, score=score).selectors["greedy"].detail == expected


def test_a_random_choice_stands_for_a_greedy_response_that_failed(instances: list[Instance], score: Score) -> None:
    given = [decoded(one, "greedy") for one in instances]
    for index in (0, 1):
        failed = replace(given[index].candidates[0], status="refused")
        given[index] = replace(given[index], candidates=(failed, *given[index].candidates[1:]))
    report = evaluate(given, score=score)
    others = [[c.labels["rougeL"] for c in one.candidates[1:]] for one in given[:2]]
    greedy = [one.candidates[0].labels["rougeL"] for one in given[2:] if one.split == "test"]
    assert means(report)["greedy"] == pytest.approx(np.mean([*map(np.mean, others), *greedy]))
    assert report.selectors["greedy"].detail == "llm greedy (missing in 2 instances)"
    assert "selector-greedy" in report.comparisons


def test_a_greedy_response_that_many_instances_lack_is_not_compared(instances: list[Instance], score: Score) -> None:
    given = [decoded(one, "greedy") for one in instances]
    given[:5] = instances[:5]
    report = evaluate(given, score=score)
    assert "too few instances" in report.unavailable["greedy"]
    assert "selector-greedy" not in report.comparisons


def without_likelihood(instance: Instance) -> Instance:
    return replace(instance, candidates=(replace(instance.candidates[0], logprob_mean=None), *instance.candidates[1:]))


def test_a_random_choice_stands_for_the_likelihood_where_one_is_missing(
    instances: list[Instance], score: Score
) -> None:
    complete = evaluate(instances, score=score)
    report = evaluate([without_likelihood(instances[0]), *instances[1:]], score=score)
    labels = [each.labels["rougeL"] for each in instances[0].candidates]
    likely = labels[int(np.argmax([each.logprob_mean or 0.0 for each in instances[0].candidates]))]
    expected = means(complete)["likelihood_mean"] + (np.mean(labels) - likely) / 40
    assert means(report)["likelihood_mean"] == pytest.approx(expected)
    assert_names(report.selectors["likelihood_mean"].detail, "1 of 40", "log-likelihood")


def test_likelihoods_that_many_instances_lack_are_unavailable_and_the_report_says_why(
    instances: list[Instance], score: Score
) -> None:
    report = evaluate([*map(without_likelihood, instances[:5]), *instances[5:]], score=score)
    assert_names(report.unavailable["likelihood_mean"], "5 of 40", "log-likelihood")
    assert "selector" in report.selectors
    assert report.better_likelihood_selector == "likelihood_sum"


def test_a_truncated_response_is_picked_only_if_all_are(instances: list[Instance], score: Score) -> None:
    """As in the gateway, which prefers complete responses."""

    def cut(instance: Instance, kept: int) -> Instance:
        made = [replace(c, status="ok" if index < kept else "truncated") for index, c in enumerate(instance.candidates)]
        return replace(instance, candidates=tuple(made))

    assert means(evaluate([cut(one, 0) for one in instances], score=score))["selector"] == pytest.approx(
        means(evaluate(instances, score=score))["selector"]
    )
    first_complete = np.mean([one.candidates[0].labels["rougeL"] for one in instances if one.split == "test"])
    report = evaluate([cut(one, 1) for one in instances], score=score)
    assert means(report)["selector"] == means(report)["selector_texts"] == pytest.approx(first_complete)
    assert report.curve["selector"][-1].mean == pytest.approx(first_complete)
    assert means(report)["oracle"] > first_complete


def test_ties_with_another_label_are_counted_and_worth_their_mean(instances: list[Instance]) -> None:
    report = evaluate(instances, score=lambda pairs: [0.5 - (instruction[-1] == "1") for instruction, _ in pairs])
    assert means(report)["scorer"] == pytest.approx(means(report)["random"])
    differing = sum(len({c.labels["rougeL"] for c in i.candidates}) > 1 for i in instances if i.split == "test")
    assert report.selectors["scorer"].ties == differing > 0


def test_the_gate_finds_its_comparisons(instances: list[Instance], score: Score) -> None:
    report = evaluate(instances, score=score, champion=lambda pairs: [-value for value in score(pairs)])
    result = means(report)
    for key, other in {
        "selector-random": "random",
        "selector-likelihood": report.better_likelihood_selector,
        "selector-mbr": "mbr",
        "selector-champion": "champion",
    }.items():
        difference = report.comparisons[key]
        assert difference.difference == pytest.approx(result["selector"] - result[other])
        assert difference.low <= difference.difference <= difference.high
    assert result[report.better_likelihood_selector] == max(result["likelihood_sum"], result["likelihood_mean"])
    assert report.comparisons["selector-champion"].low > 0


def test_instances_without_candidates_are_skipped_and_counted(instances: list[Instance], score: Score) -> None:
    empty = replace(instances[0], candidates=(Candidate(response="", status="empty"),))
    report = evaluate([empty, *instances[1:]], score=score)
    assert (report.facts["instances"], report.facts["skipped_instances"]) == (39, 1)


def test_an_instance_with_one_candidate_is_evaluated_and_counted(instances: list[Instance], score: Score) -> None:
    lone = replace(instances[0], candidates=instances[0].candidates[:1])
    report = evaluate([lone, *instances[1:]], score=score)
    assert report.facts["single_candidate_instances"] == 1
    assert report.facts["instances"] == 40


def test_pools_of_one_candidate_alone_leave_nothing_to_select(instances: list[Instance], score: Score) -> None:
    with raises_naming(RecordError, "single candidate", "cappy sampling"):
        evaluate([replace(i, candidates=i.candidates[:1]) for i in instances], score=score)


def test_a_scorer_that_tells_nothing_apart_is_refused(instances: list[Instance]) -> None:
    with raises_naming(ConfigError, "scorer", "0.5", "240 candidates", "train"):
        evaluate(instances, score=lambda pairs: [0.5] * len(pairs))


def test_pools_of_different_sizes_have_one_curve(make_instance: Callable[..., Instance]) -> None:
    report = evaluate([make_instance(i, size=1 + i % 5) for i in range(20)], score=None)
    assert {len(points) for points in report.curve.values()} == {5}
    assert report.curve["mbr"][-1].mean == pytest.approx(means(report)["mbr"])


def test_choices_give_accuracy_by_task_and_template() -> None:
    def instance(index: int, task: str, right: str) -> Instance:
        candidates = tuple(
            Candidate(response=c, source="choice", labels={"rougeL": float(c == right)}) for c in ("yes", "no", "maybe")
        )
        return Instance(
            instance_id=f"{task}{index}",
            instruction=f"{task} {index}?",
            references=(right,),
            choices=("yes", "no", "maybe"),
            candidates=candidates,
            split="test",
            task=task,
            template=f"template {index % 2}",
        )

    made = [instance(i, "rte", "yes" if i % 2 else "no") for i in range(8)]
    made += [instance(i, "crows_pairs", "yes") for i in range(4)] + [instance(i, "cb", "maybe") for i in range(2)]
    report = evaluate(made, score=lambda pairs: [float(response == "yes") for _, response in pairs])
    rows = {row.task: row for row in report.tasks}
    assert {task: row.means["scorer"] for task, row in rows.items()} == {"rte": 0.5, "crows_pairs": 1.0, "cb": 0.0}
    assert rows["rte"].templates == {"template 0": 0.0, "template 1": 1.0}
    assert {row.kind for row in report.tasks} == {"choice"}
    assert rows["rte"].means["random"] == pytest.approx(1 / 3)
    assert report.averages["all tasks"].means["scorer"].mean == 0.5
    assert report.averages["without CrowS-Pairs"].means["scorer"].mean == 0.25
    assert report.averages["all tasks"].tasks == 3
    assert "choices" in report.unavailable["mbr"]


def test_progress_counts_every_pair(instances: list[Instance], score: Score) -> None:
    messages: list[tuple[int, int | None, str]] = []
    sizes: list[int] = []

    def counted(pairs: Sequence[tuple[str, str]]) -> list[float]:
        sizes.append(len(pairs))
        return score(pairs)

    def progress(done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = "") -> None:
        messages.append((done, total, unit))

    many = [replace(i, instance_id=f"{i.instance_id}.{n}") for i in instances for n in range(12)]
    evaluate(many, score=counted, champion=score, progress=progress)
    assert messages[-1] == (messages[-1][1], messages[-1][1], "pairs")
    assert max(sizes) <= CHUNK_PAIRS
    assert [done for done, _, _ in messages] == sorted(done for done, _, _ in messages)


def test_nothing_to_report_on_says_what_to_do(instances: list[Instance], score: Score) -> None:
    with raises_naming(RecordError, "'test'", "prepare"):
        evaluate([i for i in instances if i.split == "validation"], score=score)
    with raises_naming(RecordError, "40 test instances", "cappy sampling"):
        evaluate([replace(i, candidates=()) for i in instances], score=score)


def test_a_missing_label_names_the_instance_and_the_remedy(instances: list[Instance]) -> None:
    bare = replace(instances[0], candidates=(Candidate(response="x"),))
    with raises_naming(RecordError, "'test-0'", "candidate 0", "'rougeL'", "cappy annotation"):
        evaluate([bare, *instances[1:]], score=None)


@pytest.mark.parametrize(
    ("bad", "what"), [(lambda pairs: [0.5], "1 scores for 120"), (lambda pairs: [float("nan")] * len(pairs), "nan")]
)
def test_a_broken_scorer_is_an_error_and_not_a_pick(instances: list[Instance], bad: Score, what: str) -> None:
    with raises_naming(ConfigError, "scorer", what):
        evaluate(instances, score=bad)


def test_an_average_over_tasks_is_as_unsure_as_its_tasks_differ(make_instance: Callable[..., Instance]) -> None:
    """Many instances of few tasks that differ: instances alone would make the interval far too narrow."""
    instances = [make_instance(index, task=f"task {index % 4}") for index in range(80)]
    good = {i.instruction for i in instances if i.task in ("task 0", "task 1")}
    labels = {(i.instruction, c.response): c.labels["rougeL"] for i in instances for c in i.candidates}
    report = evaluate(instances, score=lambda p: [labels.get(x, 0.0) * (1 if x[0] in good else -1) for x in p])
    average = report.averages["all tasks"].means["scorer"]
    by_task = [row.means["scorer"] for row in report.tasks]
    assert average.mean == pytest.approx(np.mean(by_task))
    expected = ttest_1samp(by_task, 0).confidence_interval(0.95)
    assert (average.low, average.high) == pytest.approx((max(0, expected.low), min(1, expected.high)), abs=0.01)
    assert average.high - average.low > 2 * (
        report.selectors["scorer"].estimate.high - report.selectors["scorer"].estimate.low
    )


def test_the_worst_instances_come_first_with_their_candidates_by_value(instances: list[Instance], score: Score) -> None:
    report = evaluate(instances, score=score)
    lost = [{pick.selector: pick.label for pick in example.picks} for example in report.worst]
    regrets = [picks["oracle"] - picks["selector"] for picks in lost]
    assert regrets == sorted(regrets, reverse=True)
    assert regrets[-1] > 0
    for example in report.worst:
        values = [candidate.value for candidate in example.candidates]
        assert values == sorted(values, reverse=True)  # type: ignore[type-var]
        assert len(values) + example.left_out == 6


def test_a_long_pool_is_cut_but_its_picks_stay(make_instance: Callable[..., Instance]) -> None:
    made = [make_instance(index, size=40) for index in range(5)]
    report = evaluate(made, score=lambda pairs: [-len(response) / 100 for _, response in pairs], with_probes=False)
    for example in report.worst:
        assert len(example.candidates) == 12
        assert example.left_out == 28
        assert {pick.response for pick in example.picks} <= {one.response for one in example.candidates}


def test_published_tasks_have_their_numbers_beside_ours(instances: list[Instance], score: Score) -> None:
    tense = evaluate([replace(i, task="tense") for i in instances], score=score).published
    assert [(row.task, row.numbers["FLAN-T5-xxl + Cappy"]) for row in tense] == [("tense", 96.23)]
    assert evaluate([replace(i, task="tense", template="own") for i in instances], score=score).published == ()
    assert evaluate([replace(i, task="my task") for i in instances], score=score).published == ()


def test_the_published_tables_are_whole_and_have_the_known_averages() -> None:
    tables = json.loads(PUBLISHED.read_text())
    large = [row["Cappy-large"] for row in tables["promptsource11"]["tasks"].values()]
    assert len(large) == 11
    assert sum(large) / 11 == pytest.approx(56.6, abs=0.1)
    rows = list(tables["bigbench45"]["tasks"].values())
    means = [
        sum(row[f"FLAN-T5-{size} + Cappy"] for row in rows) / 45 for size in ("small", "base", "large", "xl", "xxl")
    ]
    assert len(rows) == 45
    assert means == pytest.approx([23.6543, 27.6178, 30.3802, 33.2775, 37.1678], abs=0.01)
