"""The filters of a PromptSource template: Jinja's, without those that reach further than a row, and PromptSource's."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import pass_context
from jinja2.filters import FILTERS as JINJA
from jinja2.runtime import Context

# Not among them: batch, center, filesizeformat, indent, pprint, slice, striptags, sum, tojson, urlize, wordwrap and
# xmlattr. No template of PromptSource's uses one.
# fmt: off
_PLAIN = (
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "forceescape",
    "format", "groupby", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject",
    "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "sort", "string", "title", "trim",
    "truncate", "unique", "upper", "urlencode", "wordcount",
)
# fmt: on

Filter = Callable[..., Any]


class _Draws:
    """What the template that is rendered now draws from; seeded when it first draws."""

    def __init__(self) -> None:
        self.seed: Callable[[], str] = str
        self.random: random.Random | None = None


_draws = _Draws()


def seed_draws(seed: Callable[[], str]) -> None:
    """The next template draws from this seed, the same whenever it is rendered again."""
    _draws.seed, _draws.random = seed, None


def _draw(values: Sequence[Any]) -> Any:
    if _draws.random is None:
        _draws.random = random.Random(_draws.seed())
    return _draws.random.choice(values)


@pass_context  # or Jinja would draw from a constant list once, when it compiles
def _choice(context: Context, choices: Sequence[Any]) -> Any:
    return _draw(choices)


@pass_context
def _random(context: Context, values: Sequence[Any]) -> Any:
    if not len(values):
        return context.environment.undefined("No random item, sequence was empty.")
    return _draw(values)


def _most_frequent(items: Any) -> list[Any] | None:
    """The items that occur most often, in order of their first occurrence; None of none."""
    if not items:
        return None
    counts = Counter(items)
    most = max(counts.values())
    return [item for item, count in counts.items() if count == most]


FILTERS: dict[str, Filter] = {name: JINJA[name] for name in _PLAIN} | {
    "choice": _choice,
    "most_frequent": _most_frequent,
    "random": _random,
}
