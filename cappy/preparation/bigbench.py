"""Reads datasets of complete prompts: BIG-bench, from JSON tasks or `tasksource/bigbench` on the hub, and P3.

Files of BIG-Bench-Hard have the same format without a task name; the file name is used.

The prompt is BIG-bench's zero-shot prompt: task prefix, input prefix, input, choices if the task appends them, output
prefix (BIG-bench, docs/doc.md, fields of a JSON task). A fifth of each task, at least 16 examples, is held out. The
benchmark calls it validation and the Cappy paper reports on it (section 4.2), so it is the test split here. For JSON
tasks, the held-out examples are drawn with the seed, as many as the benchmark draws; for the hub, the published split
is used.
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

_HELD_OUT_SHARE = 0.2
_MIN_HELD_OUT = 16
MAX_EXAMPLES = 50_000
"""Maximum number of examples in a split, as in tasksource/bigbench."""
_MAX_TASK_BYTES = 512 * 2**20
"""Largest JSON task, which is read into memory; the largest of the benchmark has about 200 MB."""
_TASK_FILE = "task.json"
_HEAD_BYTES = 4_096
_EXAMPLE_FIELDS = {"input", "target", "target_scores", "comment"}
_P3_COLUMNS = {"inputs_pretokenized", "targets_pretokenized"}
_BIGBENCH_COLUMNS = {"inputs", "targets", "multiple_choice_targets"}
_REDUNDANT_COLUMNS = frozenset(
    ("inputs", "targets", "idx", "weight", "multiple_choice_scores", "answer_choices", "is_correct")
)
"""Columns of these datasets that repeat or index the others."""


class PromptFields(TypedDict):
    """The fields of a row of tasksource/bigbench; the instruction is not checked yet."""

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
class BigBenchTask:
    """A task or subtask: its name, and pairs of the location and fields of each example."""

    name: str
    rows: Sequence[tuple[str, ExampleFields]]


def is_task(path: Path) -> bool:
    """Whether a file is a JSON task: one object with examples, not JSON Lines."""
    if path.suffix != ".json" or path.name == _TASK_FILE:
        return path.name == _TASK_FILE
    try:
        with path.open("rb") as file:
            first_bytes = file.read(_HEAD_BYTES).lstrip()
        if path.stat().st_size > _MAX_TASK_BYTES or (first_bytes and not first_bytes.startswith(b"{")):
            return False
        values = json.loads(path.read_text(encoding="utf-8"))
        return isinstance(values, dict) and "examples" in values
    except (OSError, ValueError, RecursionError, TypeError):
        return False


def find_tasks(folder: Path) -> list[Path]:
    """The tasks in a folder: every task.json under it, else its JSON files if they are tasks.

    Raises FolderError if some of its JSON files are tasks and others are not.
    """
    if tasks := sorted(folder.rglob(_TASK_FILE)):
        return tasks
    files = sorted(folder.glob("*.json"))
    tasks = [file for file in files if is_task(file)]
    if tasks and len(tasks) < len(files):
        other = next(file for file in files if file not in tasks)
        raise FolderError(f"{other}: is not a BIG-bench task, but other files in the folder are; move it elsewhere")
    return tasks


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutShares:
    """Held-out shares of a task: `test` of all examples (see `split_rows`), `validation` of the remaining ones."""

    test: float = _HELD_OUT_SHARE
    validation: float


def read_tasks(
    paths: Sequence[Path],
    root: Path,
    *,
    seed: int,
    shares: HeldOutShares,
    task: str = "",
    warnings: SourceWarnings | None = None,
) -> Rows:
    """The rows of all tasks with their splits.

    Tasks in one folder under `root` are subtasks and share the minimum number of test examples. A prompt that an
    earlier task already has is dropped, so that no two splits share one. `task` replaces the names of the tasks.
    """
    siblings = Counter(_top_folder(path, root) for path in paths)
    seen: set[int] = set()
    for path in paths:
        min_test = -(-_MIN_HELD_OUT // siblings[_top_folder(path, root)])
        rows = _unique_rows(read_task(path, seed, warnings), seen)
        for where, values in split_rows(rows, seed=seed, shares=shares, min_test=min_test):
            yield where, {**values, "task": task} if task else values


def _unique_rows(task: BigBenchTask, seen: set[int]) -> BigBenchTask:
    """The task without repeated prompts and those in `seen`; its prompts are added to `seen`."""
    rows = []
    for where, values in task.rows:
        if (prompt := prompt_hash(values["instruction"])) not in seen:
            seen.add(prompt)
            rows.append((where, values))
    return BigBenchTask(name=task.name, rows=rows)


def _top_folder(path: Path, root: Path) -> str:
    parts = path.relative_to(root).parts if path != root else ()
    return parts[0] if len(parts) > 2 else str(path)


def read_task(path: Path, seed: int, warnings: SourceWarnings | None = None) -> BigBenchTask:
    """Reads a JSON task; raises RecordError that names the invalid example and field.

    The order of appended choices is drawn with the seed; the benchmark uses a seed of its own.
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
            raise RecordError(f"{where} must be an object, got {quote(example)}; fix the file")
        if warnings is not None:
            for field in example.keys() - _EXAMPLE_FIELDS:
                warnings.add_name("columns", where, field)
        rows.append((where, _make_fields(where, values, example, name, random.Random(f"{seed} {name} {index}"))))
    return BigBenchTask(name=name, rows=rows)


def split_rows(task: BigBenchTask, *, seed: int, shares: HeldOutShares, min_test: int = _MIN_HELD_OUT) -> Rows:
    """The rows of a task with their splits.

    Test is the share `shares.test` of all rows, at least `min_test` rows unless the share is 0. Validation is the share
    `shares.validation` of the remaining rows.
    """
    rows = task.rows
    order = random.Random(f"{seed} {task.name}").sample(range(len(rows)), len(rows))
    num_test = min(max(min_test, int(shares.test * len(rows))), max(0, len(rows) - 1)) if shares.test else 0
    test, rest = order[:num_test][:MAX_EXAMPLES], order[num_test:][:MAX_EXAMPLES]
    num_validation = max(0, min(int(shares.validation * len(rest)) or bool(shares.validation), len(rest) - 1))
    indexes_by_split = {"test": test, "validation": rest[:num_validation], "train": rest[num_validation:]}
    split_by_index = {index: split for split, indexes in indexes_by_split.items() for index in indexes}
    for index in sorted(split_by_index):
        where, values = rows[index]
        yield where, {**values, "split": split_by_index[index]}


def _make_fields(where: str, task: Values, example: Values, name: str, rng: random.Random) -> ExampleFields:
    scores = example.get("target_scores")
    if scores is not None and not (isinstance(scores, dict) and scores):
        raise RecordError(f"{where}: target_scores must map choices to scores, got {quote(scores)}; fix the file")
    if scores is not None and not all(_is_number(score) for score in scores.values()):
        raise RecordError(f"{where}: target_scores must be numbers, got {quote(scores)}; fix the file")
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
    """The accepted answers: `target`, or the choices with the highest score."""
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
        raise RecordError(f"{where}: {name} must be a string, got {quote(value)}; fix the file")
    if problem := find_invalid_character(value):
        raise RecordError(f"{where}: {name} contains {problem}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _read_object(path: Path) -> Values:
    with translate_read_errors(path):
        size, data = path.stat().st_size, b""
        if size <= _MAX_TASK_BYTES:
            data = path.read_bytes()
    if size > _MAX_TASK_BYTES:
        remedy = "split it into several tasks"
        raise RecordError(f"{path}: has {size:,} bytes, the limit for a task is {_MAX_TASK_BYTES:,}; {remedy}")
    try:
        values = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise RecordError(f"{path}: is not JSON ({reason}); choose a JSON task of BIG-bench") from error
    if not isinstance(values, dict):
        raise RecordError(f"{path}: must be a JSON object, got {quote(values)}; choose a JSON task of BIG-bench")
    return values


def map_known_columns(rows: Rows) -> Rows:
    """Maps rows of BIG-bench and P3 to the fields of the record; yields other rows unchanged.

    P3 has a row for each choice in rank-classification evaluations: rows of wrong choices are dropped, because every
    row lists all choices.
    """
    for where, values in rows:
        if "instruction" in values:
            yield where, values
        elif values.keys() >= _P3_COLUMNS:
            if values.get("is_correct", True):
                yield where, {**_other_columns(values, _P3_COLUMNS), **_parse_p3(where, values)}
        elif values.keys() >= _BIGBENCH_COLUMNS:
            yield where, {**_other_columns(values, _BIGBENCH_COLUMNS), **parse_bigbench(where, values)}
        else:
            yield where, values


def _other_columns(values: Values, used: set[str]) -> Values:
    """The columns that are neither `used` nor redundant."""
    return {name: value for name, value in values.items() if name not in used and name not in _REDUNDANT_COLUMNS}


def parse_bigbench(where: str, values: Values) -> PromptFields:
    """The fields of a row of tasksource/bigbench."""
    references = _read_texts(where, values, "targets")
    choices = distinct_choices(_read_texts(where, values, "multiple_choice_targets"), references)
    return {"instruction": values["inputs"], "references": list(references), "choices": list(choices)}


def _parse_p3(where: str, values: Values) -> Values:
    """The fields of a row of P3, whose texts are surrounded by whitespace."""
    instruction, target = (
        _read_p3_text(where, values, name) for name in ("inputs_pretokenized", "targets_pretokenized")
    )
    listed_choices = _read_texts(where, values, "answer_choices") if values.get("answer_choices") else ()
    choices = distinct_choices([choice.strip() for choice in listed_choices], [target])
    return {"instruction": instruction, "reference": target, "choices": list(choices)}


def _read_p3_text(where: str, values: Values, name: str) -> str:
    value = values[name]
    if not isinstance(value, str):
        raise RecordError(f"{where}: {name} must be a string, got {quote(value)}; choose another dataset")
    return value.strip()


def distinct_choices(choices: Sequence[str], references: Sequence[str]) -> tuple[str, ...]:
    """The choices without repeats; empty if there are fewer than two or no reference is among them."""
    distinct = tuple(dict.fromkeys(filter(str.strip, choices)))
    return distinct if len(distinct) > 1 and set(references) & set(distinct) else ()


def _read_texts(where: str, values: Values, name: str) -> tuple[str, ...]:
    """The text or texts in a field; raises RecordError for anything else."""
    value = values.get(name)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RecordError(f"{where}: {name} must be a string or a list of strings; choose another dataset")
    return tuple(texts)
