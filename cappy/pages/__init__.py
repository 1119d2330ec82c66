"""Formats numbers and names and escapes text for Markdown, for all reports; `page` makes HTML pages and plots.

Responses and names of tasks and models may contain anything, such as `<img onerror=...>`, `[x](javascript:...)` or a
tracking image. Reports and cards are rendered by different programs (GitHub, MLflow, editors), and not all sanitise
them. So the results of `escape_text`, `escape_code` and `table` contain no element, link, image or new block in
CommonMark, GitHub's dialect and Python-Markdown.
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
"""Characters that not every dialect can escape with a backslash."""

_BLOCK = re.compile(r"^([-+:](?=[-\s]|$)|=)|^(\d{1,9})([.)])(?=\s|$)")
"""Characters that at the beginning of a line start a list or a definition, or underline a heading."""

_LINK = re.compile(r"(?i)(?:javascript|vbscript|data|mailto|xmpp|tel):(?=\S)|:(?=//)|www\.|@(?=\w)")
"""Text that renderers turn into a link, and URL schemes that run code."""
_JOINER = "\u2060"
"""An invisible character that stops renderers from recognising a link."""


def metric_name(metric: str) -> str:
    """The display name of a metric."""
    return _METRIC_NAMES.get(metric, metric)


def percent(value: float) -> str:
    """A value from 0 to 1 in percent, without the percent sign."""
    return f"{100 * value:z.1f}".replace("-", "−")


def format_signed(value: float) -> str:
    """A difference multiplied by 100, with its sign."""
    return f"{100 * value:+z.1f}".replace("-", "−")


def escape_text(value: str) -> str:
    """Escapes text for the inside of a line: a sentence, a table cell, a heading."""
    line = "".join(_ENTITIES.get(character, character) for character in _SPECIAL.sub(r"\\\g<0>", _one_line(value)))
    line = _BLOCK.sub(lambda match: f"&#{ord(match[1])};" if match[1] else f"{match[2]}\\{match[3]}", line)
    return _LINK.sub(lambda match: f"{match[0]}{_JOINER}", line)


def escape_code(value: str) -> str:
    """Escapes text for the inside of backticks or a fenced block; a backtick becomes an apostrophe."""
    return _one_line(value).replace("`", "'")


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table, header first; the first column is left-aligned, the others right-aligned."""
    header, *body = [[escape_text(cell) for cell in row] for row in rows]
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *body))


def _one_line(value: str) -> str:
    """The text without line breaks and without characters that reorder or hide text."""
    return "".join(" " if char.isspace() else char if _is_visible(char) else "\ufffd" for char in value).strip()


def _is_visible(character: str) -> bool:
    """Whether a character is visible, or a joiner that some scripts and emoji need."""
    return character.isprintable() or character in "\u200c\u200d"
