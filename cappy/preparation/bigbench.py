"""Datasets that come as prompts: BIG-bench, as its JSON tasks or as `tasksource/bigbench` has it on the hub, and P3.

BIG-Bench-Hard's files are tasks of the same shape without a name: theirs is the file's.

A prompt is the benchmark's zero-shot one: task prefix, input prefix, input, choices where the task appends them, output
prefix (BIG-bench, docs/doc.md, fields of a JSON task). A fifth of each task, at least 16 examples, is held out: the
benchmark calls it validation, and Cappy reports on it (§4.2), so here it is the test split. Which examples those are
the benchmark draws by a generator of its own; from the JSON ours draws as many by the seed, from the hub the published
ones are taken.
"""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from cappy.errors import FolderError, RecordError, quote
from cappy.preparation.columns import SourceWarnings
from cappy.preparation.rows import Rows, Values, find_invalid_character
from cappy.preparation.text_files import translate_read_errors
from cappy.records import prompt_hash

_HELD_OUT = 0.2
_MIN_HELD_OUT = 16
MAX_EXAMPLES = 50_000
"""Examples of a split that are kept, as in tasksource/bigbench."""
_MAX_TASK_BYTES = 512 * 2**20
"""Of a JSON task, which is read whole; the largest of the benchmark has about 200 MB."""
_TASK_FILE = "task.json"
_HEAD_BYTES = 4_096
_EXAMPLE = {"input", "target", "target_scores", "comment"}
_P3 = {"inputs_pretokenized", "targets_pretokenized"}
_BIGBENCH = {"inputs", "targets", "multiple_choice_targets"}
_REDUNDANT_COLUMNS = frozenset(
    ("inputs", "targets", "idx", "weight", "multiple_choice_scores", "answer_choices", "is_correct")
)
"""Columns of these datasets that say again, or count, what the others say."""


class PromptFields(TypedDict):
    """The fields of a row of tasksource/bigbench; its instruction is whatever the column holds."""

    instruction: object
    references: list[str]
    choices: list[str]


class ExampleFields(TypedDict):
    """The fields of an example of a JSON task."""

    instruction: str
    references: list[str]
    choices: list[str]
    task: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task or subtask: its name, and each example's place in the file with the fields of the record."""

    name: str
    rows: Sequence[tuple[str, ExampleFields]]


def is_task(path: Path) -> bool:
    """Whether a file is a JSON task: an object with examples, and not JSON Lines."""
    if path.suffix != ".json" or path.name == _TASK_FILE:
        return path.name == _TASK_FILE
    try:
        with path.open("rb") as file:
            begin = file.read(_HEAD_BYTES).lstrip()
        if path.stat().st_size > _MAX_TASK_BYTES or (begin and not begin.startswith(b"{")):
            return False
        values = json.loads(path.read_text(encoding="utf-8"))
        return isinstance(values, dict) and "examples" in values
    except (OSError, ValueError, RecursionError, TypeError):
        return False


def find_tasks(folder: Path) -> list[Path]:
    """The tasks in a folder: every task.json under it, or else its JSON files where they are tasks; none otherwise.

    FolderError where some of its JSON files are tasks and others are not.
    """
    if tasks := sorted(folder.rglob(_TASK_FILE)):
        return tasks
    files = sorted(folder.glob("*.json"))
    tasks = [file for file in files if is_task(file)]
    if tasks and len(tasks) < len(files):
        odd = next(file for file in files if file not in tasks)
        raise FolderError(f"{odd}: is not a BIG-bench task, others in its folder are; move it elsewhere")
    return tasks


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutShares:
    """What is held out of a task: `test` of all its examples (see `split_rows`), `validation` of the rest."""

    test: float = _HELD_OUT
    validation: float


def read_tasks(
    paths: Sequence[Path],
    root: Path,
    *,
    seed: int,
    shares: HeldOutShares,
    task: str = "",
    unused: SourceWarnings | None = None,
) -> Rows:
    """The rows of all tasks with their splits; tasks in one folder under `root` are subtasks and share the minimum.

    A prompt that an earlier task had is left out, so that no two splits share one. `task` takes the place of the names.
    """
    siblings = Counter(_top_folder(path, root) for path in paths)
    seen: set[int] = set()
    for path in paths:
        minimum = -(-_MIN_HELD_OUT // siblings[_top_folder(path, root)])
        rows = _unique_rows(read_task(path, seed, unused), seen)
        for where, values in split_rows(rows, seed=seed, shares=shares, minimum=minimum):
            yield where, {**values, "task": task} if task else values


def _unique_rows(task: Task, seen: set[int]) -> Task:
    """The task with each prompt once, without those that are `seen`; its own are added to them."""
    rows = []
    for where, values in task.rows:
        if (prompt := prompt_hash(values["instruction"])) not in seen:
            seen.add(prompt)
            rows.append((where, values))
    return Task(name=task.name, rows=rows)


def _top_folder(path: Path, root: Path) -> str:
    parts = path.relative_to(root).parts if path != root else ()
    return parts[0] if len(parts) > 2 else str(path)


def read_task(path: Path, seed: int, unused: SourceWarnings | None = None) -> Task:
    """The task in a JSON file of the benchmark; RecordError names the example and field that is wrong.

    The order of appended choices is drawn by the seed, as the benchmark draws it by its own.
    """
    values = _read_object(path)
    name = str(values.get("name") or (path.parent.name if path.name == _TASK_FILE else path.stem))
    examples = values.get("examples")
    if not isinstance(examples, list) or not examples:
        raise RecordError(f"{path}: has no examples, got {quote(examples)}; choose a JSON task of BIG-bench")
    rows = []
    for index, example in enumerate(examples):
        where = f"{path}: examples[{index}]"
        if not isinstance(example, dict):
            raise RecordError(f"{where} must be an object, got {quote(example)}; mend it")
        if unused is not None:
            for field in example.keys() - _EXAMPLE:
                unused.note("columns", where, field)
        rows.append((where, _make_fields(where, values, example, name, random.Random(f"{seed} {name} {index}"))))
    return Task(name=name, rows=rows)


def split_rows(task: Task, *, seed: int, shares: HeldOutShares, minimum: int = _MIN_HELD_OUT) -> Rows:
    """The task's rows with their splits: test is a share, at least `minimum` unless it is 0, validation of the rest."""
    rows = task.rows
    order = random.Random(f"{seed} {task.name}").sample(range(len(rows)), len(rows))
    num_test = min(max(minimum, int(shares.test * len(rows))), max(0, len(rows) - 1)) if shares.test else 0
    test, rest = order[:num_test][:MAX_EXAMPLES], order[num_test:][:MAX_EXAMPLES]
    num_validation = max(0, min(int(shares.validation * len(rest)) or bool(shares.validation), len(rest) - 1))
    named = {"test": test, "validation": rest[:num_validation], "train": rest[num_validation:]}
    place = {index: split for split, indexes in named.items() for index in indexes}
    for index in sorted(place):
        where, values = rows[index]
        yield where, {**values, "split": place[index]}


def _make_fields(where: str, task: Values, example: Values, name: str, rng: random.Random) -> ExampleFields:
    scores = example.get("target_scores")
    if scores is not None and not (isinstance(scores, dict) and scores):
        raise RecordError(f"{where}: target_scores must be choices with their scores, got {quote(scores)}; mend it")
    if scores is not None and not all(_is_number(score) for score in scores.values()):
        raise RecordError(f"{where}: target_scores must be numbers, got {quote(scores)}; mend it")
    defaults = {
        "task_prefix": "",
        "example_input_prefix": "\nQ: ",
        "choice_prefix": "\n  choice: ",
        "example_output_prefix": "\nA: ",
    }
    prefixes = {field: _read_text(where, {field: default, **task}, field) for field, default in defaults.items()}
    choices = sorted(scores or ())
    shuffled = rng.sample(choices, len(choices)) if task.get("append_choices_to_input", True) else ()
    prompt = "".join(
        (
            prefixes["task_prefix"],
            prefixes["example_input_prefix"],
            _read_text(where, example, "input"),
            *(prefixes["choice_prefix"] + choice for choice in shuffled),
            prefixes["example_output_prefix"],
        )
    )
    return {"instruction": prompt, "references": _read_targets(where, example), "choices": choices, "task": name}


def _read_targets(where: str, example: Values) -> list[str]:
    """The accepted answers: `target`, or the choices of the highest score."""
    if "target" in example:
        target = example["target"]
        return target if isinstance(target, list) else [_read_text(where, example, "target")]
    scores = example.get("target_scores")
    if not isinstance(scores, dict) or not scores:
        raise RecordError(f"{where}: has no target and no target_scores; give one of them")
    best = max(scores.values())
    return [choice for choice, score in scores.items() if score == best]


def _read_text(where: str, example: Values, name: str) -> str:
    value = example.get(name)
    if not isinstance(value, str):
        raise RecordError(f"{where}: {name} must be a text, got {quote(value)}; mend it")
    if odd := find_invalid_character(value):
        raise RecordError(f"{where}: {name} holds {odd}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _read_object(path: Path) -> Values:
    with translate_read_errors(path):
        size, data = path.stat().st_size, b""
        if size <= _MAX_TASK_BYTES:
            data = path.read_bytes()
    if size > _MAX_TASK_BYTES:
        remedy = "cut it into several tasks"
        raise RecordError(f"{path}: has {size:,} bytes, a task may have {_MAX_TASK_BYTES:,}; {remedy}")
    try:
        values = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise RecordError(f"{path}: is not JSON ({reason}); choose a JSON task of BIG-bench") from error
    if not isinstance(values, dict):
        raise RecordError(f"{path}: must be a JSON object, got {quote(values)}; choose a JSON task of BIG-bench")
    return values


def map_known_columns(rows: Rows) -> Rows:
    """The rows with the fields of the record, where their columns are known; others as they are.

    P3's rows of a rank-classification evaluation stand once for each choice: those of the wrong ones are left out,
    because every row lists all choices.
    """
    for where, values in rows:
        if "instruction" in values:
            yield where, values
        elif values.keys() >= _P3:
            if values.get("is_correct", True):
                yield where, {**_other_columns(values, _P3), **_parse_p3(where, values)}
        elif values.keys() >= _BIGBENCH:
            yield where, {**_other_columns(values, _BIGBENCH), **parse_bigbench(where, values)}
        else:
            yield where, values


def _other_columns(values: Values, read: set[str]) -> Values:
    """The columns that the shape does not know."""
    return {name: value for name, value in values.items() if name not in read and name not in _REDUNDANT_COLUMNS}


def parse_bigbench(where: str, values: Values) -> PromptFields:
    """The fields of a row of tasksource/bigbench."""
    references = _read_texts(where, values, "targets")
    choices = distinct_choices(_read_texts(where, values, "multiple_choice_targets"), references)
    return {"instruction": values["inputs"], "references": list(references), "choices": list(choices)}


def _parse_p3(where: str, values: Values) -> Values:
    """The fields of a row of P3, whose texts have blanks around them."""
    instruction, target = (
        _read_p3_text(where, values, name) for name in ("inputs_pretokenized", "targets_pretokenized")
    )
    listed = _read_texts(where, values, "answer_choices") if values.get("answer_choices") else ()
    choices = distinct_choices([choice.strip() for choice in listed], [target])
    return {"instruction": instruction, "reference": target, "choices": list(choices)}


def _read_p3_text(where: str, values: Values, name: str) -> str:
    value = values[name]
    if not isinstance(value, str):
        raise RecordError(f"{where}: {name} must be a text, got {quote(value)}; choose another dataset")
    return value.strip()


def distinct_choices(choices: Sequence[str], references: Sequence[str]) -> tuple[str, ...]:
    """The choices, repeated ones once; none where they are not a choice or the answer is not among them."""
    different = tuple(dict.fromkeys(filter(str.strip, choices)))
    return different if len(different) > 1 and set(references) & set(different) else ()


def _read_texts(where: str, values: Values, name: str) -> tuple[str, ...]:
    """The text or texts in a field; RecordError for anything else."""
    value = values.get(name)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RecordError(f"{where}: {name} must be a text or a list of texts; choose another dataset")
    return tuple(texts)
