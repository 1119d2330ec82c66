"""Lists that stand as text in a cell, as pandas, NumPy and `datasets` write them to CSV: read back as lists."""

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
PLURAL = ("references", "choices", "responses", "labels", "candidates")
"""Fields that hold lists: a text that looks like one and is none is refused there; in the others it may be meant."""

_QUOTED = re.compile(r"""(?:array\()?[\[(]\s*(?:np\.str_\()?[rbuRBU]?['"]""")
_LISTED = re.compile(r"""(?:array\()?[\[(]\s*(?:[rbuRBU]?['"]|[-+.\d]|(?:True|False|None|nan|np\.\w+)\b|\{|[\])])""")
_ENDED = re.compile(r"[\])](?:, dtype=\w+\))?$")
_NOTHING = ("nan", "NaN", "<NA>")
_NAMES = {"True": True, "False": False, "None": None, "nan": None, "true": True, "false": False, "null": None}
_ITEM, _COMMA = "item", "comma"
_SCALAR = re.compile(
    r"""np\.\w+\(((?:[^()'"]|'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")*)\)|'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
)
"""NumPy's scalars, such as np.float64(0.5), and texts, in which nothing is taken for one."""
_SQUAD = re.compile(r"""\{\s*['"](?:text|answer_start)['"]\s*:""")
MAX_CHARACTERS = 1_000_000
"""Of a text that is read as a list."""


def parse_lists(rows: Rows, *, cells: bool) -> Rows:
    """The rows with the lists that stand in them as text; `cells` says that the file knows no lists (CSV).

    RecordError where a field of several texts holds what looks like a list and cannot be read as one.
    """
    fields = {*TEXT_FIELDS, *NUMBER_FIELDS, "candidates"}
    for where, values in rows:
        lists = {
            name: _read(where, name, value, cells=cells)
            for name in values.keys() & fields
            if isinstance(value := values[name], str)
        }
        for name in ("reference", "references"):
            if isinstance(table := values.get(name), dict) and "text" in table:
                lists[name] = _distinct(table["text"])

        yield where, {**values, **lists} if lists else values


def _distinct(texts: object) -> object:
    """The answers of SQuAD, which stand as a table of texts and places, each once."""
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        return list(dict.fromkeys(texts))
    return texts


def _squad(where: str, name: str, text: str) -> object:
    """The answers of SQuAD in the text of such a table; the text itself where it has no places of answers."""
    if "answer_start" not in text:
        return text
    try:
        return _distinct(_entry(text, "text"))
    except ValueError as error:
        remedy = "write the file as JSON Lines or Parquet"
        what = f"{name} looks like the answers of SQuAD and is none ({error}), got {quote(text)}"
        raise RecordError(f"{where}: {what}; {remedy}") from error


def _entry(text: str, key: str) -> object:
    """A text or a list under a key of an object as JSON, Python or NumPy write one; ValueError for anything else."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"longer than {MAX_CHARACTERS:,} characters")
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        segment = _segment(text, key)
        return _literal(segment) if segment[:1] in "'\"" else read_list(segment)
    if key not in table:
        raise ValueError(f"it has no {quote(key)}")
    return table[key]


def _segment(text: str, key: str) -> str:
    """What Python's source has under a key; numbers of NumPy beside it need not be read."""
    try:
        body = ast.parse(text, mode="eval").body
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError("it cannot be read as Python") from error
    pairs = zip(body.keys, body.values, strict=True) if isinstance(body, ast.Dict) else ()
    for name, value in pairs:
        if isinstance(name, ast.Constant) and name.value == key:
            return ast.get_source_segment(text, value) or ""
    raise ValueError(f"it has no {quote(key)}")


def _read(where: str, name: str, text: str, *, cells: bool) -> object:
    bare = text.strip()
    if name in ("reference", "references") and _SQUAD.match(bare):
        return _squad(where, name, bare)
    if cells and name in PLURAL and bare in _NOTHING:
        return None
    meant = _LISTED if cells else _QUOTED
    if not meant.match(bare) or (name not in PLURAL and (bare[0] == "(" or not _ENDED.search(bare))):
        return text
    try:
        items = read_list(bare)
    except ValueError as error:
        if name in PLURAL or _QUOTED.match(bare):
            remedy = 'write it as JSON (["one", "two"]), or write the file as JSON Lines or Parquet'
            raise RecordError(
                f"{where}: {name} looks like a list and is none ({error}), got {quote(text)}; {remedy}"
            ) from error
        return text
    if name in TEXT_FIELDS and not all(isinstance(item, str) for item in items):
        return _unquote(where, name, text)
    return items


def _unquote(where: str, name: str, text: str) -> str:
    """A list of numbers where texts are wanted: in a field of one text it is that text."""
    if name not in PLURAL:
        return text
    remedy = f'quote its items (["1", "2"]), or read the cell as one text: --columns {name.removesuffix("s")}={name}'
    raise RecordError(f"{where}: {name} holds a list of what are not texts, got {quote(text)}; {remedy}")


def read_list(text: str) -> list[object]:
    """The items of a list as JSON, Python or NumPy write one; ValueError for anything else.

    NumPy parts items by blanks, which Python would take for one long text: `['a' 'b']`.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"longer than {MAX_CHARACTERS:,} characters")
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        return _parse_nested(text) if "{" in text and not _QUOTED.match(text) else _flat(text)
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


def _flat(text: str) -> list[object]:
    bare = re.sub(r"^array\((.*?)(?:,\s*dtype=[\w<>'.]+)?\)$", r"\1", text, flags=re.DOTALL)
    if bare[:1] not in "[(" or bare[-1:] not in "])":
        raise ValueError("it has no end")
    items: list[object] = []
    kinds: list[str] = []
    for kind, value in _tokens(bare[1:-1]):
        kinds.append(kind)
        if kind == _ITEM:
            items.append(value)
    _check_order(kinds)
    return items


def _check_order(kinds: list[str]) -> None:
    """ValueError unless commas stand between all items, or between none."""
    commas = kinds.count(_COMMA)
    if not commas:
        return
    expected = [_ITEM if index % 2 == 0 else _COMMA for index in range(len(kinds))]
    if kinds != expected:
        raise ValueError("some items have no comma between them")


def _tokens(text: str) -> Iterator[tuple[str, object]]:
    """Items and commas, in order."""
    sign = ""
    try:
        for token in tokenize.generate_tokens(io.StringIO(f"({_SCALAR.sub(_bare, text)})").readline):
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
                yield _ITEM, _literal(word)
            elif kind == tokenize.NUMBER:
                yield _ITEM, _literal(sign + word)
                sign = ""
            elif kind == tokenize.NAME and word in _NAMES and not sign:
                yield _ITEM, _NAMES[word]
            elif kind == tokenize.OP and word == ")" and token.line[token.end[1] :].strip() == "":
                continue
            else:
                raise ValueError(f"it holds {quote(word, 20)}")
    except (tokenize.TokenError, IndentationError, SyntaxError) as error:
        raise ValueError("its quotes or brackets do not close") from error


def _bare(match: re.Match[str]) -> str:
    return match[0] if match[1] is None else match[1]


def _literal(word: str) -> object:
    try:
        value = ast.literal_eval(word)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{quote(word, 20)} cannot be read") from error
    return value.decode(errors="replace") if isinstance(value, bytes) else value
