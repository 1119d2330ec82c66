"""The settings of preparation, and which of them each kind of source heeds: no setting is given in vain."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from cappy.config import ADVANCED, DEFAULT_WORK, LOCATION, Fresh, Location, Work, settings
from cappy.errors import ConfigError
from cappy.preparation.columns import parse_columns
from cappy.records.work import ShardOf, parse_shard

BUILTIN = "builtin"


@settings
class PreparationConfig:
    """Instances from the built-in tasks, files, BIG-bench tasks, templates over datasets, the hub, or a mixture."""

    source: Annotated[
        str,
        LOCATION,
        Field(
            min_length=1,
            description="builtin, a JSON Lines, JSON, CSV, TSV, Parquet or Arrow file (text also packed), a folder of "
            "such files or of save_to_disk, a BIG-bench task or a folder of them, a folder of records or of its "
            "shards, or hub:org/name:configuration@revision",
        ),
    ] = BUILTIN
    target: Annotated[Location, Field(description="Folder to write")]
    seed: Annotated[int, Field(description="Seed of the split, and of the draw of built-in tasks")] = 0
    test: Annotated[
        float, Field(ge=0, lt=1, description="Fraction of a file's groups for the report; kept from all training")
    ] = 0.2
    validation: Annotated[
        float, Field(ge=0, lt=1, description="Fraction of a file's groups that stops training early and calibrates")
    ] = 0.1
    task: Annotated[
        str | None, Field(min_length=1, description="Task of instances that name none; a file's own name if left out")
    ] = None
    num_per_family: Annotated[int, ADVANCED, Field(ge=1, description="Instances of each built-in family")] = 80
    families: Annotated[
        tuple[str, ...], ADVANCED, Field(description="Built-in families to draw from; all if left out")
    ] = ()
    pool: Annotated[
        Literal["adaptation", "pretraining"],
        ADVANCED,
        Field(description="Built-in pool: adaptation has a test split, pretraining leaves the held-out families out"),
    ] = "adaptation"
    columns: Annotated[
        tuple[str, ...],
        Field(description="Column of a file that a field is read from: FIELD=COLUMN, such as instruction=question"),
    ] = ()
    ignore_columns: Annotated[
        tuple[str, ...],
        Field(description="Column that nothing is read from, on purpose: one that matters is refused otherwise"),
    ] = ()
    group_responses: Annotated[
        Literal["auto", "always", "never"],
        Field(
            description="Rows of one prompt become one instance: auto where every row has one response, always, never"
        ),
    ] = "auto"
    exclude: Annotated[
        tuple[str, ...],
        ADVANCED,
        Field(description="Pattern of systems whose candidates are left out of a file, such as 'primary/*'"),
    ] = ()
    unlabelled: Annotated[
        bool, Field(description="A file's rows need responses and no reference: to be scored, not to learn from")
    ] = False
    split: Annotated[str, Field(min_length=1, description="Split of a dataset of the hub to read")] = "train"
    templates: Annotated[
        Path | None,
        LOCATION,
        Field(description="Folder of PromptSource templates to render the rows of a dataset with"),
    ] = None
    dataset: Annotated[
        str | None,
        Field(min_length=1, description="Whose templates: a folder under --templates, such as super_glue/rte"),
    ] = None
    template: Annotated[
        tuple[str, ...], Field(description="Pattern of template names to render, or of those to leave out: '!yes*'")
    ] = ()
    max_failed: Annotated[
        float, ADVANCED, Field(ge=0, le=1, description="Largest share of its rows that a template may fail on")
    ] = 0.0
    missing: Annotated[
        Literal["blank", "fail"],
        ADVANCED,
        Field(description="A field that a template reads and a row lacks is nothing, as in PromptSource, or a failure"),
    ] = "blank"
    mixture: Annotated[
        Literal["t0", "heldout", "bigbench45"] | None,
        Field(description="Datasets of the paper by name, read from the hub; takes the place of --source"),
    ] = None
    subsets: Annotated[
        tuple[str, ...], ADVANCED, Field(description="Pattern of the mixture's datasets; all if left out")
    ] = ()
    local: Annotated[
        Path | None,
        ADVANCED,
        LOCATION,
        Field(description="Folder of the mixture's datasets that are at hand, NAME.SPLIT.jsonl"),
    ] = None
    against: Annotated[
        tuple[Path, ...],
        LOCATION,
        Field(description="Folder of an evaluation set: no instance to train on may have a prompt, group or row of it"),
    ] = ()
    leaked: Annotated[
        Literal["refuse", "drop"], Field(description="What to do with training instances that stand in --against")
    ] = "refuse"
    max_characters: Annotated[
        int, ADVANCED, Field(ge=1, description="Longest text accepted from a file, in characters")
    ] = 20_000
    part_rows: Annotated[
        int, ADVANCED, Field(ge=1, description="Instances per part; a killed run continues at a part")
    ] = 512
    shard: ShardOf = ""
    work: Work = DEFAULT_WORK
    fresh: Fresh = ""

    def __post_init__(self) -> None:
        parse_shard(self.shard)
        parse_columns(self.columns)
        if self.test + self.validation >= 1:
            share = f"--test {self.test} and --validation {self.validation}"
            raise ConfigError(f"preparation: {share} leave nothing to train on; their sum must be below 1")
        for name, needs in _REQUIREMENT_CHECKS.items():
            if getattr(self, name) and not needs(self):
                raise ConfigError(f"preparation: --{name} {_REQUIREMENTS[name]}")
        if both := sorted(set(self.ignore_columns) & set(parse_columns(self.columns).values())):
            what = f"--columns reads {both[0]}, --ignore-columns leaves it out"
            raise ConfigError(f"preparation: {what}; give one of them")
        if self.leaked == "drop" and not self.against:
            raise ConfigError("preparation: --leaked says what to do with instances of --against; give that too")


_REQUIREMENTS = {
    "columns": "names columns of a file; leave it out without a --source",
    "families": "chooses among the built-in tasks; leave it out with a --source",
    "dataset": "says whose templates are meant; give --templates FOLDER, or leave it out",
    "template": "chooses among templates; give --templates FOLDER, or leave it out",
    "subsets": "chooses among the datasets of a mixture; give --mixture, or leave it out",
    "local": "holds datasets of a mixture; give --mixture, or leave it out",
    "mixture": "takes the place of --source; leave one of them out",
}
_REQUIREMENT_CHECKS: Mapping[str, Callable[[PreparationConfig], object]] = {
    "columns": lambda config: config.source != BUILTIN,
    "families": lambda config: config.source == BUILTIN,
    "dataset": lambda config: config.templates,
    "template": lambda config: config.templates,
    "subsets": lambda config: config.mixture,
    "local": lambda config: config.mixture,
    "mixture": lambda config: config.source == BUILTIN,
}

Kind = Literal["builtin", "file", "tables", "hub", "records", "bigbench", "templates", "mixture"]

KIND_NAMES: Mapping[Kind, str] = {
    "builtin": "the built-in tasks",
    "file": "a file",
    "tables": "a folder of data files",
    "hub": "a dataset of the hub",
    "records": "a folder of records",
    "bigbench": "a BIG-bench task",
    "templates": "a dataset under templates",
    "mixture": "a mixture",
}
COMMON_SETTINGS = frozenset(
    ("source", "target", "seed", "test", "validation", "against", "leaked", "part_rows", "shard", "work", "fresh")
)
"""Settings that every kind heeds, or whose rule is `_check_splits`."""
TABULAR_KINDS: tuple[Kind, ...] = ("file", "tables", "hub")
KINDS_BY_SETTING: Mapping[str, tuple[Kind, ...]] = {
    "task": (*TABULAR_KINDS, "records", "bigbench"),
    "num_per_family": ("builtin",),
    "families": ("builtin",),
    "pool": ("builtin",),
    "columns": TABULAR_KINDS,
    "ignore_columns": TABULAR_KINDS,
    "group_responses": TABULAR_KINDS,
    "exclude": (*TABULAR_KINDS, "records"),
    "unlabelled": (*TABULAR_KINDS, "records"),
    "split": ("tables", "hub", "templates"),
    "templates": ("templates", "mixture"),
    "dataset": ("templates",),
    "template": ("templates", "mixture"),
    "max_failed": ("templates", "mixture"),
    "missing": ("templates", "mixture"),
    "mixture": ("mixture",),
    "subsets": ("mixture",),
    "local": ("mixture",),
    "max_characters": (*TABULAR_KINDS, "bigbench"),
}
_FIXED_SPLITS: tuple[Kind, ...] = ("builtin", "records")
"""Kinds whose instances have their splits already."""


def check_settings(config: PreparationConfig, kind: Kind) -> None:
    """ConfigError for a setting that is given and that this kind of source does not heed."""
    for setting in dataclasses.fields(config):
        if (
            setting.name in KINDS_BY_SETTING
            and kind not in KINDS_BY_SETTING[setting.name]
            and _is_given(config, setting.name)
        ):
            raise ConfigError(f"preparation: --{_flag(setting.name)} is not for {KIND_NAMES[kind]}; leave it out")
    _check_splits(config, kind)


def _check_splits(config: PreparationConfig, kind: Kind) -> None:
    scored_only = config.unlabelled and config.test == config.validation == 0
    names = ("test", "validation") if kind in _FIXED_SPLITS else ("test",) if kind == "mixture" else ()
    for name in names:
        given = _is_given(config, name) and not (kind == "mixture" and config.test == 0)
        if given and not scored_only:
            what = (
                f"{KIND_NAMES[kind]}, whose test split stands"
                if kind == "mixture"
                else f"{KIND_NAMES[kind]}: splits stand"
            )
            raise ConfigError(f"preparation: --{name} is not for {what}; leave it out")


def _is_given(config: PreparationConfig, name: str) -> bool:
    return bool(getattr(config, name) != PreparationConfig.__dataclass_fields__[name].default)


def _flag(name: str) -> str:
    return name.replace("_", "-")
