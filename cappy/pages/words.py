"""Numbers and names as a person reads them, and as Markdown that shows them and does nothing else.

A task, a model or a response may be called anything: `<img onerror=...>`, `[x](javascript:...)`, a picture that tells a
server who reads. What shows a report or a card (GitHub, MLflow, an editor) is not known here, and not all of them clean
what they render. So nothing that `text`, `code` and `table` return is an element, a link, a picture or a new block, in
CommonMark, GitHub's dialect or Python-Markdown.
"""

import re
from collections.abc import Sequence

_METRIC_NAMES = {
    "rougeL": "Rouge-L",
    "rougeL_unicode": "Rouge-L (all scripts)",
    "exact_match": "exact match",
    "numeric_match": "numeric match",
    "token_f1": "token F1",
    "chrf": "chrF",
    "bleu": "BLEU",
    "given": "given label",
}
_SPECIAL = re.compile(r"[\\`*_\[\]{}#]")
_ENTITIES = {character: f"&#{ord(character)};" for character in "<>&|~$"}
"""Not every dialect lets a backslash stand before these."""

_BLOCK = re.compile(r"^([-+:](?=[-\s]|$)|=)|^(\d{1,9})([.)])(?=\s|$)")
"""What would begin a list, an underline or a definition at the beginning of a line."""

_LINK = re.compile(r"(?i)(?:javascript|vbscript|data|mailto|xmpp|tel):(?=\S)|:(?=//)|www\.|@(?=\w)")
"""What renderers make a link of, or what a link with a program in it begins with."""
_JOINER = "\u2060"
"""Shows nothing and takes no room; no renderer reads an address across it."""


def metric_name(metric: str) -> str:
    """How a person writes the metric."""
    return _METRIC_NAMES.get(metric, metric)


def percent(value: float) -> str:
    """A value of 0 to 1, x 100."""
    return f"{100 * value:z.1f}".replace("-", "−")


def format_signed(value: float) -> str:
    """A difference x 100 with its sign."""
    return f"{100 * value:+z.1f}".replace("-", "−")


def text(value: str) -> str:
    """A text for the middle of a line: a sentence, a cell of a table, a heading's words."""
    line = "".join(_ENTITIES.get(one, one) for one in _SPECIAL.sub(r"\\\g<0>", _one_line(value)))
    line = _BLOCK.sub(lambda match: f"&#{ord(match[1])};" if match[1] else f"{match[2]}\\{match[3]}", line)
    return _LINK.sub(lambda match: f"{match[0]}{_JOINER}", line)


def code(value: str) -> str:
    """A text for within backticks or a fenced block; a backtick becomes an apostrophe, since none may stand there."""
    return _one_line(value).replace("`", "'")


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as a table, the header first: the first column to the left, the others to the right."""
    header, *body = [[text(cell) for cell in row] for row in rows]
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *body))


def _one_line(value: str) -> str:
    """The text without line breaks, and without what turns the order of letters or hides them."""
    return "".join(" " if one.isspace() else one if _is_seen(one) else "\ufffd" for one in value).strip()


def _is_seen(character: str) -> bool:
    """Whether it shows, or joins letters and emoji as some languages need it."""
    return character.isprintable() or character in "\u200c\u200d"
