"""A row comes to a template as it is, whatever its values are: it prints, compares and counts as in the process."""

import datetime
import decimal
import json
import math
import uuid
from typing import Any

import numpy as np
import pandas  # type: ignore[import-untyped]
import pytest

from cappy.rendering.child import decode, encode

VALUES: dict[str, Any] = {
    "plain": {"a": [1, 2.5, "x", None, True, {"b": []}], "é 猫": {"": 1}},
    "an empty key": {"": [1]},
    "an empty key of one's own": {"": ["tuple", 1]},
    "half characters": ["\ud83d", "\ude00", "\ud83d\ude00", "\0"],
    "line ends": "a\nb\r\u2028",
    "tuples": ((1, "a"), [(), ([],)]),
    "keys that are not texts": {1: "a", (1, 2): "b", None: "c", 2.5: "e"},
    "bytes": b"\x00\xff",
    "whole numbers of any size": [0, -1, 2**64, -(10**5000), 16**9999],
    "a set": {3},
    "a frozen set": frozenset(("a",)),
    "a moment": datetime.datetime(2020, 1, 2, 3, 4, 5, 6),
    "a moment of the second hour": datetime.datetime(2020, 1, 2, 3, fold=1),
    "a day": datetime.date(2020, 1, 2),
    "a time": datetime.time(3, 4),
    "a span": datetime.timedelta(days=-3, seconds=5, microseconds=7),
    "a decimal": decimal.Decimal("1.50"),
    "an id": uuid.UUID(int=5),
    "infinities": [math.inf, -math.inf, -0.0],
}


def sent(value: Any) -> Any:
    """The value as it is on the other side."""
    text = json.dumps(encode(value), ensure_ascii=False).encode("utf-8", "surrogatepass")
    assert b"\n" not in text
    return json.loads(text.decode("utf-8", "surrogatepass"), object_hook=decode)


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_values_come_back_as_they_were(value: Any) -> None:
    back = sent(value)
    assert (back, type(back)) == (value, type(value))
    assert hex(back[3]) == hex(value[3]) if isinstance(value, list) and value[0] == 0 else repr(back) == repr(value)


def test_no_number_stays_none() -> None:
    assert math.isnan(sent([math.nan])[0])


@pytest.mark.parametrize(
    "value",
    [
        np.arange(3),
        np.float64(1.5),
        pandas.Timestamp("2020-01-02 03:04:05.123456789"),
        pandas.Timedelta(5),
        datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC),
        open,
    ],
    ids=["array", "number of an array", "timestamp", "span", "moment with a zone", "function"],
)
def test_an_object_prints_as_itself(value: Any) -> None:
    back = sent([value])
    assert (str(back[0]), repr(back)) == (str(value), repr([value]))


def test_a_timestamp_has_the_fields_of_a_moment() -> None:
    assert sent(pandas.Timestamp("2020-01-02 03:04:05")).year == 2020
    with pytest.raises(AttributeError):
        _ = sent(open).__self__
