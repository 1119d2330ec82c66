"""The Jinja environment of PromptSource templates: what a template may reach.

Values of a row and their methods, no attribute that begins with an underscore, no callable but those named here.
Jinja's sandbox does most of it; the limits of the child (`limits`) bound time and memory.

`ImmutableSandboxedEnvironment` would not do: real templates append to their own lists and update their own mappings.
"""

from collections.abc import Callable
from types import BuiltinMethodType
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import SandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace

from cappy.rendering.filters import FILTERS

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


class _Names(Namespace):
    """A namespace that does not print what it holds: it may hold itself."""

    def __repr__(self) -> str:
        return "<Namespace>"


class Sandbox(SandboxedEnvironment):
    """PromptSource's environment: Jinja's defaults, and `zip`, `choice` and `most_frequent`."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        super().__init__()
        del self.globals["lipsum"]
        self.globals |= {"zip": zip, "namespace": _Names}
        self.filters = dict(FILTERS)
        self._callables = frozenset(map(id, self.globals.values()))

    def is_safe_callable(self, obj: Any) -> bool:
        """Whether it is one of ours, of Jinja's, or a method of a plain value that may be called."""
        owner = getattr(obj, "__self__", obj)
        if isinstance(obj, BuiltinMethodType):
            return type(owner) in _METHODS and obj.__name__ in _METHODS[type(owner)]
        return isinstance(owner, _CALLABLE) or id(obj) in self._callables

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """None: `format` is not wrapped, because templates may not call it."""
        return None

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Raises SecurityError at once: an undefined value would be printed as nothing."""
        raise SecurityError(f"reads {attribute!r} of a {type(obj).__name__}")

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """As Jinja has it; SecurityError for what may not be called."""
        if not __self.is_safe_callable(__obj):
            owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", type(__obj).__name__)
            raise SecurityError(f"calls {name!r} of a {type(owner).__name__}")
        key = kwargs.get("key")
        if callable(key) and isinstance(__obj, BuiltinMethodType) and not __self.is_safe_callable(key):
            # list.sort would call it, str.format for one, which reads every attribute.
            raise SecurityError(f"sorts by {getattr(key, '__name__', type(key).__name__)!r}")
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operator's result; SecurityError for a whole number of too many bits."""
        whole = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and whole and max(left.bit_length(), 1) * abs(right) > MAX_BITS:
            raise SecurityError(f"raises a number to the power of {right}")
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > MAX_BITS:
            raise SecurityError(f"computes a number of {result.bit_length():,} bits")
        return result


ENVIRONMENT = Sandbox()
