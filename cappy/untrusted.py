"""Limits on untrusted input: size and depth of JSON and YAML before they are parsed, and growth by a tokenizer.

A few lines of YAML can expand to any number of values, by aliases of lists of aliases, so the expanded values are
counted first. A text that exceeds a limit raises `yaml.YAMLError` with the position, like invalid YAML.

The tokenizer in a model's folder can expand a sentence to gigabytes with a file of one kilobyte. The loaded tokenizer
is checked, without its vocabulary, before it processes any text.
"""

import base64
import codecs
import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, cast

import yaml

from cappy.errors import quote

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JSON: TypeAlias = "Mapping[str, JSON] | Sequence[JSON] | str | int | float | bool | None"
"""A JSON value; parsed ones consist of dict and list."""
MAX_VALUES = 4_000_000
"""Limit of brackets, commas and colons in one text; 64 responses of 4,096 tokens with logprobs have 3.4 million."""
MAX_DEPTH = 64
MAX_COUNT = 2**53
"""Largest accepted count; floats represent integers exactly up to it."""
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_CHARSET = re.compile(r";\s*charset\s*=\s*[\"']?([A-Za-z0-9._:-]{1,40})", re.IGNORECASE)
_REJECTED_CODECS = ("idna", "punycode", "unicode_escape", "raw_unicode_escape", "unicode-escape", "raw-unicode-escape")
"""Python codecs for escapes and host names, which are not charsets; the latter take quadratic time."""
_STRUCTURE = b"{}[],:"
_NOT_STRUCTURE = bytes(byte for byte in range(256) if byte not in _STRUCTURE)
_SEPARATORS = b",:"
_DEPTH_CHANGE = {ord("{"): 1, ord("["): 1, ord("}"): -1, ord("]"): -1}


def read_json(data: bytes, *, max_values: int = MAX_VALUES, max_depth: int = MAX_DEPTH) -> JSON:
    """Parses JSON. Raises ValueError if it is invalid or has more values or levels than allowed.

    Brackets, commas and colons are counted before any object is created. NaN, Infinity and numbers that overflow a
    float become None. Raises UnicodeDecodeError (a ValueError) if the data is not UTF-8 (see `to_utf8`).
    """
    # Some servers send a byte order mark.
    text = data.decode("utf-8").removeprefix("\ufeff")
    structure = _STRING.sub(b"", data).translate(None, _NOT_STRUCTURE)
    if len(structure) > max_values:
        raise ValueError(f"more than {max_values} values")
    brackets = structure.translate(None, _SEPARATORS)
    if max(accumulate(map(_DEPTH_CHANGE.__getitem__, brackets)), default=0) > max_depth:
        raise ValueError(f"nested more than {max_depth} deep")
    try:
        value: JSON = json.loads(text, parse_constant=_null_constant, parse_float=_finite)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        # Python parses integers of at most 4300 digits.
        raise ValueError("a number with too many digits, or too deeply nested to parse") from error
    return value


def to_utf8(body: bytes, content_type: str) -> bytes:
    """The body as UTF-8 if the charset of its content type can decode it; else the body unchanged.

    JSON is UTF-8 whatever the header says, so the charset is used only if the bytes are not UTF-8 or contain NUL, which
    JSON in UTF-8 never does. Codecs that are not character encodings are ignored.
    """
    if b"\0" not in body and is_utf8(body):
        return body
    match = _CHARSET.search(content_type)
    try:
        charset = codecs.lookup(match[1]).name if match else ""
        return body.decode(charset).encode() if charset and charset not in _REJECTED_CODECS else body
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
    """Whether the value is an integer from 0 to 2**53."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT


def replace_surrogates(text: str) -> str:
    """The text with U+FFFD for unpaired surrogates, which servers create by truncation and UTF-8 cannot encode."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _null_constant(name: str) -> None:
    return None


def _finite(digits: str) -> float | None:
    value = float(digits)
    return value if math.isfinite(value) else None


MAX_CHARACTERS = 2**20
MAX_NODES = 200_000
"""Maximum scalars, lists and mappings of a document, with aliases expanded."""
MAX_ENTRIES = 10_000
"""Maximum keys of one mapping: numbers can be chosen so that all of them collide in a dict."""
MAX_PLAIN_CHARACTERS = 1_000
"""Maximum characters of a scalar that may be a number, a date or a key; only texts may be longer."""

Loader: TypeAlias = "yaml.SafeLoader | yaml.CSafeLoader"
FAST_LOADER: type[Loader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The safe loader, in C if available."""
_NUMBER = re.compile(r"[-+0-9_.:a-fxobtz \t]*", re.IGNORECASE)
"""Matches every number and date of YAML, and more."""
_TEXT_TAGS = (None, "!", "tag:yaml.org,2002:str")


def load_yaml(text: str | bytes, loader: type[Loader] = FAST_LOADER, *, max_characters: int = MAX_CHARACTERS) -> object:
    """Parses a text of one document. Raises yaml.YAMLError if it is invalid or exceeds a limit.

    `loader` is one of PyYAML's safe loaders or a subclass. Raises TypeError for any other, since it could construct any
    object.
    """
    if not issubclass(loader, (yaml.SafeLoader, FAST_LOADER)):
        raise TypeError(f"{loader.__name__} is not a safe loader")
    with _as_yaml_errors():
        _check_limits(text, max_characters)
        return yaml.load(text, loader)  # noqa: S506 # a safe loader, by the check above


def load_all_yaml(text: str | bytes, *, max_characters: int = MAX_CHARACTERS) -> list[object]:
    """Parses all documents of a text. Raises yaml.YAMLError if it is invalid or exceeds a limit."""
    with _as_yaml_errors():
        _check_limits(text, max_characters)
        return list(yaml.load_all(text, FAST_LOADER))


@contextlib.contextmanager
def _as_yaml_errors() -> Iterator[None]:
    """Turns the errors that PyYAML raises for invalid values (the month 99, a wrong tag) into a YAMLError."""
    try:
        yield
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        problem = str(error) if isinstance(error, ValueError) else "wrong tag"
        raise yaml.MarkedYAMLError(problem=f"contains an invalid value ({problem})") from error


def _check_limits(text: str | bytes, max_characters: int) -> None:
    """Checks the length of a text and the number of its expanded values.

    Counting is cheap, because a text has hardly more parser events than characters, even if aliases expand to many
    values.
    """
    if len(text) > max_characters:
        raise yaml.MarkedYAMLError(problem=f"is longer than {max_characters:,} characters")
    counter = _EventCounter()
    for event in yaml.parse(text, FAST_LOADER):
        counter.add(event)


class _EventCounter:
    """Counts the values of a document, with aliases expanded, and checks them against the limits."""

    def __init__(self) -> None:
        self._open: list[tuple[str | None, bool]] = []
        self._total = 0
        self._sizes: list[int] = [0]
        self._entries: list[int] = [0]
        self._anchors: dict[str, int] = {}

    def add(self, event: yaml.Event) -> None:
        """Counts one event. Raises YAMLError if a limit is exceeded."""
        if isinstance(event, yaml.CollectionStartEvent):
            self._open.append((event.anchor, isinstance(event, yaml.MappingStartEvent)))
            self._sizes.append(0)
            self._entries.append(0)
            if len(self._open) > MAX_DEPTH:
                raise _yaml_error(event, f"is nested more than {MAX_DEPTH} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, _ = self._open.pop()
            self._entries.pop()
            size = self._sizes.pop()
            self._total -= size
            self._count(event, size + 1, anchor)
        elif isinstance(event, yaml.ScalarEvent):
            if len(event.value) > MAX_PLAIN_CHARACTERS and not _is_text(event):
                raise _yaml_error(
                    event, f"has a value of more than {MAX_PLAIN_CHARACTERS:,} characters that is not a quoted text"
                )
            self._count(event, 1, event.anchor)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise _yaml_error(event, f"the alias {str(event.anchor)[:40]!r} is used before its value is complete")
            self._count(event, self._anchors[event.anchor], None)
        elif isinstance(event, yaml.DocumentStartEvent):
            self._anchors.clear()

    def _count(self, event: yaml.Event, size: int, anchor: str | None) -> None:
        if anchor is not None:
            self._anchors[anchor] = size
        self._total += size
        self._sizes[-1] += size
        self._entries[-1] += 1
        if self._total > MAX_NODES:
            raise _yaml_error(event, f"expands to more than {MAX_NODES:,} values")
        if self._open and self._open[-1][1] and self._entries[-1] > 2 * MAX_ENTRIES:
            raise _yaml_error(event, f"has a mapping of more than {MAX_ENTRIES:,} keys")


def _is_text(event: yaml.ScalarEvent) -> bool:
    """Whether a scalar is a text: by its tag, by its quotes, or because it cannot be a number or a date."""
    return event.tag in _TEXT_TAGS and not (event.implicit[0] and _NUMBER.fullmatch(event.value))


def _yaml_error(event: yaml.Event, problem: str) -> yaml.MarkedYAMLError:
    # The C loader's marks have another class, which is missing in the stubs of PyYAML.
    mark = cast("yaml.error.Mark | None", event.start_mark)
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


MAX_GROWTH = 64
"""Factor by which all replacements of a normalizer together may lengthen a text."""
MAX_COMPONENTS = 64
"""Maximum components of a normalizer, a pre-tokenizer, a post-processor or a decoder; known ones have up to a dozen."""
MAX_INSERTED_CHARACTERS = 256
"""Maximum characters that a component may insert into every text, or before every word."""
MAX_WORD_CHARACTERS = 1_000
"""Longest word that WordPiece splits: its time is quadratic in the length."""

_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_SEQUENCE_KEYS = ("normalizers", "pretokenizers", "processors", "decoders")
_TOKEN_KEYS = ("single", "pair", "special_tokens", "ids", "tokens")


def check_text_growth(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises ValueError if a component lengthens texts too much; a pure Python tokenizer has no components."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    for name in _PARTS if backend is not None else ():
        part = getattr(backend, name)
        if part is not None:
            _check_part(name, json.loads(part.__getstate__()))
    model = getattr(backend, "model", None)
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        _check_text(name, getattr(model, name, None) or "")
    if (getattr(model, "max_input_chars_per_word", None) or 0) > MAX_WORD_CHARACTERS:
        raise ValueError(f"its max_input_chars_per_word is above {MAX_WORD_CHARACTERS:,}")


def _check_part(name: str, state: object) -> None:
    growth = 1.0
    for count, component in enumerate(_components(state), start=1):
        if count > MAX_COMPONENTS:
            raise ValueError(f"its {name} has more than {MAX_COMPONENTS} components")
        for key, value in component.items():
            if key in _TOKEN_KEYS and isinstance(value, list | dict) and len(value) > MAX_COMPONENTS:
                raise ValueError(f"its {name} adds {len(value):,} tokens to every text")
            if isinstance(value, str) and key not in ("precompiled_charsmap", "Regex", "type"):
                _check_text(f"{name}.{key}", value)
        if component.get("type") == "Replace":
            growth *= _max_growth(component)
        if growth > MAX_GROWTH:
            raise ValueError(f"its {name} makes texts up to {growth:,.0f} times longer")
        if component.get("precompiled_charsmap"):
            _check_charsmap(name, component["precompiled_charsmap"])


def _components(state: object) -> Iterator[Mapping[str, Any]]:
    """All components of nested sequences, and their special tokens."""
    pending = [state]
    while pending:
        component = pending.pop()
        if isinstance(component, Mapping):
            yield component
            pending += [item for name in _SEQUENCE_KEYS for item in component.get(name) or ()]
            if isinstance(tokens := component.get("special_tokens"), Mapping):
                pending += list(tokens.values())[: MAX_COMPONENTS + 1]


def _max_growth(component: Mapping[str, Any]) -> float:
    """Factor by which a replacement can lengthen a text; a regex may match between any two characters."""
    content, pattern = component.get("content", ""), component.get("pattern", {})
    text = pattern.get("String", "") if isinstance(pattern, Mapping) else ""
    return max(1.0, len(content) / len(text) if text else 1.0 + len(content) if len(content) > 1 else 1.0)


def _check_text(name: str, text: str) -> None:
    if len(text) > MAX_INSERTED_CHARACTERS:
        raise ValueError(f"its {name} has {len(text):,} characters ({quote(text, 20)})")


def _check_charsmap(name: str, text: str) -> None:
    """Checks the replacement texts of a charsmap. Its layout is: size of the trie, trie, NUL-terminated texts."""
    data = base64.b64decode(text)
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    if (longest := max(map(len, texts.split(b"\0")))) > MAX_INSERTED_CHARACTERS:
        raise ValueError(f"its {name} replaces a character by {longest:,} bytes")
