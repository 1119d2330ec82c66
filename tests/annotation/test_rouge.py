"""Rouge-L is the reference implementation's, to the last bit."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from cappy.annotation import rouge_l

E2E = Path(__file__).parents[2].parent / "shared/data/candidates/e2e_nlg.jsonl.gz"
REFERENCE = {stem: RougeScorer(["rougeL"], use_stemmer=stem) for stem in (True, False)}

texts = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from(["running", "runs", "Run", "don't", "3.14", "-5", "été", "naïve", "the", "flies"])).map(
        " ".join
    ),
)


def reference(references: list[str], response: str, stem: bool = True) -> float:
    return float(REFERENCE[stem].score_multi(references, response)["rougeL"].fmeasure)


@given(st.lists(texts, min_size=1, max_size=4), texts, st.booleans())
def test_equals_rouge_score_to_the_last_bit(references: list[str], response: str, stem: bool) -> None:
    assert rouge_l(references, response, use_stemmer=stem) == reference(references, response, stem)


def test_equals_rouge_score_on_real_outputs() -> None:
    if not E2E.exists():
        pytest.skip("shared/data is not beside this checkout")
    with gzip.open(E2E, "rt") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(12), strict=False)]
    for row in rows:
        for candidate in row["candidates"]:
            assert rouge_l(row["references"], candidate["text"]) == reference(row["references"], candidate["text"])


def test_no_token_is_no_credit() -> None:
    assert rouge_l(["привет"], "привет") == 0.0
    assert rouge_l([""], "") == 0.0
    assert rouge_l([], "cat") == 0.0
