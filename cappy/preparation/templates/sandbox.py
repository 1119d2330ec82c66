"""The Jinja environment that templates run in: PromptSource's own, for templates that nobody vouches for.

Three bounds, the same in every thread, with no signal and no other process:

- What a template may reach: values of a row and their methods, no attribute that begins with an underscore, no
  callable but those named here. Jinja's sandbox does most of it.
- How long it may take: every step of a loop, every call, filter and operator looks at the clock. Nothing else in a
  template repeats itself.
- How much it may make: every operation that makes a text, a list or a large number charges for it first, so no
  single one can run away where the clock is not looked at.

`ImmutableSandboxedEnvironment` would not do: real templates append to their own lists and update their own mappings.
"""

from collections.abc import Callable, Iterable, Iterator
from types import BuiltinMethodType
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import SandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

from cappy.preparation.templates.bounds import (
    ITEM,
    MAX_BITS,
    budget,
    check_call,
    concat,
    made,
    size,
    steps,
    zipped,
)
from cappy.preparation.templates.filters import FILTERS, check_printf

_NAMES: dict[type, str] = {
    str: "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric "
    "isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rstrip split splitlines "
    "startswith strip swapcase title upper",
    list: "append clear copy count extend index insert pop remove reverse sort",
    dict: "clear copy get items keys pop popitem setdefault update values",
    tuple: "count index",
}
"""Methods that a template may call.

The others of texts make any width of text (center, format, …) or take any time (encode, rfind, …). Those of a row's
other values are nobody's to call: an array's write files.
"""
_METHODS = {owner: frozenset(names.split()) for owner, names in _NAMES.items()}
_CALLABLE = (Macro, LoopContext, BlockReference, Cycler, Joiner, Undefined)
_LOOP, _CONCAT, _MADE = "<loop>", "<concat>", "<made>"
"""Filters that no template can name."""


class _Names(Namespace):
    """A namespace that does not print what it holds: it may hold itself, and holds what was never measured."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Bounded(NodeTransformer):
    """Sends what Jinja compiles to bare Python, and so past the sandbox, through the bounds."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = _through(_LOOP, node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _through(_CONCAT, nodes.List(node.nodes, lineno=node.lineno))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _through(_MADE, node) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        return self._literal(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        return self._literal(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        return self._literal(node) if node.ctx == "load" else node

    def _literal(self, node: nodes.Expr) -> nodes.Node:
        parts = (nodes.Const, nodes.Pair, nodes.List, nodes.Dict, nodes.Tuple)
        if all(isinstance(child, parts) for child in node.find_all(nodes.Node)):
            return node
        self.generic_visit(node)
        return _through(_MADE, node)


def _through(name: str, node: nodes.Node) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class Sandbox(SandboxedEnvironment):
    """PromptSource's environment (Jinja's defaults, and `zip`, `choice` and `most_frequent`), bounded."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__()
        del self.globals["lipsum"]
        self.globals |= {"zip": zipped, "namespace": _Names}
        self.filters = {**FILTERS, _LOOP: steps, _CONCAT: concat, _MADE: made}
        self._callables = frozenset(map(id, self.globals.values()))

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Bounded().visit(source), *args, **kwargs)

    def concat(self, pieces: Iterable[str]) -> str:
        """The text of a template, a macro or a block."""
        return concat(pieces)

    def is_safe_callable(self, obj: Any) -> bool:
        """Whether it is one of ours, of Jinja's, or a method of a plain value that may be called."""
        owner = getattr(obj, "__self__", obj)
        if isinstance(obj, BuiltinMethodType):
            return type(owner) in _METHODS and obj.__name__ in _METHODS[type(owner)]
        return isinstance(owner, _CALLABLE) or id(obj) in self._callables

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Nothing: these methods stay as they are, and may not be called."""
        return None

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Raises SecurityError at once: an undefined value would be printed as nothing."""
        raise SecurityError(f"reads {attribute!r} of a {type(obj).__name__}")

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """As Jinja has it, charged for what goes in and comes out."""
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", type(__obj).__name__)
        if not __self.is_safe_callable(__obj):
            raise SecurityError(f"calls {name!r} of a {type(owner).__name__}")
        if isinstance(__obj, BuiltinMethodType):
            args = tuple(list(arg) if isinstance(arg, Iterator | range) else arg for arg in args)
        check_call(owner, name, args, kwargs)
        return made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operator's result, charged before it is made."""
        whole = isinstance(left, int) and isinstance(right, int)
        if operator == "%" and isinstance(left, str):
            check_printf(left, right)
        elif operator == "**" and whole and max(left.bit_length(), 1) * abs(right) > MAX_BITS:
            raise SecurityError(f"raises a number to the power of {right}")
        elif operator == "*":
            budget().charge(_repeated(left, right) + _repeated(right, left))
        elif operator == "+":
            # What is in a list on the left was charged when it came there, and lists grow at the right end.
            budget().charge((ITEM * len(left) if isinstance(left, list) else size(left)) + size(right))
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > MAX_BITS:
            raise SecurityError(f"computes a number of {result.bit_length():,} bits")
        return result


def _repeated(value: Any, times: Any) -> int:
    return size(value) * max(times, 0) if isinstance(value, str | list | tuple) and isinstance(times, int) else 0


ENVIRONMENT = Sandbox()
