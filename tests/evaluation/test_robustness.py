"""Each probe finds the weakness that it is named for, and none where there is none."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from zlib import crc32

import pytest

from cappy.evaluation import evaluate
from cappy.evaluation.findings import Probe
from cappy.records import Candidate, Instance

Score = Callable[[Sequence[tuple[str, str]]], list[float]]


def probed(instances: list[Instance], score: Score) -> dict[str, Probe]:
    return {probe.name: probe for probe in evaluate(instances, score=score, resamples=100).probes}


@pytest.fixture
def labels(instances: list[Instance]) -> dict[tuple[str, str], float]:
    return {(i.instruction, c.response): c.labels["rougeL"] for i in instances for c in i.candidates}


def test_a_scorer_that_needs_the_instruction_keeps_little_without_it(
    instances: list[Instance], labels: dict[tuple[str, str], float]
) -> None:
    found = probed(instances, lambda pairs: [labels.get(pair, crc32(pair[1].encode()) % 97 / 97) for pair in pairs])
    assert abs(found["response only"].value) < 0.6


def test_a_scorer_that_reads_the_response_alone_keeps_all(
    instances: list[Instance], labels: dict[tuple[str, str], float]
) -> None:
    blind = {response: label for (_, response), label in labels.items()}
    found = probed(instances, lambda pairs: [blind[response] for _, response in pairs])
    assert found["response only"].value == pytest.approx(1.0)
    assert "100% of its gain" in found["response only"].meaning


def test_a_scorer_of_length_alone_is_found(instances: list[Instance]) -> None:
    found = probed(instances, lambda pairs: [len(response) / 100 for _, response in pairs])
    assert found["length"].value > 0.3
    assert "prefers longer" in found["length"].meaning
    assert (
        "prefers shorter" in probed(instances, lambda pairs: [-len(text) / 100 for _, text in pairs])["length"].meaning
    )


def test_scores_that_are_the_labels_have_no_bias_of_length(
    instances: list[Instance], labels: dict[tuple[str, str], float]
) -> None:
    found = probed(instances, lambda pairs: [labels.get(pair, 0.0) for pair in pairs])
    assert found["length"].value == pytest.approx(0.0)


def test_a_score_that_depends_on_its_batch_is_found(instances: list[Instance], score: Score) -> None:
    assert probed(instances, score)["order and batch"].value == 0.0
    found = probed(instances, lambda pairs: [value + 0.01 * len(pairs) / 240 for value in score(pairs)])
    assert found["order and batch"].value == pytest.approx(0.01, rel=0.5)


def test_the_spread_over_templates_is_the_standard_deviation(make_instance: Callable[..., Instance]) -> None:
    def choice(index: int, template: str) -> Instance:
        made = make_instance(index, size=2)
        answers = ("yes", "no")
        candidates = tuple(
            Candidate(response=answer, source="choice", labels={"rougeL": float(answer == "yes")}) for answer in answers
        )
        return replace(
            made, instruction=f"{template} {index}", template=template, choices=answers, candidates=candidates
        )

    instances = [choice(index, template) for index in range(10) for template in ("good", "bad")]
    found = probed(
        [replace(one, instance_id=str(place)) for place, one in enumerate(instances)],
        lambda pairs: [float((answer == "yes") == instruction.startswith("good")) for instruction, answer in pairs],
    )
    assert found["template"].value == pytest.approx(0.5)
