"""The settings of preparation, and which kinds of source use each of them; a setting without effect is an error."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from cappy.config import ADVANCED, DEFAULT_WORK, RESULT_NEUTRAL, Fresh, Location, Work, settings
from cappy.errors import ConfigError
from cappy.preparation.columns import parse_columns
from cappy.records.work import ShardSetting, parse_shard

BUILTIN = "builtin"


@settings
class PreparationConfig:
    """Makes instances from built-in tasks, files, BIG-bench tasks, datasets with templates, the hub, or a mixture."""

    source: Annotated[
        str,
        RESULT_NEUTRAL,
        Field(
            min_length=1,
            description="builtin, a JSON Lines, JSON, CSV, TSV, Parquet or Arrow file (text files may be compressed), "
            "a folder of such files, a folder written by save_to_disk, a BIG-bench task or a folder of tasks, a folder "
            "of records or of its shards, or hub:org/name:configuration@revision",
        ),
    ] = BUILTIN
    target: Annotated[Location, Field(description="Folder to write")]
    seed: Annotated[int, Field(description="Seed for drawing splits and built-in tasks")] = 0
    test: Annotated[
        float,
        Field(ge=0, lt=1, description="Fraction of a file's groups for the test split, which is never trained on"),
    ] = 0.2
    validation: Annotated[
        float, Field(ge=0, lt=1, description="Fraction of a file's groups for early stopping and calibration")
    ] = 0.1
    task: Annotated[
        str | None, Field(min_length=1, description="Task of instances without one; the name of the file if left out")
    ] = None
    num_per_family: Annotated[int, ADVANCED, Field(ge=1, description="Instances to draw from each built-in family")] = (
        80
    )
    families: Annotated[
        tuple[str, ...], ADVANCED, Field(description="Built-in families to draw from; all if left out")
    ] = ()
    pool: Annotated[
        Literal["adaptation", "pretraining"],
        ADVANCED,
        Field(description="Built-in pool: adaptation has a test split, pretraining omits the held-out families"),
    ] = "adaptation"
    columns: Annotated[
        tuple[str, ...],
        Field(description="Column to read a field from: FIELD=COLUMN, such as instruction=question"),
    ] = ()
    ignore_columns: Annotated[
        tuple[str, ...],
        Field(
            description="Column to ignore; a column that looks like task content but maps to no field is otherwise an "
            "error"
        ),
    ] = ()
    group_responses: Annotated[
        Literal["auto", "always", "never"],
        Field(
            description="Join the rows of a prompt into one instance: always, never, or auto (join if every row has "
            "exactly one response)"
        ),
    ] = "auto"
    exclude: Annotated[
        tuple[str, ...],
        ADVANCED,
        Field(description="Pattern of systems whose candidates are dropped, such as 'primary/*'"),
    ] = ()
    unlabelled: Annotated[
        bool, Field(description="Rows need responses but no reference: for scoring, not for training")
    ] = False
    split: Annotated[str, Field(min_length=1, description="Split of a hub dataset or folder to read")] = "train"
    templates: Annotated[
        Path | None,
        RESULT_NEUTRAL,
        Field(description="Folder of PromptSource templates for rendering the rows of a dataset"),
    ] = None
    dataset: Annotated[
        str | None,
        Field(min_length=1, description="Dataset of the templates: a folder under --templates, such as super_glue/rte"),
    ] = None
    template: Annotated[
        tuple[str, ...], Field(description="Pattern of template names to use, or to leave out: '!yes*'")
    ] = ()
    max_failed: Annotated[
        float, ADVANCED, Field(ge=0, le=1, description="Largest share of rows on which a template may fail")
    ] = 0.0
    missing: Annotated[
        Literal["blank", "fail"],
        ADVANCED,
        Field(description="If a row lacks a field that a template reads: render it blank, as in PromptSource, or fail"),
    ] = "blank"
    mixture: Annotated[
        Literal["t0", "heldout", "bigbench45"] | None,
        Field(description="Name of a mixture of the paper's datasets, read from the hub; replaces --source"),
    ] = None
    subsets: Annotated[
        tuple[str, ...], ADVANCED, Field(description="Pattern of datasets of the mixture to read; all if left out")
    ] = ()
    local: Annotated[
        Path | None,
        ADVANCED,
        RESULT_NEUTRAL,
        Field(description="Folder with local files of the mixture's datasets, NAME.SPLIT.jsonl"),
    ] = None
    against: Annotated[
        tuple[Path, ...],
        RESULT_NEUTRAL,
        Field(description="Folder of an evaluation set; no training instance may share a prompt, group or row with it"),
    ] = ()
    leaked: Annotated[
        Literal["refuse", "drop"], Field(description="What to do with training instances that occur in --against")
    ] = "refuse"
    max_characters: Annotated[int, ADVANCED, Field(ge=1, description="Longest accepted text in characters")] = 20_000
    part_rows: Annotated[
        int,
        ADVANCED,
        Field(ge=1, description="Instances per part; an interrupted run resumes after the last finished part"),
    ] = 512
    shard: ShardSetting = ""
    work: Work = DEFAULT_WORK
    fresh: Fresh = ""

    def __post_init__(self) -> None:
        parse_shard(self.shard)
        parse_columns(self.columns)
        if self.test + self.validation >= 1:
            share = f"--test {self.test} and --validation {self.validation}"
            raise ConfigError(f"preparation: {share} leave no training data; their sum must be below 1")
        for name, check in _REQUIREMENT_CHECKS.items():
            if getattr(self, name) and not check(self):
                raise ConfigError(f"preparation: --{name} {_REQUIREMENTS[name]}")
        if contradictory := sorted(set(self.ignore_columns) & set(parse_columns(self.columns).values())):
            problem = f"--columns reads {contradictory[0]}, but --ignore-columns ignores it"
            raise ConfigError(f"preparation: {problem}; leave one of them out")
        if self.leaked == "drop" and not self.against:
            raise ConfigError("preparation: --leaked drop needs evaluation sets; give --against")


_REQUIREMENTS = {
    "columns": "maps columns of a file; give --source, or leave it out",
    "families": "selects built-in tasks; leave it out with a --source",
    "dataset": "selects a folder of templates; give --templates FOLDER, or leave it out",
    "template": "selects templates; give --templates FOLDER, or leave it out",
    "subsets": "selects datasets of a mixture; give --mixture, or leave it out",
    "local": "is a folder with datasets of a mixture; give --mixture, or leave it out",
    "mixture": "replaces --source; leave one of them out",
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
    "templates": "a dataset with templates",
    "mixture": "a mixture",
}
COMMON_SETTINGS = frozenset(
    ("source", "target", "seed", "test", "validation", "against", "leaked", "part_rows", "shard", "work", "fresh")
)
"""Settings that every kind of source uses, and the shares of splits, which `_check_splits` checks."""
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
_KINDS_WITH_SPLITS: tuple[Kind, ...] = ("builtin", "records")
"""Kinds of source whose instances already have splits."""


def check_settings(config: PreparationConfig, kind: Kind) -> None:
    """Raises ConfigError if a setting is set that this kind of source does not use."""
    for setting in dataclasses.fields(config):
        if (
            setting.name in KINDS_BY_SETTING
            and kind not in KINDS_BY_SETTING[setting.name]
            and _is_set(config, setting.name)
        ):
            raise ConfigError(
                f"preparation: --{_flag_name(setting.name)} does not apply to {KIND_NAMES[kind]}; leave it out"
            )
    _check_splits(config, kind)


def _check_splits(config: PreparationConfig, kind: Kind) -> None:
    """Raises ConfigError if --test or --validation is set for a kind whose splits are fixed."""
    scored_only = config.unlabelled and config.test == config.validation == 0
    names = ("test", "validation") if kind in _KINDS_WITH_SPLITS else ("test",) if kind == "mixture" else ()
    for name in names:
        is_set = _is_set(config, name) and not (kind == "mixture" and config.test == 0)
        if is_set and not scored_only:
            reason = "whose test split is fixed" if kind == "mixture" else "whose splits are fixed"
            raise ConfigError(f"preparation: --{name} does not apply to {KIND_NAMES[kind]}, {reason}; leave it out")


def _is_set(config: PreparationConfig, name: str) -> bool:
    return bool(getattr(config, name) != PreparationConfig.__dataclass_fields__[name].default)


def _flag_name(name: str) -> str:
    return name.replace("_", "-")
