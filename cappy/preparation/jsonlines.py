"""JSON of a user's own: one object per line, objects over several lines, or an array of objects."""

import contextlib
import json
import re
from pathlib import Path

from cappy.errors import RecordError, quote
from cappy.preparation.rows import Rows, Values
from cappy.preparation.text_files import MAX_LINE_BYTES, is_packed, lines, pieces, plain
from cappy.preparation.text_files import SUFFIXES as PACKED

_DECODER = json.JSONDecoder()
_HOLDERS = ("data", "rows", "train", "validation", "test", "examples", "instances", "items", "records", "samples")
_PEEKED = 4_096
_BLANK = " \t\r\n"
_REMEDY = 'write one object per line: {"instruction": "...", "reference": "..."}'
_SUFFIXES = (".jsonl", ".json", ".ndjson")
_FORMATS = "JSON Lines (.jsonl), a JSON array (.json), CSV (.csv), TSV (.tsv), Parquet (.parquet) or Arrow (.arrow)"
_CUT = "the file is cut off, fetch or write it again"


def read_json_lines(path: Path) -> Rows:
    """The objects of a file, blank lines left out; RecordError names the line that holds none.

    An array of objects, or objects that go over several lines, are read one by one too.
    """
    for index, (where, values) in enumerate(_stream(path) if _is_stream(path) else _by_line(path)):
        if index == 0:
            _refuse_whole(where, values, path)
        yield where, values


def _by_line(path: Path) -> Rows:
    remedy = _remedy(path)
    for number, text in lines(path):
        if text.strip():
            where = f"{path}:{number}"
            yield where, _object(where, text, remedy)
            remedy = _REMEDY


def _remedy(path: Path) -> str:
    """What mends a file whose first row is not a JSON object: where its name promises no JSON, another file."""
    if path.suffix in PACKED and not is_packed(path):
        return f"its name says that it is packed ({path.suffix}), and it is not; fetch it again, or give {_FORMATS}"
    suffix = plain(path).suffix
    if suffix.lower() in _SUFFIXES:
        return _REMEDY
    kind = f"a {suffix} file" if suffix else "a file whose name has no suffix"
    return f"{kind} is read as JSON Lines; give {_FORMATS}"


def _refuse_whole(where: str, values: Values, path: Path) -> None:
    """RecordError where the first object is not a row, but holds the rows or the columns of a whole table."""
    if "instruction" in values and isinstance(values["instruction"], str):
        return
    held = next((name for name in _HOLDERS if _is_rows(values.get(name))), None)
    if held is not None:
        command = f"jq -c '.[\"{held}\"][]' {path.name} > rows.jsonl"
        raise RecordError(f"{where}: is one object that holds rows under {quote(held)}; write them apart: {command}")
    if values and all(isinstance(value, dict) and "0" in value for value in values.values()):
        remedy = "write it by rows: DataFrame.to_json(FILE, orient='records', lines=True)"
        raise RecordError(f"{where}: is a table by columns, as pandas writes it; {remedy}")


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value[:2])


def _is_stream(path: Path) -> bool:
    """Whether a file begins with an array of objects, or with an object that its first line does not end."""
    begin = ""
    with contextlib.suppress(RecordError):  # whoever reads on names the line
        for piece in pieces(path, errors="replace", size=_PEEKED):
            begin = (begin + piece).lstrip(_BLANK)
            if len(begin) > 1:
                break
    if begin[:1] == "[":
        return begin[1:].lstrip(_BLANK)[:1] in ("", "{", "]")
    first, newline, _ = begin.partition("\n")
    if begin[:1] != "{" or not newline or first.rstrip()[-1:] not in "{[,:":
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return False


def _is_cut(error: Exception) -> bool:
    """Whether a JSON value is wrong at the end of the text alone, so that more of it may follow."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    left = error.doc[error.pos :].strip()
    within_text = error.msg.startswith("Unterminated string") or (error.msg.startswith("Invalid \\u") and len(left) < 6)
    within_word = any(word.startswith(left) for word in ("true", "false", "null", "-"))
    return not left or within_text or within_word or re.fullmatch(r"[.eE][-+]?", left) is not None


class _Text:
    """The text of a file from a place on, read further as it is needed."""

    def __init__(self, path: Path) -> None:
        self._pieces = pieces(path)
        self._text, self._at, self._path, self._line = "", 0, path, 1

    @property
    def where(self) -> str:
        return f"{self._path}:{self._line}"

    def next(self, blank: str = _BLANK) -> str:
        """The first character that is not blank; empty at the end of the file."""
        while True:
            end = self._at
            while end < len(self._text) and self._text[end] in blank:
                end += 1
            self.drop(end - self._at)
            if end < len(self._text):
                return self._text[end]
            if not self._extend():
                return ""

    def drop(self, count: int) -> None:
        """Goes on by so many characters."""
        self._line += self._text.count("\n", self._at, self._at + count)
        self._at += count

    def value(self, whole: str) -> object:
        """The JSON value that begins here; RecordError where there is none, or one of more than a line may have.

        `whole` is what the value is part of, for an error: the array or the file.
        """
        while True:
            try:
                item, end = _DECODER.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                held = len(self._text) - self._at
                if isinstance(error, RecursionError) or held > MAX_LINE_BYTES or not self._extend(held):
                    if held <= MAX_LINE_BYTES and _is_cut(error):
                        raise RecordError(
                            f"{self.where}: the {whole} ends early, within the object that begins there; {_CUT}"
                        ) from error
                    reason = str(error).splitlines()[0]
                    got = quote(self._text[self._at : self._at + 60])
                    raise RecordError(f"{self.where}: is not JSON ({reason}), got {got}; {_REMEDY}") from error
            else:
                self.drop(end - self._at)
                return item

    def rest(self) -> str:
        """The beginning of what is left, for an error."""
        return quote(self._text[self._at : self._at + 60])

    def _extend(self, size: int = 1) -> bool:
        """Reads at least so many characters more, so that an object that is tried again costs no square of its size."""
        parts, characters = [self._text[self._at :]], 0
        while characters < size and (piece := next(self._pieces, "")):
            parts.append(piece)
            characters += len(piece)
        self._text, self._at = "".join(parts), 0
        return characters > 0


def _stream(path: Path) -> Rows:
    text = _Text(path)
    array = text.next() == "["
    if array:
        text.drop(1)
    blank = _BLANK + "," if array else _BLANK
    while (first := text.next(blank)) and not (array and first == "]"):
        where = text.where
        yield where, _check_object(where, text.value("array" if array else "file"))
    if not array:
        return
    if not first:
        raise RecordError(f"{text.where}: the array has no end; {_CUT}")
    text.drop(1)
    if text.next():
        raise RecordError(f"{text.where}: stands after the end of the array, got {text.rest()}; delete it")


def _object(where: str, text: str, remedy: str) -> Values:
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
