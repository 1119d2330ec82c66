"""Maps the columns of a file to fields of the record, and collects warnings about columns that are not read.

Without `--columns`, every field is read from the column of the same name. With it, only these fields are, unless
`--columns` maps them: the prompt, the answers with their choices, the responses with their labels, and the fields that
identify a row (id, group, task, split). A mapped column is not also read under its own name. An unread column causes
one warning, or an error if the task would be a different one without it.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cappy.errors import ConfigError, RecordError, quote
from cappy.preparation.cells import read_list
from cappy.preparation.rows import Rows, Values, column_names, is_label
from cappy.records.instance import SPLITS

_LOGGER = logging.getLogger("cappy.preparation")

_FIELDS = (
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
"""Fields that a column can be mapped to."""

_ANSWERS = {"reference", "references"}
_RESPONSES = {"response", "responses", "candidates"}
_LABELS = {"label", "labels"}
_ROW_FIELDS = {"instance_id", "id", "group_id", "task", "template", "original_task", "split"}
_KNOWN_COLUMNS = {*_FIELDS, "id"}
_APPEND_REMEDY = "append it to the instruction with --columns input={name}"
_MANUAL_REMEDY = "write what the LLM needs of it into the instruction"
_PROMPT_PARTS = ("input", "context", "passage", "document", "article", "paragraph")
_PREFERENCE_FIELDS = {"chosen": ("reference", "references"), "rejected": ("response", "responses")}
"""Columns of preference data, with the fields that may contain their texts already."""
_REQUIRED_COLUMNS: Mapping[str, str] = {
    **dict.fromkeys((*_PROMPT_PARTS, *(f"{name}s" for name in _PROMPT_PARTS)), _APPEND_REMEDY),
    "rejected": "read it as a response with --columns response={name}",
    "chosen": "read it as the reference with --columns reference={name}",
    **dict.fromkeys(("system", "systemprompt", "history", "messages", "conversation", "conversations"), _MANUAL_REMEDY),
}
"""Columns that change the task if they are not read, with the remedy; keys are names as `_normalize` returns them."""
_CANDIDATE_FIELDS = frozenset(
    (
        "response",
        "text",
        "label",
        "generator",
        "system",
        "decoding",
        "seed",
        "logprob_sum",
        "logprob_mean",
        "num_tokens",
    )
)
_MAX_NAMES = 1_000


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The column of each mapped field, by field, and the columns to ignore."""

    by_field: Mapping[str, str]
    ignored: frozenset[str] = frozenset()

    def find_own_columns(self, first: Values) -> frozenset[str]:
        """The columns to read as the field of the same name, decided by the first row.

        A column such as split or task is not read if its value is not valid there: it has another meaning in this file.
        """
        if not self.by_field:
            return frozenset(_KNOWN_COLUMNS - self.ignored)
        mapped_fields = set(self.by_field)
        own_columns = set() if "instruction" in mapped_fields else {"instruction", "input"}
        if not mapped_fields & _ANSWERS:
            own_columns |= {*_ANSWERS, "choices"}
        if not mapped_fields & _RESPONSES:
            own_columns |= _RESPONSES
            excluded = {*self.by_field.values(), *self.ignored}
            if not mapped_fields & _LABELS and _has_valid_labels(
                first, {"response", "responses"} - excluded, _LABELS - excluded
            ):
                own_columns |= _LABELS
        own_columns |= {
            name for name in _ROW_FIELDS if name not in mapped_fields and _is_valid_value(name, first.get(name))
        }
        if "instance_id" in mapped_fields:
            own_columns.discard("id")
        return frozenset(own_columns - mapped_fields - set(self.by_field.values()) - self.ignored)


def parse_columns(pairs: Sequence[str]) -> dict[str, str]:
    """The column of each field, from FIELD=COLUMN pairs; raises ConfigError for an unknown or repeated field."""
    columns: dict[str, str] = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not equals or not column:
            raise ConfigError(
                f"preparation: --columns: {quote(pair)} is not FIELD=COLUMN, such as instruction=question"
            )
        if name not in _FIELDS:
            raise ConfigError(
                f"preparation: --columns: unknown field {quote(name)}; choose one of {', '.join(_FIELDS)}"
            )
        if name in columns:
            both = f"{quote(columns[name])} and {quote(column)}"
            raise ConfigError(f"preparation: --columns: {name} can be read from one column only, got {both}")
        columns[name] = column
    return columns


@dataclass(slots=True, kw_only=True)
class SourceWarnings:
    """Warnings about a source: unread columns and candidate fields with their first location, and messages by key.

    `ignored` are the columns of --ignore-columns that occur in a row.
    """

    name: str
    unread: dict[str, dict[str, str]] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)
    messages: dict[str, str] = field(default_factory=dict)

    def check_columns(self, where: str, values: Values, fields: Values, names: Iterable[str]) -> None:
        """Adds the unread columns `names` of a row.

        Raises RecordError for a required column, unless the `fields` that were read already contain its text.
        """
        for name in names:
            value = values[name]
            if value in (None, "", [], {}) or (isinstance(value, str) and not value.strip()):
                continue
            key = _normalize(name)
            if key in _REQUIRED_COLUMNS and not _is_redundant(key, value, fields):
                command = (
                    _MANUAL_REMEDY
                    if _REQUIRED_COLUMNS[key] == _APPEND_REMEDY and not isinstance(value, str)
                    else _REQUIRED_COLUMNS[key]
                )
                remedy = f"{command.replace('{name}', name)}, or leave it out with --ignore-columns {name}"
                raise RecordError(f"{where}: column {quote(name)} is part of the task but is not read; {remedy}")
            self.add_name("columns", where, name)

    def check_candidate_fields(self, where: str, values: Values) -> None:
        """Adds the fields of a row's candidates that the record does not have."""
        items = values.get("candidates")
        for item in items if isinstance(items, list) else ():
            if isinstance(item, dict) and not item.keys() <= _CANDIDATE_FIELDS:
                for name in item.keys() - _CANDIDATE_FIELDS:
                    self.add_name("candidate_fields", where, name)

    def mark_ignored(self, ignored: Iterable[str]) -> None:
        """Marks columns of --ignore-columns as present."""
        self.ignored.update(ignored)

    def add(self, name: str, text: str) -> None:
        """Adds a message under a key; the first one of a key is kept."""
        self.messages.setdefault(name, text)

    def check_ignored(self, ignored: Iterable[str]) -> None:
        """Raises ConfigError for a column of --ignore-columns that no row has."""
        for name in sorted(set(ignored) - self.ignored):
            raise ConfigError(f"{self.name}: --ignore-columns {name}: no row has this column; leave the flag out")

    def names(self, kind: str) -> str:
        """The names of a kind for a message; empty if there are none."""
        columns = self.unread.get(kind)
        return column_names(sorted(columns), 400) if columns else ""

    def log(self) -> None:
        """Logs the warnings, one line for each kind and message."""
        if columns := self.names("columns"):
            remedy = "read one with --columns FIELD=COLUMN, or ignore it with --ignore-columns NAME"
            _LOGGER.warning("%s: columns that are not read: %s; %s", self.name, columns, remedy)
        if fields := self.names("candidate_fields"):
            _LOGGER.warning("%s: candidate fields that are not read: %s", self.name, fields)
        for text in self.messages.values():
            _LOGGER.warning("%s: %s", self.name, text)

    def facts(self) -> dict[str, object]:
        """The warnings for the manifest: names by kind, and messages by key."""
        unread = {kind: sorted(names) for kind, names in self.unread.items()}
        return {**({"unused": unread} if unread else {}), **({"notes": dict(self.messages)} if self.messages else {})}

    def add_name(self, kind: str, where: str, name: object) -> None:
        """Adds a name of a kind: columns or candidate_fields."""
        names = self.unread.setdefault(kind, {})
        if len(names) < _MAX_NAMES:
            names.setdefault(str(name), where)


def map_columns(rows: Rows, columns: Columns, warnings: SourceWarnings) -> Rows:
    """Yields the rows with every field read from its column, and adds unread columns to `warnings`.

    Raises RecordError if a row lacks a mapped column, or has a required column that is not read.
    """
    own_columns: frozenset[str] | None = None
    mapped_columns = set(columns.by_field.values())
    for where, values in rows:
        if own_columns is None:
            own_columns = columns.find_own_columns(values)
        warnings.mark_ignored(columns.ignored & values.keys())
        for name, column in columns.by_field.items():
            if column not in values:
                remedy = f"correct --columns {name}={column}"
                problem = f"has no column {quote(column)}, columns found: {column_names(values)}"
                raise RecordError(f"{where}: {problem}; {remedy}")
        # Columns that are not fields are kept so that errors can list them.
        own_values = {
            name: value for name, value in values.items() if name in own_columns or name not in _KNOWN_COLUMNS
        }
        fields = {**own_values, **{name: values[column] for name, column in columns.by_field.items()}}
        warnings.check_columns(where, values, fields, values.keys() - own_columns - mapped_columns - columns.ignored)
        yield where, append_input(where, fields, is_mapped="input" in columns.by_field)


def append_input(where: str, values: Values, *, is_mapped: bool) -> Values:
    """The fields with `input` appended to the instruction after a blank line, in the order of Alpaca's prompt.

    An input that the instruction contains already is not appended again, unless --columns maps a column to it.
    """
    if "input" not in values:
        return values
    rest = {name: value for name, value in values.items() if name != "input"}
    text, instruction = values["input"], values.get("instruction")
    if text is None or text == "" or not isinstance(instruction, str):
        return rest
    if not isinstance(text, str):
        raise RecordError(f"{where}: input must be a string, got {quote(text)}; put it in quotes")
    if not text.strip() or (not is_mapped and _contains(instruction, text.strip())):
        return rest
    return {**rest, "instruction": f"{instruction}\n\n{text}"}


def _has_valid_labels(first: Values, responses: set[str], labels: set[str]) -> bool:
    """Whether a row has responses, and either no labels or a valid one for each response."""
    texts = [text for name in responses for text in _read_items(first.get(name))]
    label_values = [label for name in labels for label in _read_items(first.get(name))]
    return bool(texts) and (not label_values or (len(label_values) == len(texts) and all(map(is_label, label_values))))


def _read_items(value: object) -> list[object]:
    if isinstance(value, str):
        try:
            return read_list(value.strip())
        except ValueError:
            return [value]
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_valid_value(name: str, value: object) -> bool:
    if value is None:
        return True
    if name == "split":
        return value in SPLITS
    if name == "original_task":
        return isinstance(value, bool)
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))


def _contains(instruction: str, text: str) -> bool:
    """Whether the instruction contains a text; a short text must be a line of its own or follow a colon."""
    if text not in instruction:
        return False
    if len(text.split()) > 1 or len(text) > 20:
        return re.search(rf"(?<!\w){re.escape(text)}(?!\w)", instruction) is not None
    return re.search(rf"(?:^|[:\n]\s*[\"'`]?){re.escape(text)}[\"'`]?\s*(?:\n|$)", instruction) is not None


def _normalize(name: object) -> str:
    """A column name in lower case without spaces, hyphens and underscores."""
    return re.sub(r"[\W_]+", "", str(name)).lower()


def _is_redundant(key: str, value: object, fields: Values) -> bool:
    """Whether the prompt (or the preferred or rejected response) already contains all texts of a column."""
    items = value if isinstance(value, list) else [value]
    texts = [item for item in items if isinstance(item, str)]
    if len(texts) < len(items):
        return False
    if key in _PREFERENCE_FIELDS:
        contents = [fields.get(name) for name in _PREFERENCE_FIELDS[key]]
        return all(any(text in item if isinstance(item, list) else text == item for item in contents) for text in texts)
    instruction = fields.get("instruction")
    return isinstance(instruction, str) and all(_contains(instruction, text.strip()) for text in texts)
