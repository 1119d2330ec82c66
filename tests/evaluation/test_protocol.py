"""The evaluation keeps its promises on a small pool."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from cappy.errors import CappyError, ConfigError, RecordError
from cappy.evaluation import Report, evaluate
from cappy.evaluation.pools import CHUNK_PAIRS
from cappy.records import Candidate, Instance

Score = Callable[[Sequence[tuple[str, str]]], list[float]]


def means(report: Report) -> dict[str, float]:
    return {name: row.estimate.mean for name, row in report.selectors.items()}


def test_every_selector_lies_between_the_worst_and_the_oracle(instances: list[Instance], score: Score) -> None:
    report = evaluate(instances, score=score, champion=score)
    worst = np.mean([min(c.labels["rougeL"] for c in i.candidates) for i in instances if i.split == "test"])
    found = means(report)
    assert len(found) == 13
    assert not report.unavailable
    assert all(worst <= mean <= found["oracle"] for mean in found.values())
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


def test_a_scorer_that_knows_the_labels_is_the_oracle_and_its_hybrids_are_it(instances: list[Instance]) -> None:
    labels = {(i.instruction, c.response): c.labels["rougeL"] for i in instances for c in i.candidates}
    report = evaluate(instances, score=lambda pairs: [labels[pair] for pair in pairs])
    found = means(report)
    assert found["scorer"] == found["hybrid_mbr"] == found["hybrid_likelihood"] == found["oracle"]
    assert report.selectors["hybrid_mbr"].detail == "weight 0"
    assert report.curve["scorer"] == report.curve["oracle"]


def test_equal_instances_give_an_equal_report(instances: list[Instance], score: Score) -> None:
    assert evaluate(iter(instances), score=score) == evaluate(instances, score=score)


def test_training_instances_are_passed_over(
    instances: list[Instance], score: Score, make_instance: Callable[..., Instance]
) -> None:
    train = [replace(make_instance(index, split="train"), candidates=()) for index in range(500, 505)]
    unlabelled = replace(train[0], candidates=(Candidate(response="no label"),))
    assert evaluate([*train, unlabelled, *instances], score=score) == evaluate(instances, score=score)


def test_test_instances_choose_no_weight_and_no_system(instances: list[Instance], score: Score) -> None:
    report = evaluate([i for i in instances if i.split == "test"], score=score)
    assert set(report.unavailable) == {"champion", "best_system", "hybrid_mbr", "hybrid_likelihood"}
    assert "held-out" in report.unavailable["hybrid_mbr"]
    reported = evaluate(instances, score=score, split="validation")
    assert "held-out" in reported.unavailable["best_system"]


def test_a_missing_likelihood_makes_the_selector_unavailable_and_says_why(
    instances: list[Instance], score: Score
) -> None:
    candidates = (replace(instances[0].candidates[0], logprob_mean=None), *instances[0].candidates[1:])
    report = evaluate([replace(instances[0], candidates=candidates), *instances[1:]], score=score)
    assert report.unavailable["likelihood_mean"] == "1 of 40 instances have candidates without log-likelihood"
    assert "likelihood_mean" in report.unavailable["hybrid_likelihood"]
    assert report.better_likelihood == "likelihood_sum"


def test_ties_with_another_label_are_counted_and_the_first_wins(instances: list[Instance]) -> None:
    report = evaluate(instances, score=lambda pairs: [0.5] * len(pairs))
    assert means(report)["scorer"] == means(report)["first"]
    differing = sum(len({c.labels["rougeL"] for c in i.candidates}) > 1 for i in instances if i.split == "test")
    assert report.selectors["scorer"].ties == differing > 0


def test_the_gate_finds_its_comparisons(instances: list[Instance], score: Score) -> None:
    report = evaluate(instances, score=score, champion=lambda pairs: [-value for value in score(pairs)])
    found = means(report)
    for key, other in {
        "scorer-random": "random",
        "scorer-likelihood": report.better_likelihood,
        "scorer-mbr": "mbr",
        "scorer-champion": "champion",
    }.items():
        difference = report.comparisons[key]
        assert difference.difference == pytest.approx(found["scorer"] - found[other])
        assert difference.low <= difference.difference <= difference.high
    assert found[report.better_likelihood] == max(found["likelihood_sum"], found["likelihood_mean"])
    assert report.comparisons["scorer-champion"].low > 0


def test_instances_without_candidates_are_skipped_and_counted(instances: list[Instance], score: Score) -> None:
    empty = replace(instances[0], candidates=(Candidate(response="", status="empty"),))
    report = evaluate([empty, *instances[1:]], score=score)
    assert (report.facts["instances"], report.facts["skipped_instances"]) == (39, 1)


def test_a_pool_of_one_candidate_is_evaluated(instances: list[Instance], score: Score) -> None:
    report = evaluate([replace(i, candidates=i.candidates[:1]) for i in instances], score=score)
    assert len(set(means(report).values())) == 1
    assert report.comparisons["scorer-random"].difference == 0
    assert len(report.curve["scorer"]) == 1


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
    assert report.averages["all tasks"]["scorer"] == 0.5
    assert report.averages["without CrowS-Pairs"]["scorer"] == 0.25
    assert "choices" in report.unavailable["mbr"]


def test_progress_counts_every_pair(instances: list[Instance], score: Score) -> None:
    told: list[tuple[int, int | None, str]] = []
    sizes: list[int] = []

    def counted(pairs: Sequence[tuple[str, str]]) -> list[float]:
        sizes.append(len(pairs))
        return score(pairs)

    def progress(done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = "") -> None:
        told.append((done, total, unit))

    many = [replace(i, instance_id=f"{i.instance_id}.{n}") for i in instances for n in range(12)]
    evaluate(many, score=counted, champion=score, progress=progress)
    assert told[-1] == (told[-1][1], told[-1][1], "pairs")
    assert max(sizes) <= CHUNK_PAIRS
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)


def test_nothing_to_report_on_says_what_to_do(instances: list[Instance], score: Score) -> None:
    with pytest.raises(CappyError, match=r"no instance of split 'test'.*prepare"):
        evaluate([i for i in instances if i.split == "validation"], score=score)
    with pytest.raises(CappyError, match=r"all 40 test instances.*cappy sampling"):
        evaluate([replace(i, candidates=()) for i in instances], score=score)


def test_a_missing_label_names_the_instance_and_the_remedy(instances: list[Instance]) -> None:
    bare = replace(instances[0], candidates=(Candidate(response="x"),))
    with pytest.raises(RecordError, match="'test-0': candidate 0 has no label 'rougeL'; run cappy annotation first"):
        evaluate([bare, *instances[1:]], score=None)


@pytest.mark.parametrize("bad", [lambda pairs: [0.5], lambda pairs: [float("nan")] * len(pairs)])
def test_a_broken_scorer_is_an_error_and_not_a_pick(instances: list[Instance], bad: Score) -> None:
    with pytest.raises(ConfigError, match="the scorer gave"):
        evaluate(instances, score=bad)
