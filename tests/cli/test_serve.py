"""`cappy serve` and `cappy gateway`: their flags are the fields of their config classes."""

import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from wording import assert_names, raises_naming

from cappy.config import ADVANCED, build
from cappy.errors import ConfigError
from serving.config import ServeConfig
from serving.gateway.config import GatewayConfig

Cappy = Callable[..., subprocess.CompletedProcess[str]]
Rows = Callable[[str], dict[str, str]]
CONFIGS = {"serve": ServeConfig, "gateway": GatewayConfig}
LLM = {"upstream": "http://h/v1"}


@pytest.mark.parametrize("verb", CONFIGS)
def test_every_field_that_most_people_need_is_a_flag(verb: str, here: Cappy, flag_rows: Rows) -> None:
    fields: dict[str, Any] = CONFIGS[verb].__pydantic_fields__  # type: ignore[attr-defined]
    usual = {f"--{name.replace('_', '-')}" for name, field in fields.items() if ADVANCED not in field.metadata}
    assert usual <= set(flag_rows(here(verb, "--help").stdout))


@pytest.mark.parametrize(
    ("verb", "old", "new"),
    [
        ("serve", "--follow", "--follow-seconds"),
        ("gateway", "--price-prompt", "--price-input"),
        ("gateway", "--price-completion", "--price-output"),
        ("gateway", "--escalate-price-prompt", "--escalate-price-input"),
        ("gateway", "--escalate-price-completion", "--escalate-price-output"),
    ],
)
@pytest.mark.parametrize("joined", [False, True])
def test_the_name_that_a_flag_had_is_refused_with_its_name_now(
    here: Cappy, verb: str, old: str, new: str, joined: bool
) -> None:
    done = here(verb, *([f"{old}=1"] if joined else [old, "1"]))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert_names(done.stderr, f"cappy {verb}: ", f"{old} ", new)


def test_a_name_that_another_verb_renamed_is_no_flag(here: Cappy) -> None:
    done = here("gateway", "--upstream", "http://h/v1", "--follow", "1")
    assert done.returncode == 2
    assert "is now" not in done.stderr


@pytest.mark.parametrize(
    ("verb", "values", "named"),
    [
        ("serve", {"port": 65536}, ["--port", "65536"]),
        ("serve", {"max_pairs": 0}, ["--max-pairs", "0"]),
        ("serve", {"tls_key": "k.pem"}, ["--tls-certificate", "--tls-key"]),
        (
            "serve",
            {"scorer": "builtin:tiny", "follow_seconds": 1},
            ["--follow-seconds 1", "builtin", "models:/name@alias"],
        ),
        ("serve", {"allow_origin": ("a.example",)}, ["--allow-origin a.example", "https://"]),
        ("serve", {"allowed_hosts": ("a.example:80",)}, ["--allowed-hosts 'a.example:80'"]),
        ("gateway", {**LLM, "candidates": 129}, ["--candidates", "129"]),
        ("gateway", {**LLM, "threshold": float("nan")}, ["--threshold"]),
        ("gateway", {**LLM, "min_gain": float("nan")}, ["--min-gain", "nan"]),
        ("gateway", {**LLM, "max_cost": float("inf"), "price_input": 1.0}, ["--max-cost", "inf"]),
        ("gateway", {**LLM, "max_total_cost": 1.0}, ["--price-input", "--price-output"]),
        ("gateway", {**LLM, "floor": 0.5, "escalate_model": "m"}, ["--floor", "--escalate-to"]),
        ("gateway", {**LLM, "allow_origin": ("a.example",)}, ["--allow-origin a.example", "https://"]),
        ("gateway", {}, ["--upstream"]),
    ],
)
def test_a_value_that_cannot_be_is_named_before_anything_is_loaded(
    verb: str, values: dict[str, Any], named: list[str]
) -> None:
    with raises_naming(ConfigError, *named):
        build(CONFIGS[verb], values)


def test_sizes_are_given_in_megabytes_and_kept_in_bytes() -> None:
    config = ServeConfig(max_body_mb=0.5, max_text_mb=0.25)
    assert (config.max_body_bytes, config.max_text_bytes) == (500_000, 250_000)
