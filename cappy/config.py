"""Settings of a step: typed, frozen, validated before anything heavy is imported.

A step's config is `@settings class XConfig:` with `Annotated[type, Field(description=...)]` fields; the command line
shows the descriptions, the pipelines send the values as one encoded JSON.
"""

import base64
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform, get_type_hints

import pydantic
from pydantic import ConfigDict, Field, TypeAdapter

from cappy.errors import ConfigError, near, quote

T = TypeVar("T")

LOCATION = "location"
Location = Annotated[Path, LOCATION]
"""A path that says where something lies and not what is computed: it stays out of manifests and work keys."""

ADVANCED = "advanced"
"""Marks a setting that few people need: `--help-all` shows its flag, `--help` does not."""

DEFAULT_WORK = Path(".cappy/work")
Work = Annotated[Path, LOCATION, Field(description="Folder that keeps unfinished and finished work, to resume from")]
Workers = Annotated[
    int,
    LOCATION,
    Field(ge=1, le=256, description="Processes that share the work; the result is the same for any number"),
]

Renames = Mapping[str, str | tuple[str, ...]]
"""Settings of an earlier release -> the setting that says it now, or several of which one does."""

FRESH = "fresh"
Fresh = Annotated[
    str,
    LOCATION,
    FRESH,
    Field(
        pattern=r"^[A-Za-z0-9-]*$",
        description="Do the work again, whatever an earlier run of the same settings left; a killed one continues",
    ),
]
"""On the command line a flag without a value. The value names the run that asked: its retries continue its own work."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, Field))
def settings(cls: type[T]) -> type[T]:
    """Makes a frozen, keyword-only dataclass that refuses unknown fields and wrong values."""
    frozen: type[T] = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))(cls)  # type: ignore[assignment]
    return frozen


def build(config_class: type[T], values: Mapping[str, Any]) -> T:
    """The config with these values; ConfigError names the field, the value and the rule, or a field's new name."""
    step = _step_of(config_class)
    renamed = renamed_flags(config_class)
    for name in map(flag, values):
        if name in renamed:
            raise ConfigError(f"{step}: {name} is now {renamed[name]}")
    try:
        return config_class(**values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = flag(".".join(str(part) for part in first["loc"])).removeprefix("--")
        rule = first["msg"].removeprefix("Value error, ")
        if not name:  # a rule over several fields, which names them itself
            raise ConfigError(f"{step}: --{rule}") from error
        if first["type"] == "unexpected_keyword_argument":
            known = [path.replace("_", "-") for path in _field_paths(config_class)]
            meant = near(name, known, otherwise=f"; `cappy {step} --help` lists them")
            raise ConfigError(f"{step}: --{name}: no such setting{meant}") from error
        value = "" if first["type"] in ("missing", "missing_argument") else f", got {quote(first['input'])}"
        raise ConfigError(f"{step}: --{name}: {rule}{value}") from error


def flag(path: str) -> str:
    """The flag of a setting, as it is typed: `trainjob.service_account` is --trainjob.service-account."""
    return f"--{path.replace('_', '-')}"


def groups(config_class: type) -> dict[str, type]:
    """The settings that are settings of their own, such as those of one platform: name -> their class."""
    fields = dataclasses.fields(config_class)
    hints = get_type_hints(config_class)
    return {field.name: hints[field.name] for field in fields if dataclasses.is_dataclass(hints[field.name])}


def _field_paths(config_class: type) -> list[str]:
    """All settings by name, those of a group with the group's name and a dot before them."""
    grouped = groups(config_class)
    return [
        f"{field.name}.{inner}" if field.name in grouped else field.name
        for field in dataclasses.fields(config_class)
        for inner in (_field_paths(grouped[field.name]) if field.name in grouped else [""])
    ]


def changed_settings(config: Any) -> list[str]:
    """The settings that are other than their default, by name; all fields need one."""
    return [field.name for field in dataclasses.fields(config) if getattr(config, field.name) != field.default]


def renamed_flags(config_class: type) -> dict[str, str]:
    """Flag of an earlier release -> the flag, or the flags, that say it now.

    A config class lists its own in `RENAMED`: old name -> the new one, or several.
    """
    names: dict[str, str] = {}
    for cls in config_class.__mro__:
        for old, new in vars(cls).get("RENAMED", {}).items():
            names[flag(old)] = " or ".join(map(flag, new if isinstance(new, tuple) else (new,)))
    return names


def with_new_names(config_class: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that an earlier release wrote, by their names now, where one setting took the place of one."""
    new: dict[str, str] = {}
    for cls in config_class.__mro__:
        new |= {old: name for old, name in vars(cls).get("RENAMED", {}).items() if isinstance(name, str)}
    return {new.get(name, name): value for name, value in values.items()}


def to_values(config: Any) -> dict[str, Any]:
    """A config as JSON values."""
    values: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return values


def identity(config: Any) -> dict[str, Any]:
    """The settings that change what is computed: `to_values` without locations."""
    hints = get_type_hints(type(config), include_extras=True)
    located = {name for name, hint in hints.items() if LOCATION in getattr(hint, "__metadata__", ())}
    return {name: value for name, value in to_values(config).items() if name not in located}


def encode(values: Mapping[str, Any]) -> str:
    """Settings as one URL-safe word: kfp's local runner rewrites some plain text inside arguments."""
    return base64.urlsafe_b64encode(json.dumps(values, sort_keys=True).encode()).decode()


def decode(text: str) -> dict[str, Any]:
    """The settings that `encode` wrote; an empty text means none."""
    try:
        values = json.loads(base64.urlsafe_b64decode(text.encode())) if text else {}
    except ValueError as error:
        raise ConfigError(
            f"settings: not an encoded JSON ({quote(text)}); write them with cappy.config.encode"
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"settings: must hold an object, got {quote(values)}")
    return values


def fingerprint(*values: Any) -> str:
    """sha256 over JSON values, in hexadecimal."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _step_of(config_class: type) -> str:
    return config_class.__name__.removesuffix("Config").lower()
