"""Every setting is heeded by a source or refused by it: a table of all kinds and all settings (B8)."""

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from wording import assert_names, raises_naming

from cappy.config import build
from cappy.errors import CappyError, ConfigError, RecordError
from cappy.preparation import sources
from cappy.preparation.config import COMMON_SETTINGS, KIND_NAMES, KINDS_BY_SETTING
from cappy.preparation.step import PreparationConfig, run
from cappy.records import Candidate, Instance, Manifest, read, write

Prepare = Callable[..., tuple[Manifest, list[Instance]]]
SYSTEMS = [{"system": name, "text": name} for name in ("primary/x", "all/y")]
ROWS = [{"instruction": f"say {n}", "references": ["x"], "candidates": SYSTEMS} for n in range(12)]
UNLABELLED = [{"instruction": f"say {n}", "candidates": SYSTEMS} for n in range(12)]
TEMPLATE = """dataset: quiz
templates:
  a: !Template
    answer_choices: null
    id: a
    jinja: 'Say {{instruction}} ||| x'
    metadata: !TemplateMetadata
      original_task: true
    name: say
    reference: ''
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """source(kind, rows): the settings that name a source of the kind, with these rows where it has rows."""

    def made(kind: str, rows: list[dict[str, Any]] = ROWS) -> dict[str, Any]:
        def read_hub(dataset: Any, commit: str, split: str) -> Iterator[tuple[str, Any]]:
            if split not in ("train", "test"):
                raise ConfigError(f"no split {split}")
            return ((f"row {n}", row) for n, row in enumerate(rows))

        folder = tmp_path / f"source{len(list(tmp_path.glob('source*')))}"
        folder.mkdir()
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if kind == "hub":
            monkeypatch.setattr(sources, "read_hub", read_hub)
            monkeypatch.setattr(sources, "resolve_commit", lambda dataset: "0" * 40)
            return {"source": "hub:org/quiz"}
        if kind == "tables":
            table = pa.Table.from_pylist(rows)
            pq.write_table(table, folder / "train-00000-of-00001.parquet")
            pq.write_table(table, folder / "test-00000-of-00001.parquet")
            return {"source": str(folder)}
        if kind == "records":
            candidates = tuple(Candidate(response=one["text"], generator=one["system"]) for one in SYSTEMS)
            write(folder / "r", [Instance(instance_id=str(n), instruction=f"say {n}", references=("x",),
                                          candidates=candidates) for n in range(12)])  # fmt: skip
            return {"source": str(folder / "r")}
        if kind == "bigbench":
            examples = [{"input": f"say {n}", "target": "x"} for n in range(40)]
            (folder / "quiz.json").write_text(json.dumps({"examples": examples}))
            return {"source": str(folder / "quiz.json")}
        if kind == "mixture":
            (folder / "tense.train.jsonl").write_text("".join(
                json.dumps({"inputs": f"Q {n}", "targets": ["x"], "multiple_choice_targets": []}) + "\n"
                for n in range(12)))  # fmt: skip
            (folder / "tense.validation.jsonl").write_text((folder / "tense.train.jsonl").read_text().replace("Q", "V"))
            return {"mixture": "bigbench45", "subsets": ("tense",), "local": folder}
        if kind == "builtin":
            return {"source": "builtin"}
        (folder / "rows.jsonl").write_text(text)
        if kind == "templates":
            (folder / "templates" / "quiz").mkdir(parents=True)
            (folder / "templates" / "quiz" / "templates.yaml").write_text(TEMPLATE)
            return {"source": str(folder / "rows.jsonl"), "templates": folder / "templates", "dataset": "quiz"}
        return {"source": str(folder / "rows.jsonl")}

    return made


GIVEN: dict[str, Any] = {
    "task": "other",
    "num_per_family": 3,
    "families": ("copy",),
    "pool": "pretraining",
    "columns": ("instruction=instruction",),
    "ignore_columns": ("references",),
    "group_responses": "always",
    "exclude": ("primary/*",),
    "unlabelled": True,
    "split": "test",
    "templates": Path("templates"),
    "dataset": "quiz",
    "template": ("say",),
    "max_failed": 0.5,
    "missing": "fail",
    "mixture": "bigbench45",
    "subsets": ("tense",),
    "local": Path("local"),
    "max_characters": 3,
}


def test_b8_every_setting_of_the_step_stands_in_the_table() -> None:
    names = {field.name for field in dataclasses.fields(PreparationConfig)}
    assert names == COMMON_SETTINGS | KINDS_BY_SETTING.keys()
    assert KINDS_BY_SETTING.keys() == GIVEN.keys()
    assert {kind for kinds in KINDS_BY_SETTING.values() for kind in kinds} == set(KIND_NAMES)


REFUSED_SETTINGS = [
    (kind, name)
    for name, kinds in KINDS_BY_SETTING.items()
    for kind in KIND_NAMES
    # Templates and a mixture make another kind of source of it.
    if kind not in kinds and name not in ("templates", "mixture")
]


@pytest.mark.parametrize(("kind", "name"), REFUSED_SETTINGS)
def test_b8_a_setting_that_a_source_does_not_heed_is_refused(
    source: Callable[..., dict[str, Any]], tmp_path: Path, kind: str, name: str
) -> None:
    values = {**source(kind), name: GIVEN[name], "target": tmp_path / "target", "work": tmp_path / "work"}
    with pytest.raises(CappyError) as error:
        run(build(PreparationConfig, values))
    assert f"--{name.replace('_', '-')} " in str(error.value)
    assert any(remedy in str(error.value) for remedy in ("leave it out", "leave one of them out", "give --mixture"))
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("kind", ["file", "tables", "hub", "records"])
def test_b8_excluded_systems_do_not_get_in_whatever_the_source(
    prepare: Prepare, source: Callable[..., dict[str, Any]], kind: str
) -> None:
    _, result = prepare(**source(kind), exclude=("primary/*",))
    assert len(result) == 12
    assert Counter(one.generator for instance in result for one in instance.candidates) == {"all/y": 12}


@pytest.mark.parametrize("kind", ["file", "tables", "hub", "records"])
def test_b8_a_pattern_that_excludes_nothing_is_named(
    prepare: Prepare, source: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    with caplog.at_level(logging.WARNING):
        prepare(**source(kind), exclude=("primary/*", "primry/*"))
    assert_names(caplog.text, "--exclude primry/*", "'all/y, primary/x'")


@pytest.mark.parametrize("kind", ["file", "tables", "hub"])
def test_b8_rows_to_be_scored_need_responses_and_no_reference_whatever_the_source(
    prepare: Prepare, source: Callable[..., dict[str, Any]], kind: str
) -> None:
    settings = {"unlabelled": True, "test": 0, "validation": 0}
    assert len(prepare(**source(kind, UNLABELLED), **settings)[1]) == 12
    with pytest.raises(RecordError, match="has no reference"):
        prepare(**source(kind, UNLABELLED))
    bare = [{"instruction": "say", "reference": "x"}]
    with pytest.raises(RecordError, match="has no responses"):
        prepare(**source(kind, bare), **settings)


def test_b8_records_to_be_scored_need_responses(prepare: Prepare, tmp_path: Path) -> None:
    write(tmp_path / "records", [Instance(instance_id="a", instruction="say", references=("x",))])
    with raises_naming(RecordError, str(tmp_path / "records"), "no responses", "leave --unlabelled out"):
        prepare(tmp_path / "records", unlabelled=True, test=0, validation=0)


@pytest.mark.parametrize("kind", ["file", "tables", "hub", "bigbench", "records"])
def test_b8_the_name_of_the_task_is_the_flags(
    prepare: Prepare, source: Callable[..., dict[str, Any]], kind: str
) -> None:
    assert {one.task for one in prepare(**source(kind), task="other")[1]} == {"other"}


@pytest.mark.parametrize("kind", ["file", "tables", "hub", "bigbench"])
def test_b8_the_longest_text_is_the_flags(prepare: Prepare, source: Callable[..., dict[str, Any]], kind: str) -> None:
    with pytest.raises(RecordError, match="the limit is 3"):
        prepare(**source(kind), max_characters=3)


@pytest.mark.parametrize("kind", ["file", "tables", "hub"])
def test_b8_columns_are_mapped_ignored_and_grouped_whatever_the_source(
    prepare: Prepare, source: Callable[..., dict[str, Any]], kind: str
) -> None:
    rows = [{"q": f"say {n // 2}", "a": "x", "context": "c", "response": str(n)} for n in range(12)]
    columns = ("instruction=q", "reference=a")
    assert len(prepare(**source(kind, rows), columns=columns, ignore_columns=("context",))[1]) == 6
    with raises_naming(RecordError, "'context'", "--columns", "--ignore-columns"):
        prepare(**source(kind, rows), columns=columns)


@pytest.mark.parametrize("kind", ["builtin", "records"])
@pytest.mark.parametrize("name", ["test", "validation"])
def test_b8_shares_are_refused_where_splits_stand(
    prepare: Prepare, source: Callable[..., dict[str, Any]], kind: str, name: str
) -> None:
    with raises_naming(ConfigError, f"--{name} does not apply to", "splits are fixed", "leave it out"):
        prepare(**source(kind), **{name: 0.4})


def test_b8_shares_are_named_where_the_rows_bring_their_splits(
    prepare: Prepare, json_lines: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = json_lines(*({"instruction": f"say {n}", "reference": "x", "split": "train"} for n in range(4)))
    with caplog.at_level(logging.WARNING):
        prepare(path, test=0.5)
    assert_names(caplog.text, str(path), "splits", "--test", "--validation")


def test_b8_a_task_that_names_nothing_is_named(
    prepare: Prepare, json_lines: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = json_lines(*({"instruction": f"say {n}", "reference": "x", "task": "own"} for n in range(4)))
    with caplog.at_level(logging.WARNING):
        assert {one.task for one in prepare(path, task="other")[1]} == {"own"}
    assert_names(caplog.text, str(path), "every row", "--task other")


def test_b8_templates_are_refused_by_a_mixture_of_prompts(
    prepare: Prepare, source: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with raises_naming(ConfigError, "--templates does not apply to", "bigbench45"):
        prepare("builtin", **source("mixture"), templates=tmp_path)


def test_b8_what_to_do_with_leaks_needs_what_they_are_leaks_of(tmp_path: Path) -> None:
    with raises_naming(ConfigError, "--leaked", "--against"):
        build(PreparationConfig, {"source": "x", "target": tmp_path, "leaked": "drop"})


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_b8_what_is_heeded_without_more_runs(
    prepare: Prepare, source: Callable[..., dict[str, Any]], kind: str
) -> None:
    values = source(kind)
    values = {"source": "builtin", **values} if kind == "mixture" else values
    manifest, result = prepare(**values, part_rows=5)
    assert result
    assert manifest.rows == len(result)
    assert list(read(values["source"])) == result if kind == "records" else True
