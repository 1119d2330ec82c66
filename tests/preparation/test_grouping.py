"""One response per row, several rows per prompt: one instance of them all (B4)."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from wording import assert_names, raises_naming

from cappy.errors import RecordError
from cappy.preparation import sources
from cappy.records import Instance, Manifest

Prepare = Callable[..., tuple[Manifest, list[Instance]]]
JsonLines = Callable[..., Path]
WHOLE = {"test": 0, "validation": 0}
MODELS = ("gpt", "llama", "opt")


def rated(*, by_model: bool) -> list[dict[str, Any]]:
    rows = [
        {"prompt": f"Say {number}.", "response": f"{model} {number}", "score": index / 2}
        for number in range(20)
        for index, model in enumerate(MODELS)
    ]
    return sorted(rows, key=lambda row: row["score"]) if by_model else rows


COLUMNS = ("instruction=prompt", "label=score")


@pytest.mark.parametrize("by_model", [False, True])
def test_b4_rows_of_one_prompt_are_one_instance_and_it_is_said_once(
    prepare: Prepare, json_lines: JsonLines, caplog: pytest.LogCaptureFixture, by_model: bool
) -> None:
    path = json_lines(*rated(by_model=by_model))
    with caplog.at_level(logging.WARNING):
        manifest, result = prepare(path, columns=COLUMNS)
    expected = {f"Say {n}.": [(f"{model} {n}", i / 2) for i, model in enumerate(MODELS)] for n in range(20)}
    assert {
        one.instruction: [(each.response, each.labels["given"]) for each in one.candidates] for one in result
    } == expected
    assert len(result) == len({one.instance_id for one in result}) == 20
    (line,) = [record.getMessage() for record in caplog.records]
    assert_names(line, str(path), "60 rows into 20 instances", "--group-responses never")
    assert manifest.facts["notes"] == {"grouped": line.removeprefix(f"{path}: ")}
    assert manifest.metrics["candidates"] == 60


def test_b4_never_keeps_rows_apart(prepare: Prepare, json_lines: JsonLines) -> None:
    path = json_lines(*rated(by_model=False))
    assert len(prepare(path, columns=COLUMNS, group_responses="never")[1]) == 60


def test_b4_row_numbers_as_ids_and_groups_do_not_keep_rows_of_a_prompt_apart(
    prepare: Prepare, json_lines: JsonLines
) -> None:
    rows = [{**row, "id": number, "group_id": number} for number, row in enumerate(rated(by_model=False))]
    assert len(prepare(json_lines(*rows), columns=COLUMNS)[1]) == 20


def test_b4_rows_of_another_reference_or_split_are_other_instances(prepare: Prepare, json_lines: JsonLines) -> None:
    rows = [{"instruction": "Sum up.", "reference": text, "response": "x"} for text in ("a", "b", "a", "c")]
    _, result = prepare(json_lines(*rows), **WHOLE)
    assert sorted((one.references, len(one.candidates)) for one in result) == [(("a",), 2), (("b",), 1), (("c",), 1)]


def test_b4_rows_with_several_responses_are_joined_only_where_asked(prepare: Prepare, json_lines: JsonLines) -> None:
    rows = [{"instruction": "Say.", "reference": "a", "responses": ["x", str(number)]} for number in range(3)]
    path = json_lines(*rows)
    assert len(prepare(path, **WHOLE)[1]) == 3
    (result,) = prepare(path, group_responses="always", **WHOLE)[1]
    assert [one.response for one in result.candidates] == ["x", "0", "x", "1", "x", "2"]


def test_b4_rows_without_responses_stay_as_they_are(prepare: Prepare, json_lines: JsonLines) -> None:
    path = json_lines(*({"instruction": "Say.", "reference": "a"} for _ in range(4)))
    assert len(prepare(path, **WHOLE)[1]) == 4


def test_b4_shards_hold_together_what_one_run_holds(prepare: Prepare, json_lines: JsonLines) -> None:
    path = json_lines(*rated(by_model=True))
    whole = prepare(path, columns=COLUMNS)[1]
    parts = [one for index in range(3) for one in prepare(path, columns=COLUMNS, shard=f"{index}/3")[1]]
    assert parts == whole


def test_b4_rows_that_stand_too_far_apart_are_refused(
    prepare: Prepare, json_lines: JsonLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_PENDING_CHARACTERS", 100)
    assert len(prepare(json_lines(*rated(by_model=False)), columns=COLUMNS)[1]) == 20
    with raises_naming(RecordError, "far.jsonl", "far apart", "sort"):
        prepare(json_lines(*rated(by_model=True), name="far.jsonl"), columns=COLUMNS)
