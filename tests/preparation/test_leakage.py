"""Nothing of an evaluation set is trained on: no prompt, no group, and no row under another template."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from wording import raises_naming

from cappy.errors import RecordError
from cappy.records import Instance, Manifest, write

Prepare = Callable[..., tuple[Manifest, list[Instance]]]
JsonLines = Callable[..., Path]
WORDS = [first + second + third for first in "bdfgklm" for second in ("ara", "eno", "uli") for third in "nrstvwx"]
FIRST = "Read this text and say what it is about: {} So, what is it about?"
SECOND = "{}\nTopic:"


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=30)) for _ in range(count)]


def rows(template: str, given: Sequence[str], **more: Any) -> list[dict[str, Any]]:
    return [{"instruction": template.format(text), "reference": "x", **more} for text in given]


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """An evaluation set of forty rows."""
    write(
        tmp_path / "heldout",
        [
            Instance(instance_id=str(number), instruction=row["instruction"], references=("x",), split="test")
            for number, row in enumerate(rows(FIRST, texts(40)))
        ],
    )
    return tmp_path / "heldout"


def test_a_row_of_an_evaluation_set_is_found_under_another_template(
    prepare: Prepare, json_lines: JsonLines, held_out: Path
) -> None:
    path = json_lines(*rows(SECOND, [*texts(40)[:10], *texts(40, seed=1)]))
    with raises_naming(RecordError, "of train", "the text of a row", str(held_out), "--leaked drop"):
        prepare(path, against=(held_out,), test=0, validation=0)
    manifest, found = prepare(path, against=(held_out,), leaked="drop", test=0, validation=0)
    assert (len(found), manifest.metrics["dropped_leaked"]) == (40, 10)


def test_other_rows_under_the_same_template_stay(prepare: Prepare, json_lines: JsonLines, held_out: Path) -> None:
    path = json_lines(*rows(FIRST, texts(200, seed=1)))
    assert len(prepare(path, against=(held_out,), test=0, validation=0)[1]) == 200


def test_a_short_row_is_found_by_a_group_that_is_made_of_its_content(
    prepare: Prepare, json_lines: JsonLines, tmp_path: Path
) -> None:
    group = "quiz:00112233445566aa"
    short = Instance(instance_id="a", instruction="Is it so?", references=("x",), task="quiz", group_id=group)
    write(tmp_path / "heldout", [short])
    row = {"instruction": "True?", "reference": "x", "task": "quiz", "group_id": group}
    with raises_naming(RecordError, "of train", "a group", str(tmp_path / "heldout"), "--leaked drop"):
        prepare(json_lines(row), against=(tmp_path / "heldout",), test=0, validation=0)
    number = {**row, "group_id": "1"}
    write(tmp_path / "numbered", [Instance(**{**_fields(short), "group_id": "1"})])
    assert len(prepare(json_lines(number), against=(tmp_path / "numbered",), test=0, validation=0)[1]) == 1


def _fields(instance: Instance) -> dict[str, Any]:
    return {name: getattr(instance, name) for name in ("instance_id", "instruction", "references", "task")}
