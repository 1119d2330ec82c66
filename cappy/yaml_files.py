"""Reads untrusted YAML as plain values within limits: what it expands to is counted before anything is built.

A few lines of YAML can stand for any amount of values, by aliases of lists of aliases. Such a text is refused as
PyYAML refuses a wrong one, with a `yaml.YAMLError` that has its place, so that callers need no second way out.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import yaml

MAX_CHARACTERS = 2**20
MAX_NODES = 200_000
"""Scalars, lists and mappings, those behind each alias counted again."""
MAX_DEPTH = 64
MAX_ENTRIES = 10_000
"""Keys of one mapping: numbers can be chosen so that each key is compared with all others."""
MAX_WORD = 1_000
"""Characters of a scalar that may be a number, a date or a key: texts alone may be longer."""

FAST_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The safe loader, in C where it is."""
_NUMBER = re.compile(r"[-+0-9_.:a-fxobtz \t]*", re.IGNORECASE)
"""Where each number and date of YAML is one of."""
_TEXT = (None, "!", "tag:yaml.org,2002:str")


def load_yaml(text: str | bytes, loader: Any = FAST_LOADER, *, max_characters: int = MAX_CHARACTERS) -> Any:
    """The value of a text that is one document. yaml.YAMLError for a text out of bounds.

    `loader` is one of PyYAML's safe loaders or a class of them; TypeError for any other, which could make objects.
    """
    if not issubclass(loader, (yaml.SafeLoader, FAST_LOADER)):
        raise TypeError(f"{loader.__name__} is not a safe loader")
    with _as_yaml_errors():
        _check(text, max_characters)
        return yaml.load(text, loader)  # noqa: S506 # a safe loader, by the check above


def load_all_yaml(text: str | bytes, *, max_characters: int = MAX_CHARACTERS) -> list[Any]:
    """The values of all documents of a text; yaml.YAMLError for a text out of bounds."""
    with _as_yaml_errors():
        _check(text, max_characters)
        return list(yaml.load_all(text, FAST_LOADER))


@contextlib.contextmanager
def _as_yaml_errors() -> Iterator[None]:
    """What PyYAML raises of values that are none (the month 99, a tag that does not fit) becomes a YAMLError."""
    try:
        yield
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        problem = str(error) if isinstance(error, ValueError) else "its tag does not fit"
        raise yaml.MarkedYAMLError(problem=f"holds a value that is none ({problem})") from error


def _check(text: str | bytes, max_characters: int) -> None:
    """Walks the events of the text, which are never many more than its characters."""
    if len(text) > max_characters:
        raise yaml.MarkedYAMLError(problem=f"is longer than {max_characters:,} characters")
    walk = _Walk()
    for event in _events(text):
        walk.step(event)


def _events(text: str | bytes) -> Iterator[Any]:
    events: Iterator[Any] = yaml.parse(text, FAST_LOADER)
    return events


class _Walk:
    """How much every open list and mapping holds so far, and what each anchor stands for."""

    def __init__(self) -> None:
        self._open: list[tuple[str | None, bool]] = []
        self._total = 0
        self._sizes: list[int] = [0]
        self._entries: list[int] = [0]
        self._anchors: dict[str, int] = {}

    def step(self, event: Any) -> None:
        """Counts one event; YAMLError where it is one too many."""
        if isinstance(event, yaml.CollectionStartEvent):
            self._open.append((event.anchor, isinstance(event, yaml.MappingStartEvent)))
            self._sizes.append(0)
            self._entries.append(0)
            if len(self._open) > MAX_DEPTH:
                raise _refusal(event, f"is nested more than {MAX_DEPTH} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, _ = self._open.pop()
            self._entries.pop()
            held = self._sizes.pop()
            self._total -= held
            self._add(event, held + 1, anchor)
        elif isinstance(event, yaml.ScalarEvent):
            if len(event.value) > MAX_WORD and not _is_text(event):
                raise _refusal(event, f"has a value of more than {MAX_WORD:,} characters that is not a quoted text")
            self._add(event, 1, event.anchor)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise _refusal(event, f"the alias {str(event.anchor)[:40]!r} stands before its value is complete")
            self._add(event, self._anchors[event.anchor], None)
        elif isinstance(event, yaml.DocumentStartEvent):
            self._anchors.clear()

    def _add(self, event: Any, size: int, anchor: str | None) -> None:
        if anchor is not None:
            self._anchors[anchor] = size
        self._total += size
        self._sizes[-1] += size
        self._entries[-1] += 1
        if self._total > MAX_NODES:
            raise _refusal(event, f"stands for more than {MAX_NODES:,} values")
        if self._open and self._open[-1][1] and self._entries[-1] > 2 * MAX_ENTRIES:
            raise _refusal(event, f"has a mapping of more than {MAX_ENTRIES:,} keys")


def _is_text(event: Any) -> bool:
    """Whether a scalar is a text, by its tag or quotes, or since it reads as no number and no date."""
    return event.tag in _TEXT and not (event.implicit[0] and _NUMBER.fullmatch(event.value))


def _refusal(event: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
