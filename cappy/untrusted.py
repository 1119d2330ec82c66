"""JSON and YAML that others wrote: bounded in size and depth before anything is built of it.

A few lines of YAML can stand for any amount of values, by aliases of lists of aliases: what a text expands to is
counted first. One out of bounds is refused as PyYAML refuses a wrong one, with a `yaml.YAMLError` that has its place.
"""

import codecs
import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TypeAlias, TypeGuard, cast

import yaml

JSON: TypeAlias = "Mapping[str, JSON] | Sequence[JSON] | str | int | float | bool | None"
"""A value of JSON, read or to be written; what was read has dict and list."""
MAX_VALUES = 4_000_000
"""Brackets, commas and colons of one text: 64 responses of 4,096 tokens with log-probabilities have 3.4 million."""
MAX_DEPTH = 64
MAX_COUNT = 2**53
"""A larger number is not accepted as a count: no real count is, and floats are exact up to it."""
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_CHARSET = re.compile(r";\s*charset\s*=\s*[\"']?([A-Za-z0-9._:-]{1,40})", re.IGNORECASE)
_NO_CHARSETS = ("idna", "punycode", "unicode_escape", "raw_unicode_escape", "unicode-escape", "raw-unicode-escape")
"""Codecs of Python that read escapes or names of hosts, the latter in the square of the length."""
_STRUCTURE = b"{}[],:"
_OTHERS = bytes(byte for byte in range(256) if byte not in _STRUCTURE)
_SEPARATORS = b",:"
_STEP = {ord("{"): 1, ord("["): 1, ord("}"): -1, ord("]"): -1}


def read_json(data: bytes, *, max_values: int = MAX_VALUES, max_depth: int = MAX_DEPTH) -> JSON:
    """The value of a JSON text; ValueError if it is none, has more values or is deeper than allowed.

    What is counted are its brackets, commas and colons, before a single object is made. UnicodeDecodeError, which is a
    ValueError, if it is not UTF-8 (see `to_utf8`). NaN, Infinity and numbers beyond any float become None.
    """
    # JSON is UTF-8; some servers put a mark before it all the same.
    text = data.decode("utf-8").removeprefix("\ufeff")
    structure = _STRING.sub(b"", data).translate(None, _OTHERS)
    if len(structure) > max_values:
        raise ValueError(f"more than {max_values} values")
    brackets = structure.translate(None, _SEPARATORS)
    if max(accumulate(map(_STEP.__getitem__, brackets)), default=0) > max_depth:
        raise ValueError(f"nested more than {max_depth} deep")
    try:
        value: JSON = json.loads(text, parse_constant=_null_constant, parse_float=_finite)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        # Python makes no number of more than 4300 digits.
        raise ValueError("a number with too many digits, or no room to read it") from error
    return value


def to_utf8(body: bytes, content_type: str) -> bytes:
    """The body in UTF-8, where it is valid or its header names a charset that fits; else the body as it is.

    JSON is UTF-8 whatever a header says, so the header counts only where the bytes are not UTF-8, or hold NUL, which no
    JSON in UTF-8 does. Charsets that are not encodings of characters are not applied.
    """
    if b"\0" not in body and is_utf8(body):
        return body
    match = _CHARSET.search(content_type)
    try:
        charset = codecs.lookup(match[1]).name if match else ""
        return body.decode(charset).encode() if charset and charset not in _NO_CHARSETS else body
    except (LookupError, ValueError):
        return body


def is_utf8(data: bytes) -> bool:
    """Whether the bytes are valid UTF-8."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def is_count(value: object) -> TypeGuard[int]:
    """Whether the value is a whole number that may count something, 0 to 2**53."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT


def whole(text: str) -> str:
    """The text with U+FFFD for each half of a character: servers cut where they like, and no file could hold one."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _null_constant(name: str) -> None:
    return None


def _finite(digits: str) -> float | None:
    value = float(digits)
    return value if math.isfinite(value) else None


MAX_CHARACTERS = 2**20
MAX_NODES = 200_000
"""Scalars, lists and mappings, those behind each alias counted again."""
MAX_DEPTH = 64
MAX_ENTRIES = 10_000
"""Keys of one mapping: numbers can be chosen so that each key is compared with all others."""
MAX_WORD = 1_000
"""Characters of a scalar that may be a number, a date or a key: texts alone may be longer."""

Loader: TypeAlias = "yaml.SafeLoader | yaml.CSafeLoader"
FAST_LOADER: type[Loader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The safe loader, in C where it is."""
_NUMBER = re.compile(r"[-+0-9_.:a-fxobtz \t]*", re.IGNORECASE)
"""Where each number and date of YAML is one of."""
_TEXT = (None, "!", "tag:yaml.org,2002:str")


def load_yaml(text: str | bytes, loader: type[Loader] = FAST_LOADER, *, max_characters: int = MAX_CHARACTERS) -> object:
    """The value of a text that is one document. yaml.YAMLError for a text out of bounds.

    `loader` is one of PyYAML's safe loaders or a class of them; TypeError for any other, which could make objects.
    """
    if not issubclass(loader, (yaml.SafeLoader, FAST_LOADER)):
        raise TypeError(f"{loader.__name__} is not a safe loader")
    with _as_yaml_errors():
        _check(text, max_characters)
        return yaml.load(text, loader)  # noqa: S506 # a safe loader, by the check above


def load_all_yaml(text: str | bytes, *, max_characters: int = MAX_CHARACTERS) -> list[object]:
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
    for event in yaml.parse(text, FAST_LOADER):
        walk.step(event)


class _Walk:
    """How much every open list and mapping holds so far, and what each anchor stands for."""

    def __init__(self) -> None:
        self._open: list[tuple[str | None, bool]] = []
        self._total = 0
        self._sizes: list[int] = [0]
        self._entries: list[int] = [0]
        self._anchors: dict[str, int] = {}

    def step(self, event: yaml.Event) -> None:
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

    def _add(self, event: yaml.Event, size: int, anchor: str | None) -> None:
        if anchor is not None:
            self._anchors[anchor] = size
        self._total += size
        self._sizes[-1] += size
        self._entries[-1] += 1
        if self._total > MAX_NODES:
            raise _refusal(event, f"stands for more than {MAX_NODES:,} values")
        if self._open and self._open[-1][1] and self._entries[-1] > 2 * MAX_ENTRIES:
            raise _refusal(event, f"has a mapping of more than {MAX_ENTRIES:,} keys")


def _is_text(event: yaml.ScalarEvent) -> bool:
    """Whether a scalar is a text, by its tag or quotes, or since it reads as no number and no date."""
    return event.tag in _TEXT and not (event.implicit[0] and _NUMBER.fullmatch(event.value))


def _refusal(event: yaml.Event, problem: str) -> yaml.MarkedYAMLError:
    # The marks of the loader in C are of another class, which PyYAML's stubs leave out here.
    mark = cast("yaml.error.Mark | None", event.start_mark)
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
