"""Files whose columns have names of their own: which field of the record is read from which column.

Without `--columns` every field is read under its own name. With it, prompt, answers, responses and what names a row
(id, group, task, split) are still read under their own names where no column is named for them; labels go with
responses and choices with answers; a column that another field is read from is read once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cappy.errors import ConfigError, RecordError, shown
from cappy.preparation.cells import read_list
from cappy.preparation.fields import is_label
from cappy.preparation.rows import Rows, Values, column_names
from cappy.preparation.unused import Unused, holds
from cappy.records.instance import SPLITS

FIELDS = (
    "instruction",
    "reference",
    "references",
    "choices",
    "response",
    "responses",
    "label",
    "labels",
    "candidates",
    "instance_id",
    "group_id",
    "task",
    "template",
    "original_task",
    "split",
    "input",
)
"""What a column can be read as."""

_ANSWERS = {"reference", "references"}
_RESPONSES = {"response", "responses", "candidates"}
_LABELS = {"label", "labels"}
_NAMING = {"instance_id", "id", "group_id", "task", "template", "original_task", "split"}
_OWN = {*FIELDS, "id"}


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Field -> column as given, and the columns that nothing is to be read from."""

    named: Mapping[str, str]
    ignored: frozenset[str] = frozenset()

    def own(self, first: Values) -> frozenset[str]:
        """The columns that are read under their own names, decided by the first row.

        A column that names rows and cannot (a split of another name, a task that is no text) has another meaning.
        """
        if not self.named:
            return frozenset(_OWN - self.ignored)
        given = set(self.named)
        own = set() if "instruction" in given else {"instruction", "input"}
        if not given & _ANSWERS:
            own |= {*_ANSWERS, "choices"}
        if not given & _RESPONSES:
            own |= _RESPONSES
            taken = {*self.named.values(), *self.ignored}
            if not given & _LABELS and _rated(first, {"response", "responses"} - taken, _LABELS - taken):
                own |= _LABELS
        own |= {name for name in _NAMING if name not in given and _can_name(name, first.get(name))}
        if "instance_id" in given:
            own.discard("id")
        return frozenset(own - given - set(self.named.values()) - self.ignored)


def parse(pairs: Sequence[str]) -> dict[str, str]:
    """Field -> column, from FIELD=COLUMN words; ConfigError for another form, an unknown or repeated field."""
    columns: dict[str, str] = {}
    for pair in pairs:
        field, equals, column = pair.partition("=")
        if not equals or not column:
            raise ConfigError(
                f"preparation: --columns: {shown(pair)} is not FIELD=COLUMN, such as instruction=question"
            )
        if field not in FIELDS:
            raise ConfigError(f"preparation: --columns: no field {shown(field)}; choose of {', '.join(FIELDS)}")
        if field in columns:
            both = f"{shown(columns[field])} and {shown(column)}"
            raise ConfigError(f"preparation: --columns: {field} is read from one column, got {both}")
        columns[field] = column
    return columns


def mapped(rows: Rows, columns: Columns, unused: Unused) -> Rows:
    """The rows with every field read from its column, and nothing else; what is not read is noted in `unused`.

    RecordError where a row lacks a column that is named, or has one that is not read and matters.
    """
    own: frozenset[str] | None = None
    named = set(columns.named.values())
    for where, values in rows:
        if own is None:
            own = columns.own(values)
        unused.seen(columns.ignored & values.keys())
        for field, column in columns.named.items():
            if column not in values:
                remedy = f"mend --columns {field}={column}"
                what = f"has no column {shown(column)}, columns found: {column_names(values)}"
                raise RecordError(f"{where}: {what}; {remedy}")
        # Columns of other names stay: an error shows them as found.
        kept = {name: value for name, value in values.items() if name in own or name not in _OWN}
        read = {**kept, **{field: values[column] for field, column in columns.named.items()}}
        unused.columns(where, values, read, values.keys() - own - named - columns.ignored)
        yield where, with_input(where, read, given="input" in columns.named)


def with_input(where: str, values: Values, *, given: bool) -> Values:
    """The fields with `input` below the instruction, after a blank line, which is the order of Alpaca's own prompt.

    An input that the instruction holds already is not repeated, unless a column was `given` for it.
    """
    if "input" not in values:
        return values
    rest = {name: value for name, value in values.items() if name != "input"}
    text, instruction = values["input"], values.get("instruction")
    if text is None or text == "" or not isinstance(instruction, str):
        return rest
    if not isinstance(text, str):
        raise RecordError(f"{where}: input must be a text, got {shown(text)}; put it in quotes")
    if not text.strip() or (not given and holds(instruction, text.strip())):
        return rest
    return {**rest, "instruction": f"{instruction}\n\n{text}"}


def _rated(first: Values, responses: set[str], labels: set[str]) -> bool:
    """Whether the labels of a row, where it has any, are as many as its responses, each of them from 0 to 1."""
    texts = [text for name in responses for text in _items(first.get(name))]
    found = [label for name in labels for label in _items(first.get(name))]
    return bool(texts) and (not found or (len(found) == len(texts) and all(map(is_label, found))))


def _items(value: object) -> list[Any]:
    if isinstance(value, str):
        try:
            return read_list(value.strip())
        except ValueError:
            return [value]
    return value if isinstance(value, list) else [] if value is None else [value]


def _can_name(name: str, value: object) -> bool:
    if value is None:
        return True
    if name == "split":
        return value in SPLITS
    if name == "original_task":
        return isinstance(value, bool)
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))
