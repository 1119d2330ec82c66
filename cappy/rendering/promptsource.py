"""PromptSource templates in the child: what a template may reach, and what it makes of a row.

PromptSource v0.1.0 (commit 4a662713, the one T0 was trained with) and T0's `apply_template` are the measure, their
oddities included; each stands where it is reproduced.

A template reaches values of a row and their methods, no attribute that begins with an underscore, no callable but those
named here. Jinja's sandbox does most of it; the limits of the child bound time and memory.
`ImmutableSandboxedEnvironment` would not do: real templates append to their own lists and update their own mappings.
"""

import random
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from types import BuiltinMethodType
from typing import NamedTuple

import jinja2
from jinja2 import meta, pass_context
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS as JINJA
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import SandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace

# Not among them: batch, center, filesizeformat, indent, pprint, slice, striptags, sum, tojson, urlize, wordwrap and
# xmlattr. No template of PromptSource's uses one.
# fmt: off
_JINJA_FILTERS = (
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "forceescape",
    "format", "groupby", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject",
    "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "sort", "string", "title", "trim",
    "truncate", "unique", "upper", "urlencode", "wordcount",
)
# fmt: on


class _RandomState:
    """What the template that is rendered now draws from; seeded when it first draws."""

    def __init__(self) -> None:
        self.seed: Callable[[], str] = str
        self.random: random.Random | None = None


_draws = _RandomState()


def _set_seed(seed: Callable[[], str]) -> None:
    """The next template draws from this seed, the same whenever it is rendered again."""
    _draws.seed, _draws.random = seed, None


def _draw(values: Sequence[object]) -> object:
    if _draws.random is None:
        _draws.random = random.Random(_draws.seed())
    return _draws.random.choice(values)


@pass_context  # or Jinja would draw from a constant list once, when it compiles
def _choice(context: Context, choices: Sequence[object]) -> object:
    return _draw(choices)


@pass_context
def _random(context: Context, values: Sequence[object]) -> object:
    if not len(values):
        return context.environment.undefined("No random item, sequence was empty.")
    return _draw(values)


def _most_frequent(items: Collection[Hashable]) -> list[object] | None:
    """The items that occur most often, in order of their first occurrence; None of none."""
    if not items:
        return None
    counts = Counter(items)
    most = max(counts.values())
    return [item for item, count in counts.items() if count == most]


_FILTERS: dict[str, Callable[..., object]] = {name: JINJA[name] for name in _JINJA_FILTERS} | {
    "choice": _choice,
    "most_frequent": _most_frequent,
    "random": _random,
}


MAX_BITS = 2**14
"""Bits of a whole number that a template may compute."""
_NAMES: dict[type, str] = {
    str: "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric "
    "isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rstrip split splitlines "
    "startswith strip swapcase title upper",
    list: "append clear copy count extend index insert pop remove reverse sort",
    dict: "clear copy get items keys pop popitem setdefault update values",
    tuple: "count index",
}
"""Methods that a template may call. No method of another value may be called: an array's can write files."""
_METHODS = {owner: frozenset(names.split()) for owner, names in _NAMES.items()}
_CALLABLE = (Macro, LoopContext, BlockReference, Cycler, Joiner, Undefined)


class _Namespace(Namespace):
    """A namespace that does not print what it holds: it may hold itself."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Sandbox(SandboxedEnvironment):
    """PromptSource's environment: Jinja's defaults, and `zip`, `choice` and `most_frequent`."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        super().__init__()
        del self.globals["lipsum"]
        self.globals |= {"zip": zip, "namespace": _Namespace}
        self.filters = dict(_FILTERS)
        self._callables = frozenset(map(id, self.globals.values()))

    def is_safe_callable(self, obj: object) -> bool:
        """Whether it is one of ours, of Jinja's, or a method of a plain value that may be called."""
        owner = getattr(obj, "__self__", obj)
        if isinstance(obj, BuiltinMethodType):
            return type(owner) in _METHODS and obj.__name__ in _METHODS[type(owner)]
        return isinstance(owner, _CALLABLE) or id(obj) in self._callables

    def wrap_str_format(self, value: object) -> Callable[..., str] | None:
        """None: `format` is not wrapped, because templates may not call it."""
        return None

    def unsafe_undefined(self, obj: object, attribute: str) -> Undefined:
        """Raises SecurityError at once: an undefined value would be printed as nothing."""
        raise SecurityError(f"reads {attribute!r} of a {type(obj).__name__}")

    def call(__self, __context: Context, __obj: object, *args: object, **kwargs: object) -> object:  # noqa: N805
        """As Jinja has it; SecurityError for what may not be called."""
        if not __self.is_safe_callable(__obj):
            owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", type(__obj).__name__)
            raise SecurityError(f"calls {name!r} of a {type(owner).__name__}")
        key = kwargs.get("key")
        if callable(key) and isinstance(__obj, BuiltinMethodType) and not __self.is_safe_callable(key):
            # list.sort would call it, str.format for one, which reads every attribute.
            raise SecurityError(f"sorts by {getattr(key, '__name__', type(key).__name__)!r}")
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        """The operator's result; SecurityError for a whole number of too many bits."""
        powers = operator == "**"
        if powers and isinstance(left, int) and isinstance(right, int) and _bits(left) * abs(right) > MAX_BITS:
            raise SecurityError(f"raises a number to the power of {right}")
        result: object = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > MAX_BITS:
            raise SecurityError(f"computes a number of {result.bit_length():,} bits")
        return result


def _bits(number: int) -> int:
    return max(number.bit_length(), 1)


_ENVIRONMENT = _Sandbox()


_RESTRICTED = "answer_choices"
_SEPARATOR = "|||"
# Stands for the separator inside values. PromptSource's own: its multi_news templates split their documents at it.
_PROTECTOR = "3ed2dface8203c4c9dfb1a5dc58e41e0"


class Code(NamedTuple):
    """A compiled template; `fixed` says that its choices read no field of a row."""

    text: jinja2.Template
    choices: jinja2.Template | None
    fixed: bool


class Values(NamedTuple):
    """A row as templates see it: what cannot be changed, and the lists and mappings, of which each gets a copy."""

    plain: dict[str, object]
    containers: dict[str, object]

    def copy(self) -> dict[str, object]:
        """The row for one template, in its own order."""
        if not self.containers:
            return self.plain.copy()
        copies = {name: _copy(value) for name, value in self.containers.items()}
        return {**self.plain, **copies}


def load(*source: str) -> tuple[Code, list[str]]:
    """The compiled template, and the fields of a row that it reads, sorted; `source` is its text and its choices."""
    jinja, answer_choices = source
    # Every "}}" is taken for the end of an output, and the filters bind to its last operand alone: {{ a + b }} cuts b.
    text = _compile(jinja.replace("}}", " | string | truncate(2048) }}"))
    choices = _compile(answer_choices) if answer_choices else None
    of_choices = _find_variables(answer_choices)
    return Code(text, choices, not of_choices), sorted((_find_variables(jinja) | of_choices) - {_RESTRICTED})


def prepare(row: Mapping[str, object]) -> Values:
    """The row with underscores for hyphens in names, and top texts, no inner ones, protected."""
    named = {name.replace("-", "_"): value for name, value in row.items()}
    plain = {
        name: value.replace(_SEPARATOR, _PROTECTOR) if isinstance(value, str) else value
        for name, value in named.items()
    }
    return Values(plain, {name: value for name, value in named.items() if isinstance(value, list | dict | tuple)})


def render(code: Code, values: Values, seed: str | None) -> Sequence[object] | None:
    """Instruction, target and choices, or None where T0 drops the row; without a seed the choices, if they are fixed.

    `seed` and the row seed what the template draws.
    """
    if seed is None:
        return _choices(code.choices, {}) if code.choices and code.fixed else None
    own = values.copy()
    _set_seed(lambda: f"{seed} {sorted(own.items(), key=_item_name)!r}")
    choices = _choices(code.choices, own) if code.choices else None
    # A choice that holds the separator is not protected here, so it makes a part more, and the row is dropped.
    parts = [_restore(part).strip() for part in code.text.render(own, **{_RESTRICTED: choices}).split(_SEPARATOR)]
    # T0 drops a row of one part (the template printed nothing) and of three (it was split wrong). From late September
    # 2021 on it kept a blank target as "<NO LABEL>", for test splits; no response is right there, so it is dropped.
    if len(parts) != 2 or not all(parts):
        return None
    return [*parts, choices or []]


def _compile(source: str) -> jinja2.Template:
    template = _ENVIRONMENT.from_string(source)
    template.globals = dict(template.globals)  # a ChainMap, which is copied at each render, is a third of its time
    return template


def _choices(template: jinja2.Template, values: Mapping[str, object]) -> list[str]:
    return [_restore(choice.strip()) for choice in template.render(values).split(_SEPARATOR)]


def _restore(text: str) -> str:
    return text.replace(_PROTECTOR, _SEPARATOR)


def _copy(value: object) -> object:
    if isinstance(value, dict):
        return {name: _copy(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_copy(inner) for inner in value]
    if isinstance(value, tuple):
        return tuple(map(_copy, value))
    return value


def _find_variables(source: str) -> set[str]:
    return meta.find_undeclared_variables(_ENVIRONMENT.parse(source)) if source else set()


def _item_name(item: tuple[str, object]) -> str:
    return item[0]
