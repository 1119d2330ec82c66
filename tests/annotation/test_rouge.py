"""Rouge-L is the reference implementation's, to the last bit, one response at a time and in columns."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenize import tokenize

from cappy.annotation import rouge, rouge_l
from cappy.annotation.rouge import COLUMNS, rouge_l_batch, rouge_l_columns, rouge_l_pools, token_strings
from cappy.records import Candidate, Instance, read_batches, write

POOLS = Path(__file__).parents[2].parent / "shared/data/candidates"
REFERENCE = {stem: RougeScorer(["rougeL"], use_stemmer=stem) for stem in (True, False)}
LISTS = pa.list_(pa.string())

hard = [
    "running", "runs", "Run", "don't", "3.14", "-5", "été", "naïve", "the", "flies", "dying", "İİİ", "İstanbul",
    "\u212aelvin", "\u017ftone", "STRASSE", "straße", "\ufb01ne", "e\u0301te", "\u0663\u0664", "\u0968\u0969",
    "\uff14\uff15", "a\u0301b", "x\u200by", "\u00adsoft", "\uff46ull", "\U0001d41bold", "\n", "\t", "\u2028", "_",
    "a_b", "", " ", "yyyyy", "sses", "ies", "\x1f", "\ud800", "\u01c5", "Σς", "ß" * 5, "0" * 20,
]  # fmt: skip
texts = st.one_of(
    st.text(max_size=60),
    st.text(alphabet=st.characters(codec=None, exclude_categories=()), max_size=20),
    st.lists(st.sampled_from(hard), max_size=12).map(" ".join),
    st.lists(st.sampled_from(hard), max_size=12).map("".join),
)
instances = st.tuples(st.lists(texts, max_size=3), st.lists(texts, max_size=4))


def reference(references: list[str], response: str, stem: bool = True) -> float:
    return float(REFERENCE[stem].score_multi(references, response)["rougeL"].fmeasure) if references else 0.0


@given(st.lists(texts, min_size=1, max_size=4), texts, st.booleans())
def test_equals_rouge_score_to_the_last_bit(references: list[str], response: str, stem: bool) -> None:
    assert rouge_l(references, response, use_stemmer=stem) == reference(references, response, stem)


@given(st.lists(instances, max_size=5), st.booleans(), st.sampled_from([(1, 1), (40, 3), (10**6, 10**6)]))
def test_columns_equal_rouge_score_to_the_last_bit(
    pools: list[tuple[list[str], list[str]]], stem: bool, chunk: tuple[int, int]
) -> None:
    expected = [reference(references, response, stem) for references, responses in pools for response in responses]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rouge, "CHUNK_CHARACTERS", chunk[0])
        patch.setattr(rouge, "CHUNK_PAIRS", chunk[1])
        result = rouge_l_pools([first for first, _ in pools], [second for _, second in pools], use_stemmer=stem)
    assert result.tolist() == expected


def test_every_character_separates_or_joins_as_rouge_score_has_it() -> None:
    result = [f"a{chr(code)}b {chr(code)}" for code in range(0x110000)]
    plain = [" ".join(tokenize(text, None)) for text in result]
    strings, _ = token_strings([*result, *plain], use_stemmer=False)
    assert strings[: len(result)] == strings[len(result) :]


@pytest.mark.parametrize("source", sorted(POOLS.glob("*.gz")) or [None], ids=lambda path: path and path.name)
def test_columns_equal_rouge_score_on_real_outputs(source: Path | None) -> None:
    if source is None:
        pytest.skip("shared/data is not beside this checkout")
    with gzip.open(source, "rt") as file:
        rows = [json.loads(line) for line in file]
    # Every pair takes the reference minutes (see benchmarks/annotation.py --every-pair): here a draw of them.
    rng = random.Random(0)
    drawn = rng.sample(rows, min(12, len(rows)))
    references = [row["references"] for row in drawn]
    responses = [
        [one["text"] for one in rng.sample(row["candidates"], min(4, len(row["candidates"])))] for row in drawn
    ]
    result = rouge_l_columns(pa.array(references, LISTS), pa.array(responses, LISTS)).to_pylist()
    assert result == [
        [reference(refs, text) for text in pool] for refs, pool in zip(references, responses, strict=True)
    ]


def test_a_column_may_be_a_slice_and_hold_nulls_and_empty_lists() -> None:
    references: Any = [["x"], ["the red cat"], None, [], ["a dog", None], ["y"]]
    responses: Any = [["x"], ["red cat", None], ["cat"], ["cat"], [], ["y"]]
    columns = [pa.array(values, LISTS).slice(1, 4) for values in (references, responses)]
    assert rouge_l_columns(*columns).to_pylist() == [[0.8, 0.0], [0.0], [0.0], []]


def test_the_column_door_gives_what_the_step_writes(tmp_path: Path) -> None:
    pools = [("the red cat", ["red cat", "cat", ""]), ("a dog", []), ("blue", ["blue", "Blues"])]
    instances = [
        Instance(
            instance_id=str(n),
            instruction="go",
            references=(target, "x"),
            candidates=tuple(Candidate(response=text) for text in texts),
        )
        for n, (target, texts) in enumerate(pools)
    ]
    write(tmp_path / "f", instances, part_rows=2)
    batches = read_batches(tmp_path / "f", columns=COLUMNS)
    result = [labels for batch in batches for labels in rouge_l_batch(batch).to_pylist()]
    assert result == [[rouge_l((target, "x"), text) for text in texts] for target, texts in pools]


@given(st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=4, max_size=12))
def test_stems_are_those_of_the_library(word: str) -> None:
    for suffix in ("", "s", "ed", "ing", "y", "ational", "alli", "ement", "logi", "fulli", "ell", "7", "k", "o", "x"):
        assert rouge._stem(word + suffix) == PorterStemmer().stem(word + suffix)


def test_long_texts_equal_rouge_score_piece_by_piece() -> None:
    # The reference fills a table of tokens times tokens: 50,000 tokens would take it hours. Equal texts, one token
    # dropped or one put in, have a common subsequence that is known.
    rng = random.Random(1)
    words = [f"w{rng.randrange(5_000)}" for _ in range(50_000)]
    whole = " ".join(words)
    shorter = " ".join(words[:25_000] + words[25_001:])
    assert rouge_l_pools([[whole]], [[whole, shorter]]).tolist() == [1.0, _f_measure(49_999, 49_999, 50_000)]
    assert rouge_l([whole], shorter) == _f_measure(49_999, 49_999, 50_000)


def test_more_different_tokens_than_there_are_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rouge, "_CHARACTERS", 3)
    assert rouge_l_pools([["a b c d e"]], [["a c e f", "x"]]).tolist() == [rouge_l(["a b c d e"], "a c e f"), 0.0]


def test_token_strings_are_equal_where_the_tokens_are() -> None:
    (running, runs, other, blank), lengths = token_strings(["Running fast!", "runs fast", "slow", "..."])
    assert (running == runs, running == other, blank) == (True, False, "")
    assert lengths.tolist() == [2, 2, 1, 0]


def test_no_token_is_no_credit() -> None:
    assert rouge_l(["привет"], "привет") == 0.0
    assert rouge_l([""], "") == 0.0
    assert rouge_l([], "cat") == 0.0
    assert rouge_l_pools([["привет"], [""], []], [["привет"], [""], ["cat"]]).tolist() == [0.0, 0.0, 0.0]


def _f_measure(common: int, response: int, target: int) -> float:
    precision, recall = common / response, common / target
    return 2 * precision * recall / (precision + recall)
