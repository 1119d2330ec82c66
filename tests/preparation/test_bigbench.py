"""BIG-bench tasks: the benchmark's prompts, a fifth held out, from its JSON and from rows as the hub has them."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wording import raises_naming

from cappy.errors import FolderError, RecordError
from cappy.preparation.bigbench import MAX_EXAMPLES, BigBenchTask, HeldOutShares, split_rows
from cappy.records import Instance, Manifest

Prepare = Callable[..., tuple[Manifest, list[Instance]]]


def task(path: Path, examples: list[dict[str, Any]], **fields: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"canary": "c", "name": path.parent.name, **fields, "examples": examples}))
    return path


def sums(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"input": f"{n} + 0", "target": str(n)} for n in range(first, first + count)]


def test_a_prompt_is_the_zero_shot_one_of_the_benchmark(prepare: Prepare, tmp_path: Path) -> None:
    examples: list[dict[str, Any]] = [
        {"input": "She runs.", "target": ["She ran.", "She had run."], "comment": "two answers"},
        {"input": "Is it?", "target_scores": {"yes": 1, "no": 0}},
        {"input": "Both?", "target_scores": {"b": 1, "a": 1, "c": 0}},
    ]
    path = task(tmp_path / "tense/task.json", examples, task_prefix="Do this.\n")
    _, result = prepare(path)
    by_input = {text.instruction.split("\nQ: ")[1].split("\n")[0]: text for text in result}
    first = by_input["She runs."]
    assert (first.instruction, first.references) == ("Do this.\n\nQ: She runs.\nA: ", ("She ran.", "She had run."))
    asked = by_input["Is it?"]
    assert asked.instruction in {
        f"Do this.\n\nQ: Is it?\n  choice: {one}\n  choice: {two}\nA: " for one, two in (("yes", "no"), ("no", "yes"))
    }
    assert (asked.references, set(asked.choices)) == (("yes",), {"yes", "no"})
    assert [candidate.response for candidate in asked.candidates] == list(asked.choices)
    assert set(by_input["Both?"].references) == {"a", "b"}
    assert {instance.task for instance in result} == {"tense"}


def test_prefixes_and_choices_in_the_prompt_are_the_tasks_own(prepare: Prepare, tmp_path: Path) -> None:
    examples = [{"input": f"op {n}", "target_scores": {"1": 1, "2": 0}} for n in range(2)]
    path = task(
        tmp_path / "op/task.json",
        examples,
        example_input_prefix="\n",
        example_output_prefix=" = ",
        append_choices_to_input=False,
    )
    assert {instance.instruction for instance in prepare(path)[1]} == {"\nop 0 = ", "\nop 1 = "}


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (16, 15), (34, 16), (85, 17), (328, 65), (1000, 200)])
def test_a_fifth_is_held_out_and_at_least_sixteen(prepare: Prepare, tmp_path: Path, count: int, held_out: int) -> None:
    # 34, 85 and 328 are auto_debugging, codenames and auto_categorization, whose published splits have these sizes.
    path = task(tmp_path / "t/task.json", sums(count))
    splits = Counter(instance.split for instance in prepare(path, validation=0)[1])
    assert splits == {"test": held_out, "train": count - held_out}


def test_subtasks_share_the_sixteen_and_validation_comes_out_of_train(prepare: Prepare, tmp_path: Path) -> None:
    for number in range(4):
        task(tmp_path / f"all/whole/sub{number}/task.json", sums(18, first=100 * number))
    task(tmp_path / "all/other/task.json", sums(18, first=1000))
    _, result = prepare(tmp_path / "all", validation=0.25)
    splits = Counter((instance.task, instance.split) for instance in result)
    assert {splits[f"sub{number}", "test"] for number in range(4)} == {4}
    assert splits["other", "test"] == 16
    assert splits["sub0", "validation"] == 3
    assert splits["other", "validation"] == 1


def test_a_prompt_stands_once_whatever_its_case_and_task(prepare: Prepare, tmp_path: Path) -> None:
    twice = [{"input": text, "target": "x"} for text in ("Same", "same ", "other", "more")]
    task(tmp_path / "all/one/task.json", twice)
    task(tmp_path / "all/two/task.json", [*twice, {"input": "new", "target": "y"}, {"input": "newer", "target": "y"}])
    _, result = prepare(tmp_path / "all", validation=0)
    assert Counter(instance.task for instance in result) == {"one": 3, "two": 2}


@given(st.integers(1, 60), st.floats(0, 0.5), st.integers(0, 3))
def test_every_row_has_one_split_and_the_draw_hangs_on_the_seed(count: int, validation: float, seed: int) -> None:
    rows: list[tuple[str, Any]] = [(f"w{n}", {"instruction": f"i{n}"}) for n in range(count)]
    result = list(split_rows(BigBenchTask(name="t", rows=rows), seed=seed, shares=HeldOutShares(validation=validation)))
    assert [where for where, _ in result] == [where for where, _ in rows]
    assert result == list(
        split_rows(BigBenchTask(name="t", rows=rows), seed=seed, shares=HeldOutShares(validation=validation))
    )
    splits = Counter(values["split"] for _, values in result)
    assert splits["train"] >= 1
    assert splits["test"] == min(max(16, count // 5), count - 1)


def test_a_split_keeps_at_most_fifty_thousand() -> None:
    rows: list[tuple[str, Any]] = [(str(n), {"instruction": str(n)}) for n in range(70_000)]
    splits = Counter(
        values["split"]
        for _, values in split_rows(BigBenchTask(name="t", rows=rows), seed=0, shares=HeldOutShares(validation=0))
    )
    assert splits == {"train": MAX_EXAMPLES, "test": 14_000}


def test_rows_as_the_hub_has_them_are_known_by_their_columns(prepare: Prepare, json_lines: Any) -> None:
    rows = [
        {"inputs": "Q: 1?", "targets": ["1", "one"], "multiple_choice_targets": [], "multiple_choice_scores": []},
        {
            "inputs": "Q: yes?",
            "targets": ["yes"],
            "multiple_choice_targets": ["yes", "no"],
            "multiple_choice_scores": [1, 0],
        },
    ]
    one, two = prepare(json_lines(*rows), test=0, validation=0)[1]
    assert (one.instruction, one.references, one.choices) == ("Q: 1?", ("1", "one"), ())
    assert (two.references, two.choices) == (("yes",), ("yes", "no"))


def test_rows_of_p3_are_known_by_their_columns(prepare: Prepare, json_lines: Any) -> None:
    def p3(text: str, target: str, **more: Any) -> dict[str, Any]:
        return {"inputs": [3], "targets": [4], "inputs_pretokenized": text, "targets_pretokenized": target, **more}

    rows = [
        p3("Sum up: x ", "\ny"),
        p3("Is it? ", "\nYes", answer_choices=["No", "Yes"], is_correct=True, idx=[0, 1]),
        p3("Is it? ", "\nNo", answer_choices=["No", "Yes"], is_correct=False, idx=[0, 0]),
    ]
    one, two = prepare(json_lines(*rows), test=0, validation=0)[1]
    assert (one.instruction, one.references, one.choices) == ("Sum up: x", ("y",), ())
    assert (two.instruction, two.references, two.choices) == ("Is it?", ("Yes",), ("No", "Yes"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"examples": []}', ("no examples", "got []", "JSON task of BIG-bench")),
        ('{"examples": [1]}', ("examples[0] must be an object", "got 1")),
        ('{"examples": [{"target": "x"}]}', ("examples[0]: input must be a string", "got None")),
        ('{"examples": [{"input": "x"}]}', ("examples[0]: ", "no target ", "no target_scores")),
        (
            '{"examples": [{"input": "x", "target_scores": [1]}]}',
            ("examples[0]: target_scores", "got [1]"),
        ),
        ('{"examples": [{"input": "x", "target": 5}]}', ("examples[0]: target must be a string", "got 5")),
    ],
)
def test_a_wrong_task_is_refused_with_the_example(prepare: Prepare, tmp_path: Path, text: str, parts: Any) -> None:
    path = tmp_path / "task.json"
    path.write_text(text)
    with raises_naming(RecordError, f"{path}: ", *parts):
        prepare(path)


def test_json_lines_under_the_name_json_stay_json_lines(prepare: Prepare, json_lines: Any) -> None:
    path = json_lines(
        {"instruction": "Add.", "reference": "1"}, {"instruction": "Sum.", "reference": "1"}, name="d.json"
    )
    assert len(prepare(path, test=0, validation=0)[1]) == 2


def hard(path: Path, count: int, **more: Any) -> Path:
    """A file as BIG-Bench-Hard has it: no name, no prefixes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    examples = [{"input": f"{path.stem} {number}?", "target": "(A)"} for number in range(count)]
    path.write_text(json.dumps({"canary": "c", "examples": examples, **more}))
    return path


def test_b3_a_task_without_a_name_is_called_after_its_file_or_by_the_flag(prepare: Prepare, tmp_path: Path) -> None:
    path = hard(tmp_path / "bbh/navigate.json", 40)
    assert {one.task for one in prepare(path)[1]} == {"navigate"}
    assert {one.task for one in prepare(path, task="steps")[1]} == {"steps"}
    named = task(tmp_path / "tense/task.json", sums(40))
    assert {one.task for one in prepare(named)[1]} == {"tense"}
    assert {one.task for one in prepare(named, task="other")[1]} == {"other"}
    unnamed = hard(tmp_path / "inner/task.json", 40)
    assert {one.task for one in prepare(unnamed)[1]} == {"inner"}


def test_b3_a_folder_of_json_tasks_is_read_task_by_task(prepare: Prepare, tmp_path: Path) -> None:
    for name in ("navigate", "snarks", "word_sorting"):
        hard(tmp_path / f"bbh/{name}.json", 50)
    _, result = prepare(tmp_path / "bbh", validation=0)
    splits = Counter((one.task, one.split) for one in result)
    assert splits == {
        (name, split): count
        for name in ("navigate", "snarks", "word_sorting")
        for split, count in (("test", 16), ("train", 34))
    }
    (tmp_path / "bbh/rows.json").write_text('{"instruction": "a", "reference": "b"}\n')
    with raises_naming(FolderError, "rows.json: ", "BIG-bench task"):
        prepare(tmp_path / "bbh")


def test_b8_the_shares_that_are_held_out_of_a_task_are_those_of_the_flags(prepare: Prepare, tmp_path: Path) -> None:
    path = hard(tmp_path / "navigate.json", 100)
    for test, validation, splits in (
        (0.5, 0.1, {"test": 50, "validation": 5, "train": 45}),
        (0.0, 0.0, {"train": 100}),
        (0.2, 0.0, {"test": 20, "train": 80}),
    ):
        assert Counter(one.split for one in prepare(path, test=test, validation=validation)[1]) == splits


def test_b3_other_fields_of_an_example_are_named(prepare: Prepare, tmp_path: Path) -> None:
    examples = [{"input": f"{n}?", "target": "x", "level": 3} for n in range(20)]
    manifest, _ = prepare(hard(tmp_path / "navigate.json", 0, examples=examples))
    assert manifest.facts["unused"] == {"columns": ["level"]}
