"""Which settings each kind of source heeds; the others are refused, so that none is given in vain."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from cappy.errors import ConfigError
from cappy.preparation.step import PreparationConfig

Kind = Literal["builtin", "file", "tables", "hub", "records", "bigbench", "templates", "mixture"]

NAMES: Mapping[Kind, str] = {
    "builtin": "the built-in tasks",
    "file": "a file",
    "tables": "a folder of data files",
    "hub": "a dataset of the hub",
    "records": "a folder of records",
    "bigbench": "a BIG-bench task",
    "templates": "a dataset under templates",
    "mixture": "a mixture",
}
ALWAYS = frozenset(
    ("source", "target", "seed", "validation", "against", "leaked", "part_rows", "shard", "work", "test")
)
"""Settings that every kind heeds, or whose rule is `_check_splits`."""
ROWS: tuple[Kind, ...] = ("file", "tables", "hub")
HEEDED: Mapping[str, tuple[Kind, ...]] = {
    "task": (*ROWS, "records", "bigbench"),
    "num_per_family": ("builtin",),
    "families": ("builtin",),
    "pool": ("builtin",),
    "columns": ROWS,
    "ignore_columns": ROWS,
    "group_responses": ROWS,
    "exclude": (*ROWS, "records"),
    "unlabelled": (*ROWS, "records"),
    "split": ("tables", "hub", "templates"),
    "templates": ("templates", "mixture"),
    "dataset": ("templates",),
    "template": ("templates", "mixture"),
    "max_failed": ("templates", "mixture"),
    "missing": ("templates", "mixture"),
    "mixture": ("mixture",),
    "subsets": ("mixture",),
    "local": ("mixture",),
    "max_characters": (*ROWS, "bigbench"),
}
_SPLITS_STAND: tuple[Kind, ...] = ("builtin", "records")
"""Kinds whose instances have their splits already."""


def check_settings(config: PreparationConfig, kind: Kind) -> None:
    """ConfigError for a setting that is given and that this kind of source does not heed."""
    for setting in dataclasses.fields(config):
        if setting.name in HEEDED and kind not in HEEDED[setting.name] and _is_given(config, setting.name):
            raise ConfigError(f"preparation: --{_flag(setting.name)} is not for {NAMES[kind]}; leave it out")
    _check_splits(config, kind)


def _check_splits(config: PreparationConfig, kind: Kind) -> None:
    scored_only = config.unlabelled and config.test == config.validation == 0
    names = ("test", "validation") if kind in _SPLITS_STAND else ("test",) if kind == "mixture" else ()
    for name in names:
        given = _is_given(config, name) and not (kind == "mixture" and config.test == 0)
        if given and not scored_only:
            what = f"{NAMES[kind]}, whose test split stands" if kind == "mixture" else f"{NAMES[kind]}: splits stand"
            raise ConfigError(f"preparation: --{name} is not for {what}; leave it out")


def _is_given(config: PreparationConfig, name: str) -> bool:
    value: Any = getattr(config, name)
    return bool(value != PreparationConfig.__dataclass_fields__[name].default)


def _flag(name: str) -> str:
    return name.replace("_", "-")
