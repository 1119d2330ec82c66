"""Settings are refused in one line, travel as one word, and are the same work wherever they lie."""

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field
from wording import raises_naming

from cappy.config import (
    DEFAULT_WORK,
    Location,
    Work,
    build,
    decode,
    encode,
    fingerprint,
    result_settings,
    settings,
    to_values,
)
from cappy.errors import ConfigError, quote


@settings
class TrialConfig:
    """Settings of no step."""

    source: Annotated[Location, Field(description="Somewhere")]
    target: Location
    rate: Annotated[float, Field(gt=0, le=1, description="A fraction")] = 0.5
    kind: Literal["mse", "bce"] = "bce"
    names: tuple[str, ...] = ()
    work: Work = DEFAULT_WORK

    def __post_init__(self) -> None:
        if "bad" in self.names:
            raise ValueError("names: may not hold 'bad'")


PLACES = {"source": "s", "target": "t"}


@pytest.mark.parametrize(
    ("values", "flag", "rule"),
    [
        ({"rate": 0}, "--rate", ("greater than 0", "got 0")),
        ({"rate": "x" * 99}, "--rate", ("number", "got 'xxx")),
        ({"kind": "hinge"}, "--kind", ("'mse' or 'bce'", "got 'hinge'")),
        ({"names": ["a", 1]}, "--names.1", ("string", "got 1")),
        ({"num_steps": 3}, "--num-steps", ("no such setting", "`cappy trial --help`")),
        ({"rates": 3}, "--rates", ("no such setting", "did you mean rate?")),
        ({"target": None}, "--target", ("path", "got None")),
        ({"names": ["bad"]}, "--names", ("'bad'",)),
    ],
)
def test_a_wrong_value_is_named_with_its_flag_and_rule(
    values: dict[str, Any], flag: str, rule: tuple[str, ...]
) -> None:
    with raises_naming(ConfigError, *rule) as error:
        build(TrialConfig, {**PLACES, **values})
    assert str(error.value).startswith(f"trial: {flag}: ")
    assert len(str(error.value)) < 200
    assert "\n" not in str(error.value)


def test_a_missing_value_is_named_without_a_value() -> None:
    with raises_naming(ConfigError, "trial: --target: ", "required") as error:
        build(TrialConfig, {"source": "s"})
    assert "got" not in str(error.value)


def test_settings_are_frozen_and_by_name_only() -> None:
    config = build(TrialConfig, PLACES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rate = 0.1  # type: ignore[misc]
    with pytest.raises(Exception, match="positional"):
        TrialConfig("s", "t")  # type: ignore[call-arg, arg-type]


def test_identity_is_what_is_computed_and_not_where() -> None:
    here = build(TrialConfig, {**PLACES, "rate": 0.25})
    there = build(TrialConfig, {"source": "x", "target": "y", "work": "z", "rate": 0.25})
    assert result_settings(here) == result_settings(there) == {"rate": 0.25, "kind": "bce", "names": []}
    assert set(to_values(here)) == {"source", "target", "rate", "kind", "names", "work"}


def test_values_build_the_config_that_they_came_from() -> None:
    config = build(TrialConfig, {**PLACES, "names": ["a", "b"], "rate": 1})
    assert build(TrialConfig, decode(encode(to_values(config)))) == config


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_encoded_settings_are_one_plain_word_and_decode_to_themselves(values: dict[str, Any]) -> None:
    word = encode(values)
    assert re.fullmatch(r"[A-Za-z0-9_=-]+", word)
    assert decode(word) == values


def test_no_text_means_no_settings() -> None:
    assert decode("") == {}


@pytest.mark.parametrize("text", ["{}", "é", "abc", "AAAA", encode({"a": 1})[:-3]])
def test_what_encode_did_not_write_is_refused(text: str) -> None:
    with raises_naming(ConfigError, "settings: ", quote(text), "cappy.config.encode"):
        decode(text)


def test_encoded_settings_must_be_an_object() -> None:
    with pytest.raises(ConfigError, match=r"^settings: .*object, got \[1\]$"):
        decode("WzFd")


def test_fingerprints_do_not_depend_on_the_order_of_names() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 2, "b": 1})
    assert fingerprint("a", "b") != fingerprint("ab")


@pytest.mark.parametrize("value", ["x" * 500, "a\nb", "\ud800", ["\n"] * 90, Path("\n")])
def test_a_shown_value_fits_into_one_line(value: object) -> None:
    assert len(quote(value)) <= 60
    assert "\n" not in quote(value)
    quote(value).encode()
