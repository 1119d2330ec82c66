"""What each metric makes of texts that are not plain English: decided once, and held here."""

import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from cappy.annotation.metrics import CandidatePool, load_metric
from cappy.records import Candidate, Instance

METRICS = ("exact_match", "numeric_match", "token_f1", "rougeL", "rougeL_unicode")
TABLE = [
    # Reference, response, and the values of METRICS.
    ("5", "", (0, 0, 0, 0, 0)),
    ("5", "...", (0, 0, 0, 0, 0)),
    ("...", "...", (1, 0, 1, 0, 0)),
    # Digits of other scripts are numbers. Only widths are folded by the Rouge-L of all scripts.
    ("5", "５", (0, 1, 0, 0, 1)),
    ("5", "٥", (0, 1, 0, 0, 0)),
    ("72", "**72**", (0, 1, 1, 1, 1)),
    ("72", "#### 72", (0, 1, 1, 1, 1)),
    ("72", "72\n", (1, 1, 1, 1, 1)),
    ("72", "\r\n\t72\u00a0", (1, 1, 1, 1, 1)),
    # What an LLM goes on with after its answer counts: cut it off when sampling.
    ("72", "72\n\nQuestion: 5", (0, 0, 0.5, 0.5, 0.5)),
    ("Paris", "paris", (0, 0, 1, 1, 1)),
    ("Paris", "**Paris**", (0, 0, 1, 1, 1)),
    ("New York", "New\nYork", (1, 0, 1, 1, 1)),
    ("Paris", "Ｐａｒｉｓ", (0, 0, 0, 0, 1)),
    ("café", "cafe\u0301", (1, 0, 0, 0, 1)),
    ("it’s", "it's", (0, 0, 0, 1, 1)),
    ("Straße", "STRASSE", (0, 0, 0, 0, 1)),
    ("日本語", "日本", (0, 0, 0, 0, 0.8)),
    ("привет", "привет", (1, 0, 1, 0, 1)),
    ("😀", "😀", (1, 0, 1, 0, 0)),
    ("5 m²", "5 m³", (0, 1, 0.5, 1, 0.5)),
    ("C++", "C#", (0, 0, 1, 1, 1)),
]  # fmt: skip
texts = st.one_of(
    st.text(max_size=30),
    st.lists(
        st.sampled_from(["the", "cat", "sat.", "5", "日本", "été", "-5", "U.S.", "don't", "&amp;"]), max_size=9
    ).map(" ".join),
)


def value(name: str, references: list[str], response: str) -> float:
    instance = Instance(instance_id="i", instruction="go", references=("x",))
    object.__setattr__(instance, "references", tuple(references))
    (result,) = load_metric(name)([CandidatePool(instance, [Candidate(response=response)])])
    return float(result)


@pytest.mark.parametrize(("reference", "response", "expected"), TABLE)
def test_odd_texts_have_the_values_that_were_decided(
    reference: str, response: str, expected: tuple[float, ...]
) -> None:
    result = [value(name, [reference], response) for name in METRICS]
    assert result == pytest.approx([float(one) for one in expected])


@given(texts, texts)
def test_chrf_is_that_of_sacrebleu(reference: str, response: str) -> None:
    expected = sacrebleu.sentence_chrf(response, [reference]).score / 100
    assert value("chrf", [reference], response) == expected


@given(st.lists(texts, min_size=1, max_size=3), texts)
def test_bleu_is_that_of_sacrebleu(references: list[str], response: str) -> None:
    expected = sacrebleu.sentence_bleu(response, references, use_effective_order=True).score / 100
    assert value("bleu", references, response) == pytest.approx(expected, abs=1e-12)
