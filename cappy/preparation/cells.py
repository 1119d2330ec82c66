"""Parses lists that pandas, NumPy and `datasets` write to CSV as text."""

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator

from cappy.errors import RecordError, quote
from cappy.preparation.rows import Rows

TEXT_FIELDS = ("reference", "references", "choices", "response", "responses")
NUMBER_FIELDS = ("label", "labels")
LIST_FIELDS = ("references", "choices", "responses", "labels", "candidates")
"""Fields that hold lists: text in them that looks like a list must be one; in other fields it may be plain text."""

_TEXT_LIST_START = re.compile(r"""(?:array\()?[\[(]\s*(?:np\.str_\()?[rbuRBU]?['"]""")
_LIST_START = re.compile(
    r"""(?:array\()?[\[(]\s*(?:[rbuRBU]?['"]|[-+.\d]|(?:True|False|None|nan|np\.\w+)\b|\{|[\])])"""
)
_LIST_END = re.compile(r"[\])](?:, dtype=\w+\))?$")
_MISSING_VALUES = ("nan", "NaN", "<NA>")
_CONSTANTS = {"True": True, "False": False, "None": None, "nan": None, "true": True, "false": False, "null": None}
_ITEM, _COMMA = "item", "comma"
_SCALAR = re.compile(
    r"""np\.\w+\(((?:[^()'"]|'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")*)\)|'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
)
"""Matches NumPy scalars, such as np.float64(0.5), and quoted strings, so that scalars inside strings are kept."""
_SQUAD_START = re.compile(r"""\{\s*['"](?:text|answer_start)['"]\s*:""")
MAX_CHARACTERS = 1_000_000
"""Longest text that is parsed as a list."""


def parse_lists(rows: Rows, *, is_csv: bool) -> Rows:
    """Yields the rows, with text that is a list parsed to a list; with `is_csv`, all lists are expected to be text.

    Raises RecordError if the text of a list field looks like a list but cannot be parsed as one.
    """
    fields = {*TEXT_FIELDS, *NUMBER_FIELDS, "candidates"}
    for where, values in rows:
        lists = {
            name: _read_cell(where, name, value, is_csv=is_csv)
            for name in values.keys() & fields
            if isinstance(value := values[name], str)
        }
        for name in ("reference", "references"):
            if isinstance(table := values.get(name), dict) and "text" in table:
                lists[name] = _distinct_texts(table["text"])

        yield where, {**values, **lists} if lists else values


def _distinct_texts(texts: object) -> object:
    """The answers in SQuAD's table of texts and offsets, without duplicates; any other value is returned unchanged."""
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        return list(dict.fromkeys(texts))
    return texts


def _read_squad(where: str, name: str, text: str) -> object:
    """The answers in the text of a SQuAD table; the text itself if it has no `answer_start`."""
    if "answer_start" not in text:
        return text
    try:
        return _distinct_texts(_read_entry(text, "text"))
    except ValueError as error:
        remedy = "write the file as JSON Lines or Parquet"
        problem = f"{name} looks like answers of SQuAD but cannot be read as such ({error}), got {quote(text)}"
        raise RecordError(f"{where}: {problem}; {remedy}") from error


def _read_entry(text: str, key: str) -> object:
    """The text or list under a key of an object written by JSON, Python or NumPy; raises ValueError otherwise."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"longer than {MAX_CHARACTERS:,} characters")
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        segment = _find_segment(text, key)
        return _parse_literal(segment) if segment[:1] in "'\"" else read_list(segment)
    if key not in table:
        raise ValueError(f"it has no {quote(key)}")
    return table[key]


def _find_segment(text: str, key: str) -> str:
    """The source code of one value of a Python dict, so that NumPy values under other keys need not be parsed."""
    try:
        body = ast.parse(text, mode="eval").body
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError("it cannot be read as Python") from error
    pairs = zip(body.keys, body.values, strict=True) if isinstance(body, ast.Dict) else ()
    for name, value in pairs:
        if isinstance(name, ast.Constant) and name.value == key:
            return ast.get_source_segment(text, value) or ""
    raise ValueError(f"it has no {quote(key)}")


def _read_cell(where: str, name: str, text: str, *, is_csv: bool) -> object:
    """The list in a cell, None for a missing list in CSV, or the text itself."""
    stripped = text.strip()
    if name in ("reference", "references") and _SQUAD_START.match(stripped):
        return _read_squad(where, name, stripped)
    if is_csv and name in LIST_FIELDS and stripped in _MISSING_VALUES:
        return None
    pattern = _LIST_START if is_csv else _TEXT_LIST_START
    if not pattern.match(stripped) or (
        name not in LIST_FIELDS and (stripped[0] == "(" or not _LIST_END.search(stripped))
    ):
        return text
    try:
        items = read_list(stripped)
    except ValueError as error:
        if name in LIST_FIELDS or _TEXT_LIST_START.match(stripped):
            remedy = 'write it as JSON (["one", "two"]), or write the file as JSON Lines or Parquet'
            raise RecordError(
                f"{where}: {name} looks like a list but cannot be read as one ({error}), got {quote(text)}; {remedy}"
            ) from error
        return text
    if name in TEXT_FIELDS and not all(isinstance(item, str) for item in items):
        return _keep_text(where, name, text)
    return items


def _keep_text(where: str, name: str, text: str) -> str:
    """Returns a list of numbers as text if the field holds one text; raises RecordError if it holds a list of texts."""
    if name not in LIST_FIELDS:
        return text
    remedy = f'quote its items (["1", "2"]), or read the cell as one text: --columns {name.removesuffix("s")}={name}'
    raise RecordError(f"{where}: {name} must be a list of strings, got {quote(text)}; {remedy}")


def read_list(text: str) -> list[object]:
    """The items of a list written by JSON, Python or NumPy; raises ValueError for anything else.

    NumPy separates items by spaces: `['a' 'b']`. Python would concatenate these to one string.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"longer than {MAX_CHARACTERS:,} characters")
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        return _parse_nested(text) if "{" in text and not _TEXT_LIST_START.match(text) else _parse_flat(text)
    if not isinstance(items, list):
        raise ValueError("it is not a list")
    return items


def _parse_nested(text: str) -> list[object]:
    try:
        items = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError) as error:
        raise ValueError("it cannot be read as Python") from error
    if not isinstance(items, list | tuple):
        raise ValueError("it is not a list")
    return list(items)


def _parse_flat(text: str) -> list[object]:
    stripped = re.sub(r"^array\((.*?)(?:,\s*dtype=[\w<>'.]+)?\)$", r"\1", text, flags=re.DOTALL)
    if stripped[:1] not in "[(" or stripped[-1:] not in "])":
        raise ValueError("it has no closing bracket")
    items: list[object] = []
    kinds: list[str] = []
    for kind, value in _tokenize(stripped[1:-1]):
        kinds.append(kind)
        if kind == _ITEM:
            items.append(value)
    _check_commas(kinds)
    return items


def _check_commas(kinds: list[str]) -> None:
    """Raises ValueError unless there are commas between all items or between none."""
    commas = kinds.count(_COMMA)
    if not commas:
        return
    expected = [_ITEM if index % 2 == 0 else _COMMA for index in range(len(kinds))]
    if kinds != expected:
        raise ValueError("some items have no comma between them")


def _tokenize(text: str) -> Iterator[tuple[str, object]]:
    """The items and commas of a list in order, as pairs of kind and value."""
    sign = ""
    try:
        for token in tokenize.generate_tokens(io.StringIO(f"({_SCALAR.sub(_unwrap_scalar, text)})").readline):
            kind, word = token.type, token.string
            if kind in (tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER, tokenize.COMMENT) and "#" not in word:
                continue
            if kind == tokenize.OP and token.start[0] == 1 and token.start[1] == 0:
                continue
            if kind == tokenize.OP and word in "+-" and not sign:
                sign = word
            elif kind == tokenize.OP and word == ",":
                yield _COMMA, None
            elif kind == tokenize.STRING and word[:1] not in "fF" and not sign:
                yield _ITEM, _parse_literal(word)
            elif kind == tokenize.NUMBER:
                yield _ITEM, _parse_literal(sign + word)
                sign = ""
            elif kind == tokenize.NAME and word in _CONSTANTS and not sign:
                yield _ITEM, _CONSTANTS[word]
            elif kind == tokenize.OP and word == ")" and token.line[token.end[1] :].strip() == "":
                continue
            else:
                raise ValueError(f"it contains {quote(word, 20)}")
    except (tokenize.TokenError, IndentationError, SyntaxError) as error:
        raise ValueError("its quotes or brackets do not close") from error


def _unwrap_scalar(match: re.Match[str]) -> str:
    return match[0] if match[1] is None else match[1]


def _parse_literal(text: str) -> object:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{quote(text, 20)} cannot be read") from error
    return value.decode(errors="replace") if isinstance(value, bytes) else value
