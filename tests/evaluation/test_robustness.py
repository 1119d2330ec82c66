"""Each probe finds the weakness that it is named for, and none where there is none."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from cappy.evaluation import evaluate
from cappy.evaluation.findings import Probe
from cappy.records import Candidate, Instance

Score = Callable[[Sequence[tuple[str, str]]], list[float]]


def probed(instances: list[Instance], score: Score) -> dict[str, Probe]:
    return {probe.name: probe for probe in evaluate(instances, score=score).probes}


def choice(made: Instance, instruction: str, right: str) -> Instance:
    """The instance as a choice between yes and no."""
    candidates = tuple(
        Candidate(response=answer, source="choice", labels={"rougeL": float(answer == right)})
        for answer in ("yes", "no")
    )
    return replace(made, instruction=instruction, choices=("yes", "no"), candidates=candidates)


@pytest.fixture
def labels(instances: list[Instance]) -> dict[tuple[str, str], float]:
    return {(i.instruction, c.response): c.labels["rougeL"] for i in instances for c in i.candidates}


@pytest.mark.parametrize(
    ("yes", "kept", "words"),
    [(8, -0.6, "none of its gain"), (20, 0.0, "none of its gain"), (30, 0.5, "50% of"), (40, 1.0, "100% of its gain")],
)
def test_what_is_kept_without_the_instruction_is_what_the_response_alone_tells(
    make_instance: Callable[..., Instance], yes: int, kept: float, words: str
) -> None:
    """Of 40 questions `yes` have that answer. The scorer knows it with the question, and says yes without one: of its
    gain of a half over random choice it keeps what yes gains."""
    instances = [choice(make_instance(index), f"{index}?", "yes" if index < yes else "no") for index in range(40)]
    labels = {(i.instruction, c.response): c.labels["rougeL"] for i in instances for c in i.candidates}
    result = probed(instances, lambda pairs: [labels.get(pair, float(pair[1] == "yes")) for pair in pairs])
    assert result["response only"].value == pytest.approx(kept)
    assert words in result["response only"].meaning


def test_a_scorer_of_length_alone_is_detected(instances: list[Instance]) -> None:
    result = probed(instances, lambda pairs: [len(response) / 100 for _, response in pairs])
    assert result["length"].value > 0.3
    assert "prefers longer" in result["length"].meaning
    assert (
        "prefers shorter" in probed(instances, lambda pairs: [-len(text) / 100 for _, text in pairs])["length"].meaning
    )


def test_scores_that_are_the_labels_have_no_bias_of_length(
    instances: list[Instance], labels: dict[tuple[str, str], float]
) -> None:
    result = probed(instances, lambda pairs: [labels.get(pair, 0.0) for pair in pairs])
    assert result["length"].value == pytest.approx(0.0)


def test_a_score_that_depends_on_its_batch_is_detected(instances: list[Instance], score: Score) -> None:
    assert probed(instances, score)["order and batch"].value == 0.0
    result = probed(instances, lambda pairs: [value + 0.01 * len(pairs) / 240 for value in score(pairs)])
    assert result["order and batch"].value == pytest.approx(0.01, rel=0.5)


def test_the_spread_over_templates_is_the_standard_deviation(make_instance: Callable[..., Instance]) -> None:
    instances = [
        replace(choice(make_instance(index), f"{template} {index}", "yes"), template=template)
        for index in range(10)
        for template in ("good", "bad")
    ]
    result = probed(
        [replace(one, instance_id=str(place)) for place, one in enumerate(instances)],
        lambda pairs: [float((answer == "yes") == instruction.startswith("good")) for instruction, answer in pairs],
    )
    assert result["template"].value == pytest.approx(0.5)
