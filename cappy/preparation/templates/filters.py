"""The filters of a template: Jinja's, without those that can be asked for a text of any width, and PromptSource's."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from jinja2 import pass_context, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS as JINJA
from jinja2.nodes import EvalContext
from jinja2.runtime import Context

from cappy.preparation.templates.bounds import budget, check_join, check_replace, check_trim, size

# Not among them: batch, center, filesizeformat, indent, pprint, slice, striptags, sum, tojson, urlize, wordwrap and
# xmlattr. No template of PromptSource's uses one, and most make any amount of text or work in a single call.
# fmt: off
_PLAIN = (
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float",
    "forceescape", "groupby", "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject",
    "rejectattr", "reverse", "safe", "select", "selectattr", "sort", "string", "title",
    "truncate", "unique", "upper", "urlencode", "wordcount",
)
# fmt: on
_WIDE = re.compile(r"%[^a-zA-Z%(]*(\d{4}|\*)")
_WIDE_NAMED = re.compile(r"\)[^a-zA-Z%]*(\d{4}|\*)")
_MAX_DIGITS = 100

Filter = Callable[..., Any]


def _charged(function: Filter) -> Filter:
    @wraps(function)  # Jinja's marks, such as that of pass_environment, come along
    def run(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        budget().charge(size(result))
        return result

    return run


@pass_eval_context
def _join(context: EvalContext, value: Any, d: str = "", attribute: str | int | None = None) -> Any:
    values = list(value)
    check_join(str(d), values)
    return JINJA["join"](context, values, d, attribute)


@pass_eval_context
def _replace(context: EvalContext, s: Any, old: Any, new: Any, count: int | None = None) -> Any:
    check_replace(str(s), str(old), str(new), count)
    return JINJA["replace"](context, s, old, new, count)


def _trim(value: Any, chars: str | None = None) -> Any:
    check_trim(str(value), chars)
    return JINJA["trim"](value, chars)


def _round(value: Any, precision: int = 0, method: str = "common") -> Any:
    if abs(precision) > _MAX_DIGITS:
        raise SecurityError(f"rounds to {precision} digits")
    return JINJA["round"](value, precision, method)


def _format(value: Any, *args: Any, **kwargs: Any) -> Any:
    check_printf(str(value), [*args, *kwargs.values()])
    return JINJA["format"](value, *args, **kwargs)


def check_printf(pattern: str, args: Any) -> None:
    """Charges what `pattern % args` makes; SecurityError for a field of a thousand characters and more."""
    if _WIDE.search(pattern) or ("%(" in pattern and _WIDE_NAMED.search(pattern)):
        raise SecurityError(f"formats with the width of {pattern!r}")
    budget().charge(len(pattern) + (pattern.count("%") + 1) * size(args))


@pass_context  # or Jinja would draw from a constant list once, when it compiles
def _choice(context: Context, choices: Sequence[Any]) -> Any:
    return budget().random.choice(choices)


@pass_context
def _random(context: Context, values: Sequence[Any]) -> Any:
    if not len(values):
        return context.environment.undefined("No random item, sequence was empty.")
    return budget().random.choice(values)


def _most_frequent(items: Any) -> list[Any] | None:
    """The items that occur most often, in order of their first occurrence; None of none."""
    if not items:
        return None
    counts = Counter(items)
    most = max(counts.values())
    return [item for item, count in counts.items() if count == most]


FILTERS: dict[str, Filter] = {name: _charged(JINJA[name]) for name in _PLAIN} | {
    "choice": _choice,
    "format": _format,
    "join": _join,
    "most_frequent": _most_frequent,
    "random": _random,
    "replace": _replace,
    "round": _round,
    "trim": _trim,
}
