"""Labels mean what their source says, and training gets the candidates that it needs."""

from pathlib import Path

import pytest

from cappy.annotation import AnnotationConfig, rouge_l, run
from cappy.annotation.labels import annotate
from cappy.config import build
from cappy.errors import ConfigError
from cappy.records import Candidate, Instance, read, write


def generation(name: str, reference: str, *responses: str) -> Instance:
    candidates = tuple(Candidate(response=response) for response in responses)
    return Instance(
        instance_id=name, instruction=f"say {name}", references=(reference,), task="say", candidates=candidates
    )


def labelled(instances: list[Instance]) -> dict[str, list[tuple[str, str, float]]]:
    done = annotate(instances, name="rougeL", metric=rouge_l)
    return {i.instance_id: [(c.response, c.source, c.labels["rougeL"]) for c in i.candidates] for i in done}


def test_each_source_has_its_label() -> None:
    found = labelled([generation("one", "the red cat", "the cat", "dog"), generation("two", "a blue bird")])
    assert found["one"] == [
        ("the cat", "llm", 0.8),
        ("dog", "llm", 0.0),
        ("the red cat", "reference", 1.0),
        ("a blue bird", "mismatch", 0.0),
    ]


def test_a_choice_is_right_or_wrong_and_needs_no_mismatch() -> None:
    instance = Instance(
        instance_id="q",
        instruction="yes or no?",
        references=("yes",),
        choices=("yes", "no"),
        candidates=tuple(Candidate(response=text, source="choice") for text in ("yes", "no")),
    )
    assert labelled([instance])["q"] == [("yes", "choice", 1.0), ("no", "choice", 0.0)]


def test_a_mismatch_is_never_one_of_the_instances_own_texts() -> None:
    for name, candidates in labelled([generation("a", "same"), generation("b", "same")]).items():
        assert [source for _, source, _ in candidates] == ["reference"], name


def test_annotating_twice_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path / "in", [generation(f"i{n}", f"the {n} cats", f"{n} cats") for n in range(9)])
    config = AnnotationConfig(source=tmp_path / "in", target=tmp_path / "once", work=tmp_path / "work", part_rows=3)
    run(config)
    run(AnnotationConfig(source=tmp_path / "once", target=tmp_path / "twice", work=tmp_path / "work", part_rows=3))
    assert list(read(tmp_path / "once")) == list(read(tmp_path / "twice"))


def test_an_unknown_metric_is_named_with_the_ones_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"annotation: --metric: 'meteor' is no metric; choose of rougeL, "):
        build(AnnotationConfig, {"source": tmp_path, "target": tmp_path, "metric": "meteor"})
