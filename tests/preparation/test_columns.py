"""Every column of a file is read, or named once, or refused: nothing is left out in silence (B1, B5)."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from wording import assert_names, raises_naming

from cappy.config import build
from cappy.errors import ConfigError, RecordError
from cappy.preparation.step import PreparationConfig
from cappy.records import Instance, Manifest

Prepare = Callable[..., tuple[Manifest, list[Instance]]]
JsonLines = Callable[..., Path]
WHOLE = {"test": 0, "validation": 0}
ALPACA = [
    {"instruction": "Translate the word into French.", "input": text, "output": output}
    for text, output in (("cat", "chat"), ("dog", "chien"), ("", "rien"))
]


def test_b1_the_input_of_an_alpaca_row_stands_below_its_instruction(prepare: Prepare, json_lines: JsonLines) -> None:
    _, result = prepare(json_lines(*ALPACA), columns=("reference=output",), **WHOLE)
    assert [(one.instruction, one.references) for one in result] == [
        ("Translate the word into French.\n\ncat", ("chat",)),
        ("Translate the word into French.\n\ndog", ("chien",)),
        ("Translate the word into French.", ("rien",)),
    ]
    _, result = prepare(json_lines({"instruction": "Double it.", "input": "4", "reference": "8"}), **WHOLE)
    assert result[0].instruction == "Double it.\n\n4"


@pytest.mark.parametrize(
    ("instruction", "text"),
    [("Sort: b a c\nOutput:", "b a c"), ("Q: word\nA:", "word"), ("Neutral: Ein Satz.\nNeu: ", "Ein Satz.")],
)
def test_b1_an_input_that_the_instruction_holds_is_not_repeated(
    prepare: Prepare, json_lines: JsonLines, instruction: str, text: str
) -> None:
    row = {"instruction": instruction, "input": text, "reference": "x"}
    assert prepare(json_lines(row), **WHOLE)[1][0].instruction == instruction
    given = prepare(json_lines(row), columns=("input=input",), **WHOLE)[1][0].instruction
    assert given == f"{instruction}\n\n{text}"


def test_b1_one_word_inside_a_sentence_is_no_input_that_stands_there(prepare: Prepare, json_lines: JsonLines) -> None:
    row = {"instruction": "Translate the word into French.", "input": "word", "reference": "mot"}
    assert prepare(json_lines(row), **WHOLE)[1][0].instruction.endswith("French.\n\nword")


@pytest.mark.parametrize(
    ("row", "columns", "parts"),
    [
        (
            {"prompt": "Double it.", "input": "4", "reference": "8"},
            ("instruction=prompt",),
            ("column 'input'", "--columns input=input"),
        ),
        (
            {"instruction": "Who?", "context": "Ann sat.", "reference": "Ann"},
            (),
            ("column 'context'", "--columns input=context"),
        ),
        (
            {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"},
            ("instruction=prompt", "reference=chosen"),
            ("column 'rejected'", "--columns response=rejected"),
        ),
        (
            {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"},
            ("instruction=prompt", "response=rejected"),
            ("column 'chosen'", "--columns reference=chosen"),
        ),
        (
            {"instruction": "Hi", "system": "Answer in French.", "reference": "Salut"},
            (),
            ("column 'system'", "into the instruction", "--ignore-columns system"),
        ),
        (
            {"instruction": "And now?", "history": [["a", "b"]], "reference": "c"},
            (),
            ("column 'history'", "into the instruction", "--ignore-columns history"),
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            (),
            ("column 'conversations'", "into the instruction", "--ignore-columns conversations"),
        ),
    ],
)
def test_b1_a_column_that_matters_and_is_not_read_is_refused_with_its_flag(
    prepare: Prepare, json_lines: JsonLines, row: dict[str, Any], columns: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    path = json_lines(row)
    with raises_naming(RecordError, f"{path}:1: ", *parts):
        prepare(path, columns=columns, **WHOLE)


def test_b1_the_flags_of_the_refusal_do_what_they_say(prepare: Prepare, json_lines: JsonLines) -> None:
    path = json_lines({"instruction": "Who sat?", "context": "Ann sat.", "reference": "Ann"})
    assert prepare(path, columns=("input=context",), **WHOLE)[1][0].instruction == "Who sat?\n\nAnn sat."
    assert prepare(path, ignore_columns=("context",), **WHOLE)[1][0].instruction == "Who sat?"
    path = json_lines({"prompt": "Hi", "chosen": "Hello", "rejected": "Go"})
    columns = ("instruction=prompt", "reference=chosen", "response=rejected")
    (result,) = prepare(path, columns=columns, **WHOLE)[1]
    assert (result.references, [one.response for one in result.candidates]) == (("Hello",), ["Go"])


def test_b1_a_column_that_matters_is_not_missed_where_it_is_empty_or_read_already(
    prepare: Prepare, json_lines: JsonLines
) -> None:
    rows = [
        {"instruction": "Ann sat. Who?", "context": "Ann sat.", "system": "", "history": [], "reference": "Ann"},
        {"instruction": "Bob sat. Who?", "context": None, "system": " ", "history": None, "reference": "Bob"},
    ]
    assert len(prepare(json_lines(*rows), **WHOLE)[1]) == 2


@pytest.mark.parametrize(
    "read",
    [
        {"reference": "catfr"},
        {"references": ["a cat", "cat"]},
        {"reference": "x", "responses": ["cat", "a cat sat"]},
        {"instruction": "Translate the cat into French.", "reference": "x"},
    ],
)
def test_b1_a_text_of_references_and_responses_or_one_within_a_sentence_makes_no_column_redundant(
    prepare: Prepare, json_lines: JsonLines, read: dict[str, Any]
) -> None:
    row = {"instruction": "Translate the word into French.", "passage": "cat", **read}
    with raises_naming(RecordError, "column 'passage'", "--columns input=passage"):
        prepare(json_lines(row), **WHOLE)


@pytest.mark.parametrize(
    "name",
    [
        *("Input", "INPUT", "inputs", "Inputs", "contexts", "Context", "passage", "document", "Documents", "article"),
        *("paragraph", "Paragraphs", "PASSAGES"),
    ],
)
def test_b1_a_column_matters_whatever_the_case_and_number_of_its_name(
    prepare: Prepare, json_lines: JsonLines, name: str
) -> None:
    path = json_lines({"instruction": "Translate.", name: "cat", "reference": "chat"})
    remedies = (f"--columns input={name}", f"--ignore-columns {name}")
    with raises_naming(RecordError, f"{path}:1: ", f"column '{name}'", *remedies):
        prepare(path, **WHOLE)
    assert prepare(path, columns=(f"input={name}",), **WHOLE)[1][0].instruction == "Translate.\n\ncat"


@pytest.mark.parametrize("name", ["System", "system-prompt", "System Prompt", "Messages", "REJECTED", "contexts"])
def test_b1_the_other_columns_that_matter_do_so_in_any_spelling(
    prepare: Prepare, json_lines: JsonLines, name: str
) -> None:
    row = {"instruction": "Say.", name: ["one", "two"], "reference": "x"}
    with raises_naming(RecordError, f"column '{name}'", f"--ignore-columns {name}") as error:
        prepare(json_lines(row), **WHOLE)
    assert "--columns input=" not in str(error.value), "an input is one text"


def test_b1_a_preference_that_is_read_under_another_name_is_only_named(
    prepare: Prepare, json_lines: JsonLines, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"instruction": "Hi", "chosen": "Hello", "rejected": "Go", "reference": "Hello", "responses": ["Go"]}
    with caplog.at_level(logging.WARNING):
        prepare(json_lines(row), **WHOLE)
    assert "not read: 'chosen, rejected'" in caplog.text
    for other in ({"rejected": "G"}, {"inputs": [5, 7]}, {"context": 5}):
        with raises_naming(RecordError, f"column '{next(iter(other))}'", "--ignore-columns"):
            prepare(json_lines({**row, **other}), **WHOLE)


@pytest.mark.parametrize("name", ["text", "question", "query"])
def test_b1_a_column_that_may_be_the_prompt_by_another_name_is_named_once(
    prepare: Prepare, json_lines: JsonLines, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    rows = [{"instruction": f"Say {number}.", name: "abc", "reference": "x"} for number in range(5)]
    with caplog.at_level(logging.WARNING):
        prepare(json_lines(*rows), **WHOLE)
    assert [record.getMessage() for record in caplog.records if f"not read: '{name}'" in record.getMessage()]
    assert len(caplog.records) == 1


def test_b1_the_columns_that_are_not_read_are_named_where_instructions_are_too_few(
    prepare: Prepare, json_lines: JsonLines
) -> None:
    path = json_lines(*({"instruction": "Sort.", "text": f"b {n} a", "reference": "x"} for n in range(9)))
    remedies = ("--columns FIELD=COLUMN", "at least 3", "--test 0", "--validation 0")
    with raises_naming(ConfigError, f"{path}: ", "1 group(s)", "not read: 'text'", *remedies):
        prepare(path)


def test_b1_the_index_column_of_pandas_is_shown_as_one_without_a_name(
    prepare: Prepare, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "in.csv"
    path.write_text(",instruction,reference\n" + "".join(f"{n},Say {n}.,{n}\n" for n in range(5)))
    with caplog.at_level(logging.WARNING):
        prepare(path, **WHOLE)
    assert "not read: '(no name)'; " in caplog.text
    with raises_naming(RecordError, "no column 'q'", "'(no name), instruction, reference'"):
        prepare(path, columns=("instruction=q",), **WHOLE)
    path.write_text(",prompt,reference\n0,Say.,x\n")
    with raises_naming(RecordError, "'(no name), prompt, reference'"):
        prepare(path, **WHOLE)
    path.write_text(",,instruction,reference\n0,0,Say.,x\n")
    with raises_naming(RecordError, "'(no name)'", "twice"):
        prepare(path, **WHOLE)


def test_b1_other_columns_and_fields_of_candidates_are_named_once(
    prepare: Prepare, json_lines: JsonLines, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"reference": "x", "topic": "t", "url": "u", "empty": None, "candidates": [{"text": "x", "human": 5}]}
    path = json_lines(*({"instruction": f"say {number}", **row} for number in range(30)))
    with caplog.at_level(logging.WARNING):
        manifest, _ = prepare(path)
    columns, fields = (record.getMessage() for record in caplog.records)
    assert_names(columns, str(path), "columns", "not read: 'topic, url'", "--columns", "--ignore-columns")
    assert_names(fields, str(path), "candidate fields", "not read: 'human'")
    assert manifest.facts["unused"] == {"columns": ["topic", "url"], "candidate_fields": ["human"]}
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        manifest, _ = prepare(path, ignore_columns=("topic", "url"))
    assert len([record for record in caplog.records if record.name == "cappy.preparation"]) == 1
    assert manifest.facts["unused"] == {"candidate_fields": ["human"]}


def test_b1_a_column_to_ignore_must_be_there_and_not_be_read(prepare: Prepare, json_lines: JsonLines) -> None:
    path = json_lines({"instruction": "a", "reference": "b"})
    with raises_naming(ConfigError, "--ignore-columns contxt", "no row"):
        prepare(path, ignore_columns=("contxt",), **WHOLE)
    with raises_naming(ConfigError, "--columns", "--ignore-columns", " b,"):
        build(
            PreparationConfig,
            {"source": "x", "target": "t", "columns": ["instruction=b"], "ignore_columns": ["b"]},
        )


def test_b5_a_label_of_another_meaning_is_not_read_where_columns_are_mapped(
    prepare: Prepare, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "sst.csv"
    path.write_text("text,label,label_text\nfine film,1,positive\ndull film,0,negative\n")
    with caplog.at_level(logging.WARNING):
        _, result = prepare(path, columns=("instruction=text", "reference=label_text"), **WHOLE)
    assert [(one.instruction, one.references, one.candidates) for one in result] == [
        ("fine film", ("positive",), ()),
        ("dull film", ("negative",), ()),
    ]
    assert "not read: 'label'" in caplog.text


@pytest.mark.parametrize(
    "own",
    [
        {"choices": {"text": ["a", "b"], "label": ["A", "B"]}},
        {"label": 3},
        {"labels": ["x", "y"]},
        {"split": "dev"},
        {"task": {"id": 4}},
        {"template": 3.5},
        {"original_task": "no"},
        {"id": [1]},
        {"references": 7},
    ],
    ids=lambda own: next(iter(own)),
)
def test_b5_a_column_of_a_fields_name_may_mean_something_else(
    prepare: Prepare, json_lines: JsonLines, own: dict[str, Any]
) -> None:
    path = json_lines({"q": "one", "a": "1", **own}, {"q": "two", "a": "2", **own})
    _, result = prepare(path, columns=("instruction=q", "reference=a"), **WHOLE)
    assert [(one.instruction, one.references, one.candidates) for one in result] == [
        ("one", ("1",), ()),
        ("two", ("2",), ()),
    ]


def test_b5_a_column_is_read_as_one_field_alone(prepare: Prepare, json_lines: JsonLines) -> None:
    # Dolly: the answer stands under `response`, which is not a sampled response once it is the reference.
    path = json_lines({"instruction": "Who?", "response": "Ann", "label": 9})
    (result,) = prepare(path, columns=("reference=response",), **WHOLE)[1]
    assert (result.references, result.candidates) == (("Ann",), ())


def test_b5_responses_and_what_names_a_row_are_read_where_only_prompt_and_answer_are_mapped(
    prepare: Prepare, json_lines: JsonLines
) -> None:
    row = {"q": "Who?", "a": "Ann", "responses": ["Ann", "Bob"], "labels": [1, 0], "group_id": "g", "split": "test"}
    (result,) = prepare(json_lines(row), columns=("instruction=q", "reference=a"))[1]
    assert [(one.response, one.labels["given"]) for one in result.candidates] == [("Ann", 1.0), ("Bob", 0.0)]
    assert (result.group_id, result.split) == ("g", "test")


@pytest.mark.parametrize("mapped", [("reference=a",), ("instruction=q", "reference=a")])
@pytest.mark.parametrize("labels", [["x", "y"], [3, 4], ["spam"], "spam", 7, [1], {"a": 1}])
def test_b5_labels_that_are_none_of_the_responses_are_not_read_where_columns_are_mapped(
    prepare: Prepare,
    json_lines: JsonLines,
    caplog: pytest.LogCaptureFixture,
    mapped: tuple[str, ...],
    labels: Any,
) -> None:
    prompt = "q" if "instruction=q" in mapped else "instruction"
    row = {"a": "Ann", "responses": ["Ann", "Bob"], "labels": labels}
    with caplog.at_level(logging.WARNING):
        _, result = prepare(json_lines(*({prompt: f"Who {n}?", **row} for n in range(3))), columns=mapped, **WHOLE)
    assert [[(one.response, dict(one.labels)) for one in each.candidates] for each in result] == [
        [("Ann", {}), ("Bob", {})]
    ] * 3
    assert len(caplog.records) == 1
    assert "not read: 'labels'; " in caplog.text


def test_b5_labels_in_the_cells_of_a_table_go_with_its_responses(prepare: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("q,a,responses,labels\nWho?,Ann,\"['Ann', 'Bob']\",\"[1, 0]\"\n")
    (result,) = prepare(path, columns=("instruction=q", "reference=a"), **WHOLE)[1]
    assert [one.labels["given"] for one in result.candidates] == [1.0, 0.0]
    path.write_text("q,a,response,label\nWho?,Ann,Ann,1\nWho?,Ann,Bob,0\n")
    (result,) = prepare(path, columns=("instruction=q", "reference=a"), **WHOLE)[1]
    assert [one.labels["given"] for one in result.candidates] == [1.0, 0.0]


def test_b5_a_score_is_the_label_where_it_is_mapped(prepare: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "rated.jsonl"
    rows = [{"prompt": f"p{n}", "response": "r", "score": 0.5, "label": "spam"} for n in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, result = prepare(path, columns=("instruction=prompt", "label=score"), **WHOLE)
    assert [dict(one.candidates[0].labels) for one in result] == [{"given": 0.5}] * 2


def test_b1_rows_of_squad_are_read_whole(prepare: Prepare, json_lines: JsonLines) -> None:
    answers = {"text": ["Ann", "Ann", "Ann Lee"], "answer_start": [0, 0, 0]}
    path = json_lines({"question": "Who sat?", "context": "Ann Lee sat.", "answers": answers})
    columns = ("instruction=question", "input=context", "references=answers")
    (result,) = prepare(path, columns=columns, **WHOLE)[1]
    assert (result.instruction, result.references) == ("Who sat?\n\nAnn Lee sat.", ("Ann", "Ann Lee"))
