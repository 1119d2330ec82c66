"""Reads users' JSON files: one object per line, objects over several lines, or an array of objects."""

import contextlib
import json
import re
from pathlib import Path

from cappy.errors import RecordError, quote
from cappy.preparation.rows import Rows, Values
from cappy.preparation.text_files import (
    COMPRESSION_SUFFIXES,
    MAX_LINE_BYTES,
    is_compressed,
    read_lines,
    read_pieces,
    strip_compression_suffix,
)

_DECODER = json.JSONDecoder()
_ROW_KEYS = ("data", "rows", "train", "validation", "test", "examples", "instances", "items", "records", "samples")
_PEEK_CHARACTERS = 4_096
_WHITESPACE = " \t\r\n"
_REMEDY = 'write one object per line: {"instruction": "...", "reference": "..."}'
_SUFFIXES = (".jsonl", ".json", ".ndjson")
_FORMATS = "JSON Lines (.jsonl), a JSON array (.json), CSV (.csv), TSV (.tsv), Parquet (.parquet) or Arrow (.arrow)"
_TRUNCATED = "the file is truncated; fetch or write it again"


def read_json_lines(path: Path) -> Rows:
    """Yields the objects of a file with their locations, and skips blank lines.

    The objects of an array, and objects over several lines, are also read one at a time. Raises RecordError, with the
    line, for anything that is not an object.
    """
    for index, (where, values) in enumerate(_read_multi_line(path) if _is_multi_line(path) else _read_by_line(path)):
        if index == 0:
            _refuse_table(where, values, path)
        yield where, values


def _read_by_line(path: Path) -> Rows:
    remedy = _remedy_for(path)
    for number, text in read_lines(path):
        if text.strip():
            where = f"{path}:{number}"
            yield where, _parse_object(where, text, remedy)
            remedy = _REMEDY


def _remedy_for(path: Path) -> str:
    """The remedy for a file whose first row is not a JSON object, by the suffix of its name."""
    if path.suffix in COMPRESSION_SUFFIXES and not is_compressed(path):
        return f"it is named {path.suffix} but is not compressed; fetch it again, or give {_FORMATS}"
    suffix = strip_compression_suffix(path).suffix
    if suffix.lower() in _SUFFIXES:
        return _REMEDY
    kind = f"a {suffix} file" if suffix else "a file without a suffix"
    return f"{kind} is read as JSON Lines; give {_FORMATS}"


def _refuse_table(where: str, values: Values, path: Path) -> None:
    """Raises RecordError if the first object is not a row but a whole table, by rows or by columns."""
    if "instruction" in values and isinstance(values["instruction"], str):
        return
    key = next((name for name in _ROW_KEYS if _is_rows(values.get(name))), None)
    if key is not None:
        command = f"jq -c '.[\"{key}\"][]' {path.name} > rows.jsonl"
        raise RecordError(f"{where}: is one object with all rows under {quote(key)}; write one row per line: {command}")
    if values and all(isinstance(value, dict) and "0" in value for value in values.values()):
        remedy = "write it by rows: DataFrame.to_json(FILE, orient='records', lines=True)"
        raise RecordError(f"{where}: is a table by columns, as written by pandas; {remedy}")


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value[:2])


def _is_multi_line(path: Path) -> bool:
    """Whether a file begins with an array of objects, or with an object over several lines."""
    beginning = ""
    with contextlib.suppress(RecordError):  # the reader raises it again with the line
        for piece in read_pieces(path, errors="replace", size=_PEEK_CHARACTERS):
            beginning = (beginning + piece).lstrip(_WHITESPACE)
            if len(beginning) > 1:
                break
    if beginning[:1] == "[":
        return beginning[1:].lstrip(_WHITESPACE)[:1] in ("", "{", "]")
    first_line, newline, _ = beginning.partition("\n")
    if beginning[:1] != "{" or not newline or first_line.rstrip()[-1:] not in "{[,:":
        return False
    try:
        json.loads(first_line)
    except (ValueError, RecursionError):
        return True
    return False


def _is_truncated(error: Exception) -> bool:
    """Whether parsing failed only because the text ends, so that reading more may help."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    rest = error.doc[error.pos :].strip()
    in_string = error.msg.startswith("Unterminated string") or (error.msg.startswith("Invalid \\u") and len(rest) < 6)
    in_word = any(word.startswith(rest) for word in ("true", "false", "null", "-"))
    return not rest or in_string or in_word or re.fullmatch(r"[.eE][-+]?", rest) is not None


class _TextReader:
    """Reads JSON values one at a time from the text of a file, which it buffers."""

    def __init__(self, path: Path) -> None:
        self._pieces = read_pieces(path)
        self._text, self._position, self._path, self._line = "", 0, path, 1

    @property
    def where(self) -> str:
        return f"{self._path}:{self._line}"

    def peek(self, skipped: str = _WHITESPACE) -> str:
        """Skips the characters in `skipped` and returns the next one without consuming it; empty at the end."""
        while True:
            end = self._position
            while end < len(self._text) and self._text[end] in skipped:
                end += 1
            self.advance(end - self._position)
            if end < len(self._text):
                return self._text[end]
            if not self._read_more():
                return ""

    def advance(self, count: int) -> None:
        """Consumes `count` characters."""
        self._line += self._text.count("\n", self._position, self._position + count)
        self._position += count

    def read_value(self, container: str) -> object:
        """Reads the JSON value at the current position.

        `container` is what the value is part of, for errors: "array" or "file". Raises RecordError if the value is
        invalid or longer than `MAX_LINE_BYTES`.
        """
        while True:
            try:
                item, end = _DECODER.raw_decode(self._text, self._position)
            except (ValueError, RecursionError) as error:
                num_characters = len(self._text) - self._position
                if (
                    isinstance(error, RecursionError)
                    or num_characters > MAX_LINE_BYTES
                    or not self._read_more(num_characters)
                ):
                    if num_characters <= MAX_LINE_BYTES and _is_truncated(error):
                        raise RecordError(
                            f"{self.where}: the {container} ends within the object that begins here; {_TRUNCATED}"
                        ) from error
                    reason = str(error).splitlines()[0]
                    got = quote(self._text[self._position : self._position + 60])
                    raise RecordError(f"{self.where}: is not JSON ({reason}), got {got}; {_REMEDY}") from error
            else:
                self.advance(end - self._position)
                return item

    def preview(self) -> str:
        """The next characters, for an error."""
        return quote(self._text[self._position : self._position + 60])

    def _read_more(self, size: int = 1) -> bool:
        """Reads at least `size` more characters; returns False at the end of the file.

        `read_value` doubles the buffer, so that repeatedly parsing one large object does not take quadratic
        time.
        """
        parts, characters = [self._text[self._position :]], 0
        while characters < size and (piece := next(self._pieces, "")):
            parts.append(piece)
            characters += len(piece)
        self._text, self._position = "".join(parts), 0
        return characters > 0


def _read_multi_line(path: Path) -> Rows:
    reader = _TextReader(path)
    is_array = reader.peek() == "["
    if is_array:
        reader.advance(1)
    skipped = _WHITESPACE + "," if is_array else _WHITESPACE
    while (first := reader.peek(skipped)) and not (is_array and first == "]"):
        where = reader.where
        yield where, _check_object(where, reader.read_value("array" if is_array else "file"))
    if not is_array:
        return
    if not first:
        raise RecordError(f"{reader.where}: the array has no end; {_TRUNCATED}")
    reader.advance(1)
    if reader.peek():
        raise RecordError(f"{reader.where}: unexpected text after the end of the array: {reader.preview()}; delete it")


def _parse_object(where: str, text: str, remedy: str) -> Values:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise RecordError(f"{where}: is not JSON ({reason}), got {quote(text.strip())}; {remedy}") from error
    return _check_object(where, value, remedy)


def _check_object(where: str, value: object, remedy: str = _REMEDY) -> Values:
    if not isinstance(value, dict):
        raise RecordError(f"{where}: must be a JSON object, got {quote(value)}; {remedy}")
    return value
