"""Compiles and renders PromptSource templates in the child process, in a Jinja sandbox.

The results are those of PromptSource v0.1.0 (commit 4a662713, which T0 was trained with) and T0's `apply_template`,
including their quirks; comments mark these.

A template can use the values of a row and their methods, but no attribute that begins with an underscore, and only the
callables that are listed here. Jinja's sandbox enforces most of this; the limits of the child bound time and memory.
`ImmutableSandboxedEnvironment` is not usable: real templates append to their own lists and update their own mappings.
"""

import random
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from types import BuiltinMethodType
from typing import NamedTuple

import jinja2
from jinja2 import meta, pass_context
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import SandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace

# Jinja's filters, except those that no template of PromptSource uses: batch, center, filesizeformat, indent, pprint,
# slice, striptags, sum, tojson, urlize, wordwrap and xmlattr.
# fmt: off
_JINJA_FILTER_NAMES = (
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "forceescape",
    "format", "groupby", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject",
    "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "sort", "string", "title", "trim",
    "truncate", "unique", "upper", "urlencode", "wordcount",
)
# fmt: on


class _RandomState:
    """The random numbers of the template that is being rendered; created on first use."""

    def __init__(self) -> None:
        self.seed: Callable[[], str] = str
        self.random: random.Random | None = None


_random_state = _RandomState()


def _set_seed(seed: Callable[[], str]) -> None:
    """Sets the seed of the next template, so that rendering it again draws the same values."""
    _random_state.seed, _random_state.random = seed, None


def _draw(values: Sequence[object]) -> object:
    if _random_state.random is None:
        _random_state.random = random.Random(_random_state.seed())
    return _random_state.random.choice(values)


@pass_context  # otherwise Jinja would evaluate the filter on a constant list once, at compile time
def _choice(context: Context, choices: Sequence[object]) -> object:
    return _draw(choices)


@pass_context
def _random(context: Context, values: Sequence[object]) -> object:
    if not len(values):
        return context.environment.undefined("No random item, sequence was empty.")
    return _draw(values)


def _most_frequent(items: Collection[Hashable]) -> list[object] | None:
    """The most frequent items, in order of first occurrence; None for an empty collection."""
    if not items:
        return None
    counts = Counter(items)
    max_count = max(counts.values())
    return [item for item, count in counts.items() if count == max_count]


_FILTERS: dict[str, Callable[..., object]] = {name: FILTERS[name] for name in _JINJA_FILTER_NAMES} | {
    "choice": _choice,
    "most_frequent": _most_frequent,
    "random": _random,
}


MAX_BITS = 2**14
"""Maximum bits of an integer that a template may compute."""
_METHOD_NAMES: dict[type, str] = {
    str: "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric "
    "isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rstrip split splitlines "
    "startswith strip swapcase title upper",
    list: "append clear copy count extend index insert pop remove reverse sort",
    dict: "clear copy get items keys pop popitem setdefault update values",
    tuple: "count index",
}
"""Methods that a template may call, by type. Methods of other types are not allowed: an array's can write files."""
_METHODS = {owner: frozenset(names.split()) for owner, names in _METHOD_NAMES.items()}
_CALLABLE_TYPES = (Macro, LoopContext, BlockReference, Cycler, Joiner, Undefined)


class _Namespace(Namespace):
    """A namespace that does not print its values, because it may contain itself."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Sandbox(SandboxedEnvironment):
    """PromptSource's environment: Jinja's defaults with `zip`, `choice` and `most_frequent`."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        super().__init__()
        del self.globals["lipsum"]
        self.globals |= {"zip": zip, "namespace": _Namespace}
        self.filters = dict(_FILTERS)
        self._callables = frozenset(map(id, self.globals.values()))

    def is_safe_callable(self, obj: object) -> bool:
        """Whether `obj` is a callable of this module or Jinja, or an allowed method of a plain value."""
        owner = getattr(obj, "__self__", obj)
        if isinstance(obj, BuiltinMethodType):
            return type(owner) in _METHODS and obj.__name__ in _METHODS[type(owner)]
        return isinstance(owner, _CALLABLE_TYPES) or id(obj) in self._callables

    def wrap_str_format(self, value: object) -> Callable[..., str] | None:
        """None: `format` is not wrapped, because templates may not call it."""
        return None

    def unsafe_undefined(self, obj: object, attribute: str) -> Undefined:
        """Raises SecurityError at once, because an undefined value would be printed as an empty text."""
        raise SecurityError(f"reads {attribute!r} of a {type(obj).__name__}")

    def call(__self, __context: Context, __obj: object, *args: object, **kwargs: object) -> object:  # noqa: N805
        """Calls an object like Jinja; raises SecurityError if the call is not allowed."""
        if not __self.is_safe_callable(__obj):
            owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", type(__obj).__name__)
            raise SecurityError(f"calls {name!r} of a {type(owner).__name__}")
        key = kwargs.get("key")
        if callable(key) and isinstance(__obj, BuiltinMethodType) and not __self.is_safe_callable(key):
            # list.sort would call it, even str.format, which can read any attribute.
            raise SecurityError(f"sorts by {getattr(key, '__name__', type(key).__name__)!r}")
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        """The result of an operator; raises SecurityError if it is an integer of more than `MAX_BITS`."""
        is_power = operator == "**"
        if is_power and isinstance(left, int) and isinstance(right, int) and _bits(left) * abs(right) > MAX_BITS:
            raise SecurityError(f"raises a number to the power of {right}")
        result: object = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > MAX_BITS:
            raise SecurityError(f"computes a number of {result.bit_length():,} bits")
        return result


def _bits(number: int) -> int:
    return max(number.bit_length(), 1)


_ENVIRONMENT = _Sandbox()


_CHOICES_NAME = "answer_choices"
_SEPARATOR = "|||"
# Replaces the separator inside values. The value is PromptSource's: its multi_news templates split documents at it.
_ESCAPED_SEPARATOR = "3ed2dface8203c4c9dfb1a5dc58e41e0"


class CompiledTemplate(NamedTuple):
    """A compiled template; `fixed` means that its choices do not depend on the row."""

    text: jinja2.Template
    choices: jinja2.Template | None
    fixed: bool


class Values(NamedTuple):
    """The values of a row for templates: immutable ones, and lists and mappings that are copied for each template."""

    plain: dict[str, object]
    containers: dict[str, object]

    def copy(self) -> dict[str, object]:
        """A copy of the row for one template, in the same order."""
        if not self.containers:
            return self.plain.copy()
        copies = {name: _copy(value) for name, value in self.containers.items()}
        return {**self.plain, **copies}


def load(*source: str) -> tuple[CompiledTemplate, list[str]]:
    """Compiles a template from its text and choices; also returns the fields of a row that it reads, sorted."""
    jinja, answer_choices = source
    # PromptSource's quirk: it replaces every "}}", and the filters bind to the last operand only: {{ a + b }} truncates
    # only b.
    text = _compile(jinja.replace("}}", " | string | truncate(2048) }}"))
    choices = _compile(answer_choices) if answer_choices else None
    choice_fields = _find_variables(answer_choices)
    fields = sorted((_find_variables(jinja) | choice_fields) - {_CHOICES_NAME})
    return CompiledTemplate(text, choices, not choice_fields), fields


def prepare(row: Mapping[str, object]) -> Values:
    """The row with hyphens in names replaced by underscores, and the separator escaped in top-level texts only."""
    renamed = {name.replace("-", "_"): value for name, value in row.items()}
    plain = {
        name: value.replace(_SEPARATOR, _ESCAPED_SEPARATOR) if isinstance(value, str) else value
        for name, value in renamed.items()
    }
    return Values(plain, {name: value for name, value in renamed.items() if isinstance(value, list | dict | tuple)})


def render(code: CompiledTemplate, values: Values, seed: str | None) -> Sequence[object] | None:
    """The instruction, target and choices, or None if T0 drops the row.

    The random numbers of the template depend on `seed` and the row. Without a seed, only the choices are returned, or
    None if they are not fixed.
    """
    if seed is None:
        return _choices(code.choices, {}) if code.choices and code.fixed else None
    row = values.copy()
    _set_seed(lambda: f"{seed} {sorted(row.items(), key=_item_name)!r}")
    choices = _choices(code.choices, row) if code.choices else None
    # A separator in a choice is not escaped here, so it adds a part, and the row is dropped.
    parts = [_restore(part).strip() for part in code.text.render(row, **{_CHOICES_NAME: choices}).split(_SEPARATOR)]
    # T0 drops a row with one part (the template printed nothing) or three (a wrong split). From late September 2021 on
    # it kept a blank target as "<NO LABEL>", for test splits; there is no correct response then, so drop it as well.
    if len(parts) != 2 or not all(parts):
        return None
    return [*parts, choices or []]


def _compile(source: str) -> jinja2.Template:
    template = _ENVIRONMENT.from_string(source)
    template.globals = dict(template.globals)  # a ChainMap, copied at each render, takes a third of the time
    return template


def _choices(template: jinja2.Template, values: Mapping[str, object]) -> list[str]:
    return [_restore(choice.strip()) for choice in template.render(values).split(_SEPARATOR)]


def _restore(text: str) -> str:
    return text.replace(_ESCAPED_SEPARATOR, _SEPARATOR)


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
