"""Lists in the cells of a CSV file, as pandas, NumPy and datasets write them (B2)."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wording import raises_naming

from cappy.errors import RecordError
from cappy.preparation.cells import read_list
from cappy.records import Instance, Manifest

Prepare = Callable[..., tuple[Manifest, list[Instance]]]
WHOLE = {"test": 0, "validation": 0}
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12), max_size=5)


def frame(path: Path, rows: list[dict[str, Any]]) -> Path:
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame(rows).to_csv(path, index=False)
    return path


@pytest.mark.parametrize(
    "kind",
    [list, tuple, lambda texts: np.array(texts, dtype=object), np.array],
    ids=["list", "tuple", "objects", "texts"],
)
def test_b2_lists_that_pandas_wrote_are_lists_again(prepare: Prepare, tmp_path: Path, kind: Any) -> None:
    responses = ["Paris", "I do not know", 'It is "Paris", isn\'t it?']
    row = {
        "instruction": "Capital?", "references": kind(["Paris", "Paris, France"]), "responses": kind(responses),
        "labels": kind([1.0, 0.0, 0.5]), "choices": kind(["Paris", "Rome"]),
    }  # fmt: skip
    (result,) = prepare(frame(tmp_path / "in.csv", [row]), **WHOLE)[1]
    assert [(one.response, one.labels["given"]) for one in result.candidates] == [
        (text, label) for text, label in zip(responses, (1.0, 0.0, 0.5), strict=True)
    ]
    assert (result.references, result.choices) == (("Paris", "Paris, France"), ("Paris", "Rome"))


def test_b2_lists_that_datasets_wrote_are_lists_again(prepare: Prepare, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"instruction": "Say.", "reference": "a", "responses": ["a", "b c", "d\ne"]}]
    datasets.Dataset.from_list(rows).to_csv(str(tmp_path / "in.csv"))
    (result,) = prepare(tmp_path / "in.csv", **WHOLE)[1]
    assert [one.response for one in result.candidates] == ["a", "b c", "d\ne"]


@pytest.mark.parametrize(
    ("cell", "texts"),
    [
        ('["a", "b\\n"]', ["a", "b\n"]),
        ("['a' 'b']", ["a", "b"]),
        ("['a'\n 'b']", ["a", "b"]),
        ("array(['a', 'b'], dtype=object)", ["a", "b"]),
        ("[np.str_('a'), np.str_('np.str_(b)')]", ["a", "np.str_(b)"]),
        ("['a']", ["a"]),
        ("plain", ["plain"]),
        ("[laughs] plain", ["[laughs] plain"]),
        ("[REDACTED]", ["[REDACTED]"]),
    ],
)
def test_b2_a_cell_of_responses_holds_these(prepare: Prepare, tmp_path: Path, cell: str, texts: list[str]) -> None:
    quoted = cell.replace('"', '""')
    (tmp_path / "in.csv").write_text(f'instruction,reference,responses\nSay.,a,"{quoted}"\n')
    (result,) = prepare(tmp_path / "in.csv", **WHOLE)[1]
    assert [one.response for one in result.candidates] == texts


@pytest.mark.parametrize("cell", ["['a', 'b'", "['a' 'b', 'c']", "['a', b]", "['a' ... 'b']", "['a', \"b']"])
def test_b2_what_looks_like_a_list_and_is_none_is_refused(prepare: Prepare, tmp_path: Path, cell: str) -> None:
    quoted = cell.replace('"', '""')
    (tmp_path / "in.csv").write_text(f'instruction,reference,responses\nSay.,a,"{quoted}"\n')
    with raises_naming(RecordError, "in.csv:2: responses", "a list", "as JSON (", "JSON Lines or Parquet"):
        prepare(tmp_path / "in.csv", **WHOLE)


def _arrays(texts: list[str]) -> dict[str, Any]:
    return {"text": np.array(texts, dtype=object), "answer_start": np.array([1, 2, 3], dtype=np.int32)}


@pytest.mark.parametrize("name", ["references", "reference", "answers"])
@pytest.mark.parametrize(
    "write",
    [
        lambda texts: str({"text": texts, "answer_start": [1, 2, 3]}),
        lambda texts: str({"answer_start": [1, 2, 3], "text": texts}),
        lambda texts: json.dumps({"text": texts, "answer_start": [1, 2, 3]}),
        lambda texts: str(_arrays(texts)),
    ],
    ids=["python", "places-first", "json", "numpy"],
)
def test_b2_the_answers_of_squad_in_a_cell_are_read_as_those_of_json(
    prepare: Prepare, tmp_path: Path, name: str, write: Callable[[list[str]], str]
) -> None:
    texts = ["it's", 'a "b", array([c])', "it's"]
    path = frame(tmp_path / "in.csv", [{"instruction": "Who?", name: write(texts)}])
    columns = ("references=answers",) if name == "answers" else ()
    assert prepare(path, columns=columns, **WHOLE)[1][0].references == tuple(texts[:2])


def test_b2_one_answer_of_squad_may_be_a_text_and_an_object_without_places_stays_a_text(
    prepare: Prepare, tmp_path: Path
) -> None:
    cells = {"{'text': 'Ann', 'answer_start': 4}": "Ann", '{"text": "Ann"}': '{"text": "Ann"}', "{'a': 1}": "{'a': 1}"}
    path = frame(tmp_path / "in.csv", [{"instruction": f"Who {cell}?", "references": cell} for cell in cells])
    assert [one.references for one in prepare(path, **WHOLE)[1]] == [(text,) for text in cells.values()]


@pytest.mark.parametrize(
    "cell",
    [
        "{'text': ['a', 'b'], 'answer_start': [1, 2",
        "{'text': ['a' 'b', 'c'], 'answer_start': [1, 2]}",
        "{'text': ['a', ..., 'b'], 'answer_start': [1, 2]}",
        "{'answer_start': [1, 2]}",
        '{"answer_start": [1, 2]}',
    ],
)
def test_b2_answers_of_squad_that_cannot_be_read_are_refused(prepare: Prepare, tmp_path: Path, cell: str) -> None:
    path = frame(tmp_path / "in.csv", [{"instruction": "Who?", "references": cell}])
    with raises_naming(RecordError, "in.csv:2: references", "answers of SQuAD", "JSON Lines or Parquet"):
        prepare(path, **WHOLE)


def test_b2_a_list_of_numbers_is_a_text_where_one_text_stands_and_refused_where_several_do(
    prepare: Prepare, tmp_path: Path
) -> None:
    (tmp_path / "in.csv").write_text('instruction,reference\nSort 2 1.,"[1, 2]"\n')
    assert prepare(tmp_path / "in.csv", **WHOLE)[1][0].references == ("[1, 2]",)
    (tmp_path / "in.csv").write_text('instruction,references\nSort 2 1.,"[1, 2]"\n')
    with pytest.raises(RecordError, match=r"--columns reference=references"):
        prepare(tmp_path / "in.csv", **WHOLE)
    assert prepare(tmp_path / "in.csv", columns=("reference=references",), **WHOLE)[1][0].references == ("[1, 2]",)


@pytest.mark.parametrize(("cell", "message"), [("[]", "responses is empty, got []"), ("nan", None)])
def test_b2_an_empty_list_and_no_value_are_no_response(
    prepare: Prepare, tmp_path: Path, cell: str, message: str | None
) -> None:
    (tmp_path / "in.csv").write_text(f"instruction,reference,responses\nSay.,a,{cell}\n")
    if message is None:
        assert prepare(tmp_path / "in.csv", **WHOLE)[1][0].candidates == ()
    else:
        with pytest.raises(RecordError) as error:
            prepare(tmp_path / "in.csv", **WHOLE)
        assert message in str(error.value)


def test_b2_a_list_may_stand_as_text_in_json_lines_and_under_a_mapped_name(prepare: Prepare, json_lines: Any) -> None:
    path = json_lines({"instruction": "Say.", "answers": "['a', 'b']", "reference": "x", "responses": "[1, 2]"})
    (result,) = prepare(path, columns=("references=answers",), **WHOLE)[1]
    assert (result.references, [one.response for one in result.candidates]) == (("a", "b"), ["[1, 2]"])


@given(TEXTS)
def test_b2_what_python_and_numpy_write_reads_back(texts: list[str]) -> None:
    assert read_list(str(texts)) == texts
    with np.printoptions(threshold=10_000):
        assert read_list(str(np.array(texts, dtype=object))) == texts


@given(st.lists(st.floats(0, 1), max_size=6))
def test_b2_numbers_read_back(numbers: list[float]) -> None:
    assert read_list(str(numbers)) == numbers
    assert read_list(str([np.float64(number) for number in numbers])) == numbers


@given(st.text(alphabet="['\",]\\ ab1.()", max_size=30))
def test_b2_any_text_is_a_list_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(read_list(text), list)
