"""What a source holds and nothing is read from: named once, and refused where leaving it out would change the task."""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cappy.errors import ConfigError, RecordError, shown
from cappy.preparation.rows import Values, column_names

LOGGER = logging.getLogger("cappy.preparation")

_APPENDED = "--columns input={name} appends it to the instruction"
_BY_HAND = "write what the LLM is to see of it into the instruction"
_PROMPT_PARTS = ("input", "context", "passage", "document", "article", "paragraph")
_RESPONSES = {"chosen": ("reference", "references"), "rejected": ("response", "responses")}
"""Columns of preference data, with the fields in which their texts may stand already."""
MATTERS: Mapping[str, str] = {
    **dict.fromkeys((*_PROMPT_PARTS, *(f"{name}s" for name in _PROMPT_PARTS)), _APPENDED),
    "rejected": "--columns response={name} makes it a response",
    "chosen": "--columns reference={name} makes it the reference",
    **dict.fromkeys(("system", "systemprompt", "history", "messages", "conversation", "conversations"), _BY_HAND),
}
"""Columns without which a row is another task, with what reads them; names are compared by `_key`."""
CANDIDATE_FIELDS = frozenset(
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
_MOST_NAMED = 1_000


@dataclass(slots=True, kw_only=True)
class Unused:
    """Columns, fields of candidates and settings that nothing came of, each with the place where it was seen first."""

    name: str
    found: dict[str, dict[str, str]] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)
    said: dict[str, str] = field(default_factory=dict)

    def columns(self, where: str, values: Values, read: Values, names: Iterable[str]) -> None:
        """Notes columns of a row that are not `read`; RecordError for one that matters and whose text was not read."""
        for name in names:
            value = values[name]
            if value in (None, "", [], {}) or (isinstance(value, str) and not value.strip()):
                continue
            key = _key(name)
            if key in MATTERS and not _is_redundant(key, value, read):
                known = _BY_HAND if MATTERS[key] == _APPENDED and not isinstance(value, str) else MATTERS[key]
                remedy = f"{known.replace('{name}', name)}, --ignore-columns {name} leaves it out"
                raise RecordError(f"{where}: column {shown(name)} is not read, and matters; {remedy}")
            self.note("columns", where, name)

    def candidates(self, where: str, values: Values) -> None:
        """Notes fields of a row's candidates that no record keeps."""
        items: Any = values.get("candidates")
        for item in items if isinstance(items, list) else ():
            if isinstance(item, dict) and not item.keys() <= CANDIDATE_FIELDS:
                for name in item.keys() - CANDIDATE_FIELDS:
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
        found = self.found.get(kind)
        return column_names(sorted(found), 400) if found else ""

    def warn(self) -> None:
        """Logs what was noted, a line for each kind."""
        if columns := self.names("columns"):
            remedy = "--columns FIELD=COLUMN reads one, --ignore-columns NAME says that it is not meant"
            LOGGER.warning("%s: columns that are not read: %s; %s", self.name, columns, remedy)
        if fields := self.names("candidate_fields"):
            LOGGER.warning("%s: fields of candidates that are not read: %s", self.name, fields)
        for text in self.said.values():
            LOGGER.warning("%s: %s", self.name, text)

    def facts(self) -> dict[str, Any]:
        """For the manifest: the names under each kind, and what was said."""
        named = {kind: sorted(names) for kind, names in self.found.items()}
        return {**({"unused": named} if named else {}), **({"notes": dict(self.said)} if self.said else {})}

    def note(self, kind: str, where: str, name: object) -> None:
        """Notes one name of a kind: columns, or candidate_fields."""
        names = self.found.setdefault(kind, {})
        if len(names) < _MOST_NAMED:
            names.setdefault(str(name), where)


def holds(instruction: str, text: str) -> bool:
    """Whether the instruction holds an input already: several words of it, or one that ends a line after a colon."""
    if text not in instruction:
        return False
    if len(text.split()) > 1 or len(text) > 20:
        return re.search(rf"(?<!\w){re.escape(text)}(?!\w)", instruction) is not None
    return re.search(rf"(?:^|[:\n]\s*[\"'`]?){re.escape(text)}[\"'`]?\s*(?:\n|$)", instruction) is not None


def _key(name: object) -> str:
    """A column's name as it is compared: without case, blanks, hyphens and underscores."""
    return re.sub(r"[\W_]+", "", str(name)).lower()


def _is_redundant(key: str, value: Any, read: Values) -> bool:
    """Whether a column says nothing that the prompt (of preference data: the same response) does not say too."""
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        return False
    if key in _RESPONSES:
        found = [read.get(name) for name in _RESPONSES[key]]
        return all(any(text in one if isinstance(one, list) else text == one for one in found) for text in texts)
    instruction = read.get("instruction")
    return isinstance(instruction, str) and all(holds(instruction, text.strip()) for text in texts)
