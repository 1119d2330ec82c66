"""Training sees nothing of an evaluation set, and no near-duplicate of the report where we draw the splits."""

import json
import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wording import raises_naming

from cappy.errors import RecordError
from cappy.preparation import prompted
from cappy.records import Instance, Manifest, prompt_hash, read, write
from cappy.scoring import TRAINED_ON
from cappy.scoring.training_data import count_seen, training_data, write_training_data

Prepare = Callable[..., tuple[Manifest, list[Instance]]]
JsonLines = Callable[..., Path]
DATA = Path(__file__).parents[3] / "shared" / "data"
WORDS = [first + second + third for first in "bdfgklm" for second in ("ara", "eno", "uli") for third in "nrstvwx"]
ASK = "Read this text and say what it is about: {} So, what is it about?"


def texts(count: int, seed: int = 0, length: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=length)) for _ in range(count)]


def nearly(text: str, mark: str) -> str:
    """The text with another first word."""
    return " ".join([mark, *text.split()[1:]])


def rows(given: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"id": str(number), "group_id": f"row {number}", "instruction": ASK.format(text), "reference": "x"}
        for number, text in enumerate(given)
    ]


def some_pairs() -> list[str]:
    """Forty of five hundred rows are near-duplicates of another."""
    given = texts(480)
    return [*given, *(nearly(text, "other") for text in given[:20])]


def clusters(size: int = 5) -> list[str]:
    """As questions on passages are: each row is nearly four others."""
    return [nearly(text, mark) for text in texts(80) for mark in ("one", "two", "three", "four", "five")[:size]]


def leaks(folder: Path, work: Path) -> int:
    """How many rows of the report evaluation finds in a scorer that was trained on the rest."""
    work.mkdir()
    instances = list(read(folder))
    prompts = {prompt_hash(one.instruction) for one in instances if one.split != "test"}
    np.array(sorted(prompts), dtype="<u8").tofile(work / TRAINED_ON)
    write_training_data(work, folder)
    return count_seen([one for one in instances if one.split == "test"], training_data(work))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("given", [some_pairs, clusters, lambda: texts(200), lambda: clusters(2)])
def test_no_row_of_the_report_was_trained_on_whatever_the_file(
    prepare: Prepare, json_lines: JsonLines, tmp_path: Path, given: Callable[[], list[str]], seed: int
) -> None:
    _, result = prepare(json_lines(*rows(given())), seed=seed, target=tmp_path / "target")
    assert {one.split for one in result} == {"train", "validation", "test"}
    assert leaks(tmp_path / "target", tmp_path / "scorer") == 0


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not beside the project")
@pytest.mark.parametrize("name", ["candidates/sfhot", "bigbench/operators", "bigbench/linguistics_puzzles"])
def test_no_row_of_the_report_of_a_real_file_was_trained_on(prepare: Prepare, tmp_path: Path, name: str) -> None:
    manifest, _ = prepare(DATA / f"{name}.jsonl.gz", target=tmp_path / "target")
    assert manifest.metrics["dropped_near_held_out"] > 0
    assert leaks(tmp_path / "target", tmp_path / "scorer") == 0


def test_few_near_duplicates_move_no_row_to_another_split_and_are_counted_and_said_once(
    prepare: Prepare, json_lines: JsonLines, caplog: pytest.LogCaptureFixture
) -> None:
    # Splits go by the groups: with the same groups and other texts they are the same.
    _, apart = prepare(json_lines(*rows(texts(500, seed=1)), name="apart.jsonl"))
    with caplog.at_level(logging.WARNING):
        manifest, result = prepare(json_lines(*rows(some_pairs())))
    before, after = ({one.instance_id: one.split for one in result} for result in (apart, result))
    left_out = before.keys() - after.keys()
    assert after.items() <= before.items()
    assert left_out
    assert "test" not in {before[name] for name in left_out}
    # Of each pair that was cut one row goes, and the other is held out further.
    pairs = [(str(number), str(480 + number)) for number in range(20)]
    assert len(left_out) == sum(before[first] != before[second] for first, second in pairs)
    assert manifest.metrics["dropped_near_held_out"] == len(left_out) == 500 - manifest.rows
    assert [record.message.partition(": ")[2] for record in caplog.records if "near-duplicates" in record.message] == [
        manifest.facts["notes"]["near_held_out"]
    ]


def test_where_most_would_be_left_out_near_duplicates_are_kept_in_one_split(
    prepare: Prepare, json_lines: JsonLines
) -> None:
    manifest, result = prepare(json_lines(*rows(clusters())))
    split_of = {int(one.instance_id): one.split for one in result}
    assert len({split_of[number] for number in (0, 1, 2, 3, 4)}) == 1
    assert manifest.rows > 0.95 * 400
    assert "merged into groups" in manifest.facts["notes"]["near_duplicates"]


def test_shards_leave_out_what_the_whole_leaves_out(prepare: Prepare, json_lines: JsonLines, tmp_path: Path) -> None:
    path = json_lines(*rows(some_pairs()))
    whole, result = prepare(path)
    shards = [prepare(path, shard=f"{n}/3", target=tmp_path / f"shards/{n}") for n in range(3)]
    assert [one for _, part in shards for one in part] == result
    dropped = sum(manifest.metrics.get("dropped_near_held_out", 0) for manifest, _ in shards)
    assert dropped == whole.metrics["dropped_near_held_out"]


def test_splits_that_the_rows_give_stay_as_they_are(prepare: Prepare, json_lines: JsonLines) -> None:
    given = [{**row, "split": "test" if number >= 480 else "train"} for number, row in enumerate(rows(some_pairs()))]
    assert prepare(json_lines(*given))[0].rows == 500


def test_a_task_of_bigbench_leaves_near_duplicates_out(prepare: Prepare, tmp_path: Path) -> None:
    task = {"name": "t", "examples": [{"input": text, "target": "x"} for text in some_pairs()]}
    (tmp_path / "task.json").write_text(json.dumps(task))
    manifest, result = prepare(tmp_path / "task.json", target=tmp_path / "target")
    assert manifest.metrics["dropped_near_held_out"] == 500 - len(result) > 0
    assert leaks(tmp_path / "target", tmp_path / "scorer") == 0


TEMPLATES = """
dataset: topics
templates:
  1: !Template
    jinja: "Read this text and say what it is about: {{text}} So, what is it about? ||| {{label}}"
    name: first
    metadata: !TemplateMetadata {original_task: true}
  2: !Template
    jinja: "{{text}}\\nTopic: ||| {{label}}"
    name: second
    metadata: !TemplateMetadata {original_task: true}
"""


@pytest.fixture
def templates(tmp_path: Path) -> Path:
    (tmp_path / "templates/topics").mkdir(parents=True)
    (tmp_path / "templates/topics/templates.yaml").write_text(TEMPLATES)
    return tmp_path / "templates"


def test_a_row_under_templates_is_left_out_under_each_of_them(
    prepare: Prepare, json_lines: JsonLines, templates: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = json_lines(*({"text": text, "label": "x"} for text in some_pairs()))
    known = {"templates": templates, "dataset": "topics"}
    with caplog.at_level(logging.WARNING):
        manifest, result = prepare(path, target=tmp_path / "target", **known)
    assert manifest.metrics["dropped_near_held_out"] == 1_000 - len(result) > 0
    assert sum("near-duplicates" in record.message for record in caplog.records) == 1
    assert manifest.facts["notes"]["near_held_out"] in caplog.text
    assert leaks(tmp_path / "target", tmp_path / "scorer") == 0
    shards = [one for n in range(3) for one in prepare(path, shard=f"{n}/3", **known)[1]]
    assert {one.instance_id for one in shards} == {one.instance_id for one in result}


def cut_and_changed(seed: int) -> list[str]:
    """Rows of which many are nearly another, or a part of it."""
    rng = random.Random(seed)
    given = texts(150, seed)
    for _ in range(60):
        words = rng.choice(given).split()
        for _ in range(rng.randint(0, 3)):
            words[rng.randrange(len(words))] = rng.choice(WORDS)
        given.append(" ".join(words[: rng.randint(15, 40)]))
    return rng.sample(given, len(given))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("under_templates", [False, True])
def test_no_row_of_the_report_is_a_part_of_a_trained_one_or_nearly_so(
    prepare: Prepare, json_lines: JsonLines, templates: Path, tmp_path: Path, seed: int, under_templates: bool
) -> None:
    given = cut_and_changed(seed)
    if under_templates:
        path = json_lines(*({"text": text, "label": "x"} for text in given))
        prepare(path, seed=seed, target=tmp_path / "target", templates=templates, dataset="topics")
    else:
        prepare(json_lines(*rows(given)), seed=seed, target=tmp_path / "target")
    assert leaks(tmp_path / "target", tmp_path / "scorer") == 0


def test_rows_beyond_those_that_are_looked_at_are_held_against_the_held_out_ones(
    prepare: Prepare, json_lines: JsonLines, templates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompted, "MAX_ROWS", 50)
    path = json_lines(*({"text": text, "label": "x"} for text in some_pairs()))
    manifest, result = prepare(path, target=tmp_path / "target", templates=templates, dataset="topics")
    assert 0 < manifest.metrics["dropped_near_held_out"] == 1_000 - len(result) < 100
    assert leaks(tmp_path / "target", tmp_path / "scorer") == 0


@pytest.mark.parametrize("count", [3, 5, 12, 40])
def test_long_templates_over_short_rows_make_no_near_duplicates(
    prepare: Prepare, json_lines: JsonLines, templates: Path, count: int
) -> None:
    path = json_lines(*({"text": f"word{number}", "label": "x"} for number in range(count)))
    manifest, result = prepare(path, templates=templates, dataset="topics", seed=2)
    assert len(result) == 2 * count, manifest.metrics
    assert len(prepare(json_lines(*rows([f"word{number}" for number in range(count)])))[1]) == count


@pytest.mark.parametrize("count", [4, 9, 60])
def test_a_file_of_near_duplicates_alone_is_one_template_and_loses_nothing(
    prepare: Prepare, json_lines: JsonLines, tmp_path: Path, count: int
) -> None:
    path = json_lines(*rows([nearly(texts(1)[0], f"mark{number}") for number in range(count)]))
    assert len(prepare(path, target=tmp_path / "target")[1]) == count
    assert leaks(tmp_path / "target", tmp_path / "scorer") == 0


def test_nothing_left_to_train_on_is_refused(prepare: Prepare, json_lines: JsonLines) -> None:
    path = json_lines(*rows([nearly(texts(1)[0], mark) for mark in ("one", "two")]))
    with raises_naming(RecordError, str(path), "no training instances", "1 were dropped", "held-out rows"):
        prepare(path, validation=0)


FIRST = "Read this text and say what it is about: {} So, what is it about?"
SECOND = "{}\nTopic:"


def rows_under(template: str, given: Sequence[str], **more: Any) -> list[dict[str, Any]]:
    return [{"instruction": template.format(text), "reference": "x", **more} for text in given]


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """An evaluation set of forty rows."""
    write(
        tmp_path / "heldout",
        [
            Instance(instance_id=str(number), instruction=row["instruction"], references=("x",), split="test")
            for number, row in enumerate(rows_under(FIRST, texts(40, length=30)))
        ],
    )
    return tmp_path / "heldout"


def test_a_row_of_an_evaluation_set_is_detected_under_another_template(
    prepare: Prepare, json_lines: JsonLines, held_out: Path
) -> None:
    path = json_lines(*rows_under(SECOND, [*texts(40, length=30)[:10], *texts(40, seed=1, length=30)]))
    with raises_naming(RecordError, "of split train", "the text of a row", str(held_out), "--leaked drop"):
        prepare(path, against=(held_out,), test=0, validation=0)
    manifest, result = prepare(path, against=(held_out,), leaked="drop", test=0, validation=0)
    assert (len(result), manifest.metrics["dropped_leaked"]) == (40, 10)


def test_other_rows_under_the_same_template_stay(prepare: Prepare, json_lines: JsonLines, held_out: Path) -> None:
    path = json_lines(*rows_under(FIRST, texts(200, seed=1, length=30)))
    assert len(prepare(path, against=(held_out,), test=0, validation=0)[1]) == 200


def test_a_short_row_is_detected_by_a_group_that_is_made_of_its_content(
    prepare: Prepare, json_lines: JsonLines, tmp_path: Path
) -> None:
    group = "quiz:00112233445566aa"
    short = Instance(instance_id="a", instruction="Is it so?", references=("x",), task="quiz", group_id=group)
    write(tmp_path / "heldout", [short])
    row = {"instruction": "True?", "reference": "x", "task": "quiz", "group_id": group}
    with raises_naming(RecordError, "of split train", "a group", str(tmp_path / "heldout"), "--leaked drop"):
        prepare(json_lines(row), against=(tmp_path / "heldout",), test=0, validation=0)
    number = {**row, "group_id": "1"}
    write(tmp_path / "numbered", [Instance(**{**_fields(short), "group_id": "1"})])
    assert len(prepare(json_lines(number), against=(tmp_path / "numbered",), test=0, validation=0)[1]) == 1


def _fields(instance: Instance) -> dict[str, Any]:
    return {name: getattr(instance, name) for name in ("instance_id", "instruction", "references", "task")}
