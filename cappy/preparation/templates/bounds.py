"""What one render of a template may do: so many seconds, so many characters and list items, and its own draws."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from time import monotonic
from typing import Any

from jinja2.exceptions import SecurityError

MAX_SIZE = 2**25
"""Characters that one render may make, in all; whole documents take a hundredth of it."""
ITEM = 8
"""Characters that an item of a list counts for: the bytes of its place."""
_NONE: dict[str, Any] = {}
_VIEWS = (type(_NONE.keys()), type(_NONE.values()), type(_NONE.items()))
_CONTAINERS = (list, tuple, dict, set, frozenset, *_VIEWS)
_SINGLE = frozenset((int, float, bool, type(None)))
MAX_BITS = 2**14
"""Bits of a whole number that a template may compute."""


class Budget:
    """The rest of what a render may do. Whatever grows a value says so first, and is refused when nothing is left."""

    __slots__ = ("_deadline", "_left", "_random", "_seconds", "_seed")

    def __init__(self, seconds: float, seed: Callable[[], str]) -> None:
        self._seconds = seconds
        self._deadline = monotonic() + seconds
        self._left = MAX_SIZE
        self._seed = seed
        self._random: random.Random | None = None

    def charge(self, size: int) -> None:
        """Takes `size` characters or items; SecurityError if they or the seconds run out."""
        self._left -= size
        if self._left < 0:
            raise SecurityError(f"makes more than {MAX_SIZE:,} characters, an item of a list counted as {ITEM}")
        if monotonic() > self._deadline:
            raise SecurityError(f"takes longer than {self._seconds:g} seconds")

    @property
    def random(self) -> random.Random:
        """Draws of this render, the same whenever it is repeated."""
        if self._random is None:
            self._random = random.Random(self._seed())
        return self._random


_BUDGET: ContextVar[Budget] = ContextVar("budget")

budget = _BUDGET.get
"""The budget of the render that this thread is in."""


@contextmanager
def spending(given: Budget) -> Iterator[None]:
    """What runs inside spends from `given`; each thread has its own."""
    token = _BUDGET.set(given)
    try:
        yield
    finally:
        _BUDGET.reset(token)


def size(value: Any) -> int:
    """Characters of a value and its items when it is written out: what is in it twice counts twice.

    A list that holds a list twice, that holds a list twice, … is small in memory and endless in print or comparison.
    Counting stops above `MAX_SIZE`, so a list that holds itself has an end too.
    """
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, _CONTAINERS):
        return ITEM
    total = 0
    rest: list[Any] = [value]
    while rest and total <= MAX_SIZE:
        inner = rest.pop()
        if type(inner) in _SINGLE:
            continue
        if isinstance(inner, str | bytes):
            total += len(inner)
        elif isinstance(inner, _CONTAINERS):
            total += ITEM * (len(inner) + 1)
            if total <= MAX_SIZE:
                rest.extend(inner)
                rest.extend(inner.values() if isinstance(inner, dict) else ())
    return total


def made(value: Any) -> Any:
    """The value, its size charged."""
    budget().charge(size(value))
    return value


def steps(values: Iterable[Any]) -> Iterator[Any]:
    """The values; each step of a loop may be the one that takes too long."""
    charge = budget().charge
    for value in values:
        charge(0)
        yield value


def zipped(*columns: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """As zip does, each row charged: a list of columns may be long."""
    charge = budget().charge
    for row in zip(*columns, strict=False):
        charge(ITEM * len(row))
        yield row


def concat(pieces: Iterable[Any]) -> str:
    """The texts of the pieces, one after the other, charged before they are put together."""
    texts = []
    charge = budget().charge
    for piece in pieces:
        text = str(piece)
        charge(len(text))
        texts.append(text)
    return "".join(texts)


def check_join(separator: str, values: list[Any]) -> None:
    """Charges what a join of these values makes."""
    budget().charge(size(values) + len(separator) * len(values))


def check_replace(text: str, old: str, new: str, count: int | None) -> None:
    """Charges what replacing makes."""
    found = text.count(old) if count is None or count < 0 else min(count, text.count(old))
    budget().charge(len(text) + found * len(new))


def check_trim(text: str, chars: str | None) -> None:
    """Charges what trimming may take: it looks for each character of the text among `chars`."""
    budget().charge(len(text) * len(chars or " "))


def check_call(owner: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Charges a call for what it is about to make or to take in; `owner` and `name` are those of a method."""
    if not isinstance(owner, str):
        budget().charge(sum(map(size, args)) + sum(map(size, kwargs.values())))
    elif name == "replace" and len(args) >= 2:
        check_replace(owner, str(args[0]), str(args[1]), args[2] if len(args) > 2 else None)
    elif name == "join" and args:
        check_join(owner, args[0])
    elif name in ("strip", "lstrip", "rstrip"):
        check_trim(owner, args[0] if args else None)
