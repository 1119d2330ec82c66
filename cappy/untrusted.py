"""Reads untrusted JSON within limits on its number of values, its depth and its numbers."""

import codecs
import json
import math
import re
from itertools import accumulate
from typing import Any, TypeGuard

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


def read_json(data: bytes, *, max_values: int = MAX_VALUES, max_depth: int = MAX_DEPTH) -> Any:
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
        return json.loads(text, parse_constant=_nothing, parse_float=_finite)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        # Python makes no number of more than 4300 digits.
        raise ValueError("a number with too many digits, or no room to read it") from error


def to_utf8(body: bytes, content_type: str) -> bytes:
    """The body in UTF-8, where it is valid or its header names a charset that fits; else the body as it is.

    JSON is UTF-8 whatever a header says, so the header counts only where the bytes are not UTF-8, or hold NUL, which no
    JSON in UTF-8 does. Charsets that are no encoding of characters are not applied.
    """
    if b"\0" not in body and is_utf8(body):
        return body
    found = _CHARSET.search(content_type)
    try:
        charset = codecs.lookup(found[1]).name if found else ""
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


def _nothing(name: str) -> None:
    return None


def _finite(digits: str) -> float | None:
    value = float(digits)
    return value if math.isfinite(value) else None
