"""Configs of the steps: typed, frozen, validated before anything heavy is imported.

A step's config is `@settings class XConfig:` with `Annotated[type, Field(description=...)]` fields. The command line
shows the descriptions; pipelines pass the values as one encoded JSON object.
"""

import base64
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, dataclass_transform, get_type_hints

import pydantic
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter

from cappy.errors import ConfigError, Problems, quote, suggest

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

T = TypeVar("T")

RESULT_NEUTRAL = "result_neutral"
"""Marks a setting that does not change the result: a path, a timeout, a number of workers, a price."""
Location = Annotated[Path, RESULT_NEUTRAL]
"""A path that says where something is stored, not what is computed: it is left out of manifests and work keys."""

ADVANCED = "advanced"
"""Marks a setting that few people need: `--help-all` shows its flag, `--help` does not."""

DEFAULT_WORK = Path(".cappy/work")
Work = Annotated[Path, RESULT_NEUTRAL, Field(description="Folder of unfinished and finished work, to resume from")]
Workers = Annotated[
    int,
    RESULT_NEUTRAL,
    Field(ge=1, le=256, description="Number of worker processes; the result does not depend on it"),
]

Renames = Mapping[str, str | tuple[str, ...]]
"""Old name of a setting -> its new name, or the new names of a setting that was split into several."""

FRESH = "fresh"
Fresh = Annotated[
    str,
    RESULT_NEUTRAL,
    FRESH,
    Field(
        pattern=r"^[A-Za-z0-9-]*$",
        description="Redo the work even if a run with the same settings finished it; a killed --fresh run is resumed",
    ),
]
"""On the command line this is a flag without a value. The config stores a generated run name instead, so that a retry
continues the same run."""


def _cores(value: object) -> str:
    """Cores in the form that every platform takes: a whole number, or thousandths such as 500m."""
    if value == "":
        return ""
    text = f"{value}".strip() if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)(m?)", text)
    thousandths = Decimal(match[1]) * (1 if match[2] else 1000) if match else Decimal(0)
    if thousandths < 1 or thousandths != int(thousandths):
        raise ValueError(f"{quote(value)}: is not a number of cores; give for example 2, 0.5 or 500m")
    return f"{int(thousandths)}m" if thousandths % 1000 else f"{int(thousandths) // 1000}"


def _memory(value: object) -> str:
    """Memory in the form that every platform takes: whole Mi or Gi, rounded up to a whole Mi."""
    if value == "":
        return ""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)(Mi|Gi|Ti)", value.strip()) if isinstance(value, str) else None
    mebibytes = Decimal(match[1]) * 1024 ** ("Mi", "Gi", "Ti").index(match[2]) if match else Decimal(0)
    if not mebibytes:
        raise ValueError(f"{quote(value)}: is not an amount of memory; give for example 512Mi or 1.5Gi")
    whole = math.ceil(mebibytes)
    return f"{whole}Mi" if whole % 1024 else f"{whole // 1024}Gi"


Cores = Annotated[str, BeforeValidator(_cores)]
"""Processor cores: 2, 0.5 or 500m; empty: not given."""
Memory = Annotated[str, BeforeValidator(_memory)]
"""Memory: 512Mi, 1.5Gi or 1Ti; empty: not given."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, Field))
def settings(cls: type[T]) -> type[T]:
    """Decorator that makes a frozen, keyword-only dataclass, which rejects unknown fields and invalid values."""
    config_class: type[T] = pydantic.dataclasses.dataclass(
        frozen=True, kw_only=True, config=ConfigDict(extra="forbid")
    )(cls)  # type: ignore[assignment]
    return config_class


def build(config_class: type[T], values: Mapping[str, Any]) -> T:
    """Builds a config from values.

    Raises ConfigError, which names the invalid field, its value and the rule, or the new name of a renamed field; if
    several fields are invalid, ProblemsError with a line for each.
    """
    step = _step_name(config_class)
    new_flags = renamed_flags(config_class)
    problems = Problems()
    for name in map(flag, values):
        if name in new_flags:
            problems.errors.append(ConfigError(f"{step}: {name} is now {new_flags[name]}"))
    problems.raise_all()
    try:
        return config_class(**values)
    except pydantic.ValidationError as error:
        # One error for each field: a union has one for each of its types.
        first_errors = {each["loc"][:1]: each for each in reversed(error.errors())}
        problems.errors += [_field_error(config_class, each) for each in reversed(first_errors.values())]
        problems.raise_all()
        raise


def _field_error(config_class: type, details: "ErrorDetails") -> ConfigError:
    """The error of one field from pydantic's description."""
    step = _step_name(config_class)
    name = flag(".".join(str(part) for part in details["loc"])).removeprefix("--")
    rule = details["msg"].removeprefix("Value error, ")
    if not name:  # The message of a rule about several fields begins with a flag.
        return ConfigError(f"{step}: --{rule}")
    if details["type"] == "unexpected_keyword_argument":
        setting_names = [path.replace("_", "-") for path in _field_paths(config_class)]
        hint = suggest(name, setting_names, otherwise=f"; `cappy {step} --help` lists them")
        return ConfigError(f"{step}: --{name}: no such setting{hint}")
    value = "" if details["type"] in ("missing", "missing_argument") else f", got {quote(details['input'])}"
    return ConfigError(f"{step}: --{name}: {rule}{value}")


def flag(path: str) -> str:
    """The command-line flag of a setting: --trainjob.service-account for `trainjob.service_account`."""
    return f"--{path.replace('_', '-')}"


def nested_settings(config_class: type) -> dict[str, type]:
    """The fields that are config classes themselves, such as those of a platform: name -> class."""
    fields = dataclasses.fields(config_class)
    hints = get_type_hints(config_class)
    return {field.name: hints[field.name] for field in fields if dataclasses.is_dataclass(hints[field.name])}


def _field_paths(config_class: type) -> list[str]:
    """Names of all settings; those of a nested config are `config.setting`."""
    nested = nested_settings(config_class)
    return [
        f"{field.name}.{inner}" if field.name in nested else field.name
        for field in dataclasses.fields(config_class)
        for inner in (_field_paths(nested[field.name]) if field.name in nested else [""])
    ]


def changed_settings(config: Any) -> list[str]:
    """Names of the settings that differ from their defaults; every field must have a default."""
    return [field.name for field in dataclasses.fields(config) if getattr(config, field.name) != field.default]


def renamed_flags(config_class: type) -> dict[str, str]:
    """Flags of earlier releases -> the flag, or flags, that replace them; a config class lists them in `RENAMED`."""
    names: dict[str, str] = {}
    for cls in config_class.__mro__:
        for old, new in vars(cls).get("RENAMED", {}).items():
            names[flag(old)] = " or ".join(map(flag, new if isinstance(new, tuple) else (new,)))
    return names


def rename_settings(config_class: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Renames settings of an earlier release; a setting that was split into several keeps its old name."""
    new_names: dict[str, str] = {}
    for cls in config_class.__mro__:
        new_names |= {old: name for old, name in vars(cls).get("RENAMED", {}).items() if isinstance(name, str)}
    return {new_names.get(name, name): value for name, value in values.items()}


def to_values(config: Any) -> dict[str, Any]:
    """The config as a dict of JSON values."""
    values: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return values


def result_settings(config: Any) -> dict[str, Any]:
    """The settings that determine the result: `to_values` without those that are marked as `RESULT_NEUTRAL`."""
    hints = get_type_hints(type(config), include_extras=True)
    result_neutral_names = {name for name, hint in hints.items() if RESULT_NEUTRAL in getattr(hint, "__metadata__", ())}
    return {name: value for name, value in to_values(config).items() if name not in result_neutral_names}


def encode(values: Mapping[str, Any]) -> str:
    """Encodes settings as one URL-safe string, since kfp's local runner rewrites some characters of plain arguments."""
    return base64.urlsafe_b64encode(json.dumps(values, sort_keys=True).encode()).decode()


def decode(text: str) -> dict[str, Any]:
    """Decodes the settings that `encode` wrote; {} for an empty text. Raises ConfigError for any other text."""
    try:
        values = json.loads(base64.urlsafe_b64decode(text.encode())) if text else {}
    except ValueError as error:
        raise ConfigError(
            f"settings: not encoded JSON ({quote(text)}); encode them with cappy.config.encode"
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"settings: must be a JSON object, got {quote(values)}")
    return values


def fingerprint(*values: Any) -> str:
    """Hexadecimal sha256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _step_name(config_class: type) -> str:
    return config_class.__name__.removesuffix("Config").lower()
