"""Values of a row as JSON and back: what JSON lacks is tagged, so that a template sees what it would see in place.

A tagged value is an object with the empty key alone: {"": [tag, ...]}.
"""

import datetime
import decimal
import uuid
from collections.abc import Callable, Mapping
from typing import Any

_PLAIN = frozenset((str, bool, float, type(None)))
_MAX_BITS = 2**12
"""Whole numbers of more bits travel in base 16: Python reads and writes no long ones in base 10."""
_MOMENTS = (datetime.datetime, datetime.date, datetime.time)
_SETS = (set, frozenset)


class Placeholder:
    """Stands for an object that has no copy in the child (an image, an array): it prints as that object does.

    `base` is a plain value whose attributes it has, such as the datetime that a pandas timestamp is.
    """

    def __init__(self, name: str, text: str, representation: str, base: object) -> None:
        self.__name__ = name
        self._text, self._representation, self._base = text, representation, base

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return self._representation

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._base, name)


def encode(value: Any) -> object:
    """The value as `json.dumps` takes it; RecursionError where it is nested too deep."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is list:
        return [encode(inner) for inner in value]
    if kind is int:
        return value if value.bit_length() <= _MAX_BITS else {"": ["int", hex(value)]}
    if isinstance(value, Mapping):
        if all(type(name) is str and name for name in value):
            return {name: encode(inner) for name, inner in value.items()}
        return {"": ["dict", [[encode(name), encode(inner)] for name, inner in value.items()]]}
    return {"": _tagged(value)}


def _tagged(value: Any) -> list[object]:
    kind = type(value)
    if kind is tuple:
        return ["tuple", *map(encode, value)]
    if kind in _SETS:
        return [kind.__name__, *map(encode, sorted(value, key=repr))]
    if kind is bytes:
        return ["bytes", value.hex()]
    if kind in _MOMENTS and getattr(value, "tzinfo", None) is None:
        return [kind.__name__, value.isoformat(), getattr(value, "fold", 0)]
    if kind is datetime.timedelta:
        return ["timedelta", value.days, value.seconds, value.microseconds]
    if kind in (decimal.Decimal, uuid.UUID):
        return [kind.__name__, str(value)]
    return ["object", getattr(value, "__name__", kind.__name__), str(value), repr(value), encode(_base(value))]


def _base(value: object) -> object:
    """A plain value with the attributes that a template may ask for, where there is one."""
    if isinstance(value, datetime.datetime):
        moment = value.replace(tzinfo=None)
        return datetime.datetime.combine(datetime.date(moment.year, moment.month, moment.day), moment.time())
    if isinstance(value, datetime.timedelta):
        return datetime.timedelta(value.days, value.seconds, value.microseconds)
    return None


def decode(found: dict[str, Any]) -> Any:
    """The value of a JSON object: as `object_hook` of `json.loads` it makes back what `encode` was given."""
    if "" not in found:
        return found
    tag, *parts = found[""]
    return _MAKERS[tag](*parts)


def _of_items(items: list[list[Any]]) -> dict[object, object]:
    return {name: inner for name, inner in items}  # noqa: C416 # dict() would take texts of two characters for pairs


_MAKERS: Mapping[str, Callable[..., Any]] = {
    "int": lambda digits: int(digits, 16),
    "dict": _of_items,
    "tuple": lambda *items: items,
    "set": lambda *items: set(items),
    "frozenset": lambda *items: frozenset(items),
    "bytes": bytes.fromhex,
    "datetime": lambda text, fold: datetime.datetime.fromisoformat(text).replace(fold=fold),
    "date": lambda text, _: datetime.date.fromisoformat(text),
    "time": lambda text, fold: datetime.time.fromisoformat(text).replace(fold=fold),
    "timedelta": datetime.timedelta,
    "Decimal": decimal.Decimal,
    "UUID": uuid.UUID,
    "object": Placeholder,
}
