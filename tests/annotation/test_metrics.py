"""Metrics by name: what each sees, that all stay within 0 and 1, and how they mix."""

import re
import string
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wording import raises_naming

from cappy.annotation import rouge_l
from cappy.annotation.metrics import (
    METRICS,
    CandidatePool,
    exact_match,
    load_metric,
    numeric_match,
    parse_metric,
    token_f1,
)
from cappy.annotation.rouge import rouge_l_unicode
from cappy.annotation.step import AnnotationConfig, run
from cappy.config import build
from cappy.errors import ConfigError
from cappy.records import Candidate, Instance, read, write
from cappy.records.instance import GIVEN_METRIC

words = st.lists(st.sampled_from(["run", "-5", "3.14", "été", "日本", "the", "नमस्ते", "A.", "x"]), max_size=8).map(
    " ".join
)
texts = st.one_of(words, st.text(max_size=30))
COMPUTED = [name for name in METRICS if name != GIVEN_METRIC]


def value(name: str, references: list[str], response: str) -> float:
    instance = Instance(instance_id="i", instruction="go", references=("x",))
    object.__setattr__(instance, "references", tuple(references))  # a metric must cope with what no instance may hold
    (result,) = load_metric(name)([CandidatePool(instance, [Candidate(response=response)])])
    return float(result)


plain = st.text(alphabet="abc AB09.,;-\n", max_size=40)


@pytest.mark.parametrize("name", COMPUTED)
@given(references=st.lists(texts, min_size=1, max_size=3), response=texts)
def test_every_metric_is_between_0_and_1(name: str, references: list[str], response: str) -> None:
    assert 0.0 <= value(name, references, response) <= 1.0


@pytest.mark.parametrize("name", COMPUTED)
def test_a_reference_gets_1_and_another_text_less(name: str) -> None:
    metric = partial(value, name)
    references = ["It costs 12 euros in the shop today", "The price is 12"]
    for reference in references:
        assert metric(references, reference) == pytest.approx(1.0)
    assert metric(references, "nobody knows 13 of them") < 0.5


@pytest.mark.parametrize("name", sorted({*COMPUTED} - {"bleu"}))
@given(references=st.lists(texts, min_size=2, max_size=3), response=texts)
def test_more_references_never_lower_a_label(name: str, references: list[str], response: str) -> None:
    metric = partial(value, name)
    assert metric(references, response) == max(metric([reference], response) for reference in references)


@pytest.mark.parametrize(
    ("reference", "response", "expected"),
    [
        ("#### 72", "40 + 32 = 72 apples.", 1.0),
        ("5", "-5", 0.0),
        ("-5", "x = −5", 1.0),
        ("5", "3-5", 1.0),
        ("1,000", "1000.0 in all", 1.0),
        ("3.14", "3 14", 0.0),
        ("0.5", ".5", 1.0),
        ("2", "1,2", 1.0),
        ("seven", "seven", 0.0),
        ("7", "seven", 0.0),
    ],
)
def test_numeric_match_compares_the_last_numbers(reference: str, response: str, expected: float) -> None:
    assert numeric_match([reference], response) == expected


def test_what_rouge_l_calls_equal_is_not_equal_to_the_stricter_metrics() -> None:
    assert rouge_l(["5"], "-5") == 1.0
    assert (numeric_match(["5"], "-5"), exact_match(["5"], "-5")) == (0.0, 0.0)
    assert exact_match(["a  cafe\u0301\n"], " a café") == 1.0
    assert exact_match(["Yes"], "yes") == 0.0


@pytest.mark.parametrize(
    ("reference", "response", "expected"),
    [
        ("the cat sat", "sat cat", 1.0),
        ("The cat, sat!", "a cat", 2 / 3),
        ("cat cat dog", "cat", 0.5),
        ("cat", "dog", 0.0),
        ("the", "!", 1.0),
        ("cat", "", 0.0),
        pytest.param("$500", "500", 1.0, id="C8"),
        pytest.param("C++", "C", 1.0, id="C9"),
        ("50%", "50", 1.0),
        ("1,000", "1000", 1.0),
        ("«Paris»", "Paris", 0.0),
        ("¿Paris", "Paris", 0.0),
        ("5 €", "5", 2 / 3),
        ("x=y", "xy", 1.0),
    ],
)
def test_token_f1_counts_words_in_any_order(reference: str, response: str, expected: float) -> None:
    assert token_f1([reference], response) == pytest.approx(expected)


def squad_f1(reference: str, response: str) -> float:
    """F1 by the rules of SQuAD's evaluation script, said once more and as plainly as can be."""

    def tokens(text: str) -> list[str]:
        kept = "".join(character for character in text.lower() if character not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", kept).split()

    gold, predicted = tokens(reference), tokens(response)
    same = sum(min(gold.count(word), predicted.count(word)) for word in set(gold))
    if not gold or not predicted:
        return float(gold == predicted)
    if same == 0:
        return 0.0
    precision, recall = 1.0 * same / len(predicted), 1.0 * same / len(gold)
    return (2 * precision * recall) / (precision + recall)


squad_texts = st.lists(
    st.sampled_from(
        ["the", "A", "an", "cat", "C++", "$500", "500", "a–b", "l'an", "«x»", "x", "été", "日本", "!", "\u0345"]
    )
).map(" ".join)


@given(squad_texts | texts, squad_texts | texts)
def test_token_f1_is_that_of_squads_script_to_the_last_bit(reference: str, response: str) -> None:
    """C8, C9."""
    assert token_f1([reference], response) == squad_f1(reference, response)


@given(plain, plain)
def test_rouge_l_of_all_scripts_is_the_published_one_without_stemmer_on_ascii(one: str, other: str) -> None:
    assert rouge_l_unicode([one], other) == rouge_l([one], other, use_stemmer=False)


@pytest.mark.parametrize(
    ("reference", "near", "far"),
    [
        ("привет мир", "мир", "кот"),
        ("नमस्ते दुनिया", "नमस्ते", "बिल्ली"),
        ("日本語の文", "日本の文", "猫"),
        ("สวัสดีชาวโลก", "สวัสดี", "ฬฬ"),
        ("Straße", "STRASSE", "Weg"),
    ],
)
def test_rouge_l_of_all_scripts_sees_what_the_published_one_does_not(reference: str, near: str, far: str) -> None:
    assert rouge_l_unicode([reference], reference) == 1.0
    assert 0.0 < rouge_l_unicode([reference], near) <= 1.0
    assert rouge_l_unicode([reference], far) == 0.0
    assert rouge_l([reference], near) < rouge_l_unicode([reference], near)


def test_a_mixture_is_the_weighted_sum() -> None:
    metric = partial(value, "0.25*rougeL + 0.75*numeric_match")
    assert metric(["it is 5"], "it is -5") == pytest.approx(0.25)
    assert metric(["it is 5"], "5") == pytest.approx(0.25 * 0.5 + 0.75)
    assert parse_metric("rougeL") == {"rougeL": 1.0}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("rouge", ("'rouge'", "rougeL, ")),
        ("", ("''", "rougeL, ")),
        ("0.5*rougeL", ("'0.5*rougeL'", "sum to 0.5")),
        ("0.5*rougeL+0.7*bleu", ("sum to 1.2",)),
        ("0.5*rougeL+0.5*rougeL", ("rougeL ", "twice")),
    ],
)
def test_a_wrong_metric_is_refused_with_the_names_there_are(text: str, names: tuple[str, ...]) -> None:
    with raises_naming(ConfigError, "--metric", *names):
        build(AnnotationConfig, {"source": "a", "target": "b", "metric": text})


def test_the_manifest_names_the_metric_its_library_and_what_rouge_l_cannot_see(tmp_path: Path) -> None:
    instances = [
        Instance(
            instance_id=text, instruction=f"say {text}", references=(text,), candidates=(Candidate(response=text),)
        )
        for text in ("привет", "hello", "мир")
    ]
    write(tmp_path / "source", instances)

    def annotated(metric: str) -> tuple[dict[str, float], dict[str, object], list[float]]:
        config = AnnotationConfig(
            source=tmp_path / "source", target=tmp_path / metric, metric=metric, work=tmp_path / "work"
        )
        manifest = run(config)
        labels = [instance.selectable[0].labels[metric] for instance in read(tmp_path / metric)]
        assert manifest.config["metric"] == metric
        return dict(manifest.metrics), dict(manifest.facts), labels

    metrics, facts, labels = annotated("rougeL")
    assert (metrics["invisible_to_rougeL"], labels) == (2, [0.0, 1.0, 0.0])
    assert set(facts["metric_versions"]) == {"nltk"}  # type: ignore[call-overload]
    metrics, facts, labels = annotated("chrf")
    assert "invisible_to_rougeL" not in metrics
    assert labels == pytest.approx([1.0, 1.0, 1.0])
    assert set(facts["metric_versions"]) == {"sacrebleu"}  # type: ignore[call-overload]
