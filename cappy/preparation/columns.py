"""Which field of the record is read from which column of a file, and what of a source nothing is read from.

Without `--columns` every field is read under its own name. With it, prompt, answers, responses and what names a row
(id, group, task, split) are still read under their own names where no column is named for them; labels go with
responses and choices with answers; a column that another field is read from is read once. A column that is not read is
named once, and refused where leaving it out would change the task.
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
"""What a column can be read as."""

_ANSWERS = {"reference", "references"}
_RESPONSES = {"response", "responses", "candidates"}
_LABELS = {"label", "labels"}
_ROW_FIELDS = {"instance_id", "id", "group_id", "task", "template", "original_task", "split"}
_KNOWN_COLUMNS = {*_FIELDS, "id"}
_APPEND_REMEDY = "--columns input={name} appends it to the instruction"
_MANUAL_REMEDY = "write what the LLM is to see of it into the instruction"
_PROMPT_PARTS = ("input", "context", "passage", "document", "article", "paragraph")
_PREFERENCE_FIELDS = {"chosen": ("reference", "references"), "rejected": ("response", "responses")}
"""Columns of preference data, with the fields in which their texts may stand already."""
_REQUIRED_COLUMNS: Mapping[str, str] = {
    **dict.fromkeys((*_PROMPT_PARTS, *(f"{name}s" for name in _PROMPT_PARTS)), _APPEND_REMEDY),
    "rejected": "--columns response={name} makes it a response",
    "chosen": "--columns reference={name} makes it the reference",
    **dict.fromkeys(("system", "systemprompt", "history", "messages", "conversation", "conversations"), _MANUAL_REMEDY),
}
"""Columns without which a row is another task, with what reads them; names are compared by `_normalize`."""
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
    """Field -> column as given, and the columns that nothing is to be read from."""

    named: Mapping[str, str]
    ignored: frozenset[str] = frozenset()

    def own(self, first: Values) -> frozenset[str]:
        """The columns that are read under their own names, decided by the first row.

        A column that names rows and cannot (a split of another name, a task that is not a text) has another meaning.
        """
        if not self.named:
            return frozenset(_KNOWN_COLUMNS - self.ignored)
        given = set(self.named)
        own = set() if "instruction" in given else {"instruction", "input"}
        if not given & _ANSWERS:
            own |= {*_ANSWERS, "choices"}
        if not given & _RESPONSES:
            own |= _RESPONSES
            taken = {*self.named.values(), *self.ignored}
            if not given & _LABELS and _has_valid_labels(first, {"response", "responses"} - taken, _LABELS - taken):
                own |= _LABELS
        own |= {name for name in _ROW_FIELDS if name not in given and _is_valid_value(name, first.get(name))}
        if "instance_id" in given:
            own.discard("id")
        return frozenset(own - given - set(self.named.values()) - self.ignored)


def parse_columns(pairs: Sequence[str]) -> dict[str, str]:
    """Field -> column, from FIELD=COLUMN words; ConfigError for another form, an unknown or repeated field."""
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
            raise ConfigError(f"preparation: --columns: {name} is read from one column, got {both}")
        columns[name] = column
    return columns


@dataclass(slots=True, kw_only=True)
class SourceWarnings:
    """Columns, fields of candidates and settings that nothing came of, each with the place where it was seen first."""

    name: str
    unread: dict[str, dict[str, str]] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)
    said: dict[str, str] = field(default_factory=dict)

    def columns(self, where: str, values: Values, read: Values, names: Iterable[str]) -> None:
        """Notes columns of a row that are not `read`; RecordError for one that matters and whose text was not read."""
        for name in names:
            value = values[name]
            if value in (None, "", [], {}) or (isinstance(value, str) and not value.strip()):
                continue
            key = _normalize(name)
            if key in _REQUIRED_COLUMNS and not _is_redundant(key, value, read):
                known = (
                    _MANUAL_REMEDY
                    if _REQUIRED_COLUMNS[key] == _APPEND_REMEDY and not isinstance(value, str)
                    else _REQUIRED_COLUMNS[key]
                )
                remedy = f"{known.replace('{name}', name)}, --ignore-columns {name} leaves it out"
                raise RecordError(f"{where}: column {quote(name)} is not read, and matters; {remedy}")
            self.note("columns", where, name)

    def candidates(self, where: str, values: Values) -> None:
        """Notes fields of a row's candidates that no record keeps."""
        items = values.get("candidates")
        for item in items if isinstance(items, list) else ():
            if isinstance(item, dict) and not item.keys() <= _CANDIDATE_FIELDS:
                for name in item.keys() - _CANDIDATE_FIELDS:
                    self.note("candidate_fields", where, name)

    def seen(self, ignored: Iterable[str]) -> None:
        """Notes that columns of --ignore-columns are there."""
        self.ignored.update(ignored)

    def say(self, name: str, text: str) -> None:
        """Notes a sentence that the run has to say, once."""
        self.said.setdefault(name, text)

    def check(self, ignored: Iterable[str]) -> None:
        """ConfigError for a column of --ignore-columns that no row has."""
        for name in sorted(set(ignored) - self.ignored):
            raise ConfigError(f"{self.name}: --ignore-columns {name}: no row has that column; leave it out")

    def names(self, kind: str) -> str:
        """The names of a kind that were noted, for a message; empty where there are none."""
        columns = self.unread.get(kind)
        return column_names(sorted(columns), 400) if columns else ""

    def warn(self) -> None:
        """Logs what was noted, a line for each kind."""
        if columns := self.names("columns"):
            remedy = "--columns FIELD=COLUMN reads one, --ignore-columns NAME says that it is not meant"
            _LOGGER.warning("%s: columns that are not read: %s; %s", self.name, columns, remedy)
        if fields := self.names("candidate_fields"):
            _LOGGER.warning("%s: fields of candidates that are not read: %s", self.name, fields)
        for text in self.said.values():
            _LOGGER.warning("%s: %s", self.name, text)

    def facts(self) -> dict[str, object]:
        """For the manifest: the names under each kind, and what was said."""
        named = {kind: sorted(names) for kind, names in self.unread.items()}
        return {**({"unused": named} if named else {}), **({"notes": dict(self.said)} if self.said else {})}

    def note(self, kind: str, where: str, name: object) -> None:
        """Notes one name of a kind: columns, or candidate_fields."""
        names = self.unread.setdefault(kind, {})
        if len(names) < _MAX_NAMES:
            names.setdefault(str(name), where)


def map_columns(rows: Rows, columns: Columns, unused: SourceWarnings) -> Rows:
    """The rows with every field read from its column, and nothing else; what is not read is noted in `unused`.

    RecordError where a row lacks a column that is named, or has one that is not read and matters.
    """
    own: frozenset[str] | None = None
    named = set(columns.named.values())
    for where, values in rows:
        if own is None:
            own = columns.own(values)
        unused.seen(columns.ignored & values.keys())
        for name, column in columns.named.items():
            if column not in values:
                remedy = f"mend --columns {name}={column}"
                what = f"has no column {quote(column)}, columns found: {column_names(values)}"
                raise RecordError(f"{where}: {what}; {remedy}")
        # Columns of other names stay: an error shows them as found.
        kept = {name: value for name, value in values.items() if name in own or name not in _KNOWN_COLUMNS}
        read = {**kept, **{name: values[column] for name, column in columns.named.items()}}
        unused.columns(where, values, read, values.keys() - own - named - columns.ignored)
        yield where, _append_input(where, read, given="input" in columns.named)


def _append_input(where: str, values: Values, *, given: bool) -> Values:
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
        raise RecordError(f"{where}: input must be a text, got {quote(text)}; put it in quotes")
    if not text.strip() or (not given and _contains(instruction, text.strip())):
        return rest
    return {**rest, "instruction": f"{instruction}\n\n{text}"}


def _has_valid_labels(first: Values, responses: set[str], labels: set[str]) -> bool:
    """Whether the labels of a row, where it has any, are as many as its responses, each of them from 0 to 1."""
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
    """Whether the instruction holds an input already: several words of it, or one that ends a line after a colon."""
    if text not in instruction:
        return False
    if len(text.split()) > 1 or len(text) > 20:
        return re.search(rf"(?<!\w){re.escape(text)}(?!\w)", instruction) is not None
    return re.search(rf"(?:^|[:\n]\s*[\"'`]?){re.escape(text)}[\"'`]?\s*(?:\n|$)", instruction) is not None


def _normalize(name: object) -> str:
    """A column's name as it is compared: without case, blanks, hyphens and underscores."""
    return re.sub(r"[\W_]+", "", str(name)).lower()


def _is_redundant(key: str, value: object, read: Values) -> bool:
    """Whether a column says nothing that the prompt (of preference data: the same response) does not say too."""
    items = value if isinstance(value, list) else [value]
    texts = [item for item in items if isinstance(item, str)]
    if len(texts) < len(items):
        return False
    if key in _PREFERENCE_FIELDS:
        preferred = [read.get(name) for name in _PREFERENCE_FIELDS[key]]
        return all(any(text in one if isinstance(one, list) else text == one for one in preferred) for text in texts)
    instruction = read.get("instruction")
    return isinstance(instruction, str) and all(_contains(instruction, text.strip()) for text in texts)
