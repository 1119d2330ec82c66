"""The preparation step: from a source to instances with their splits."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from cappy.config import DEFAULT_WORK, LOCATION, Fresh, Location, Work, identity, settings
from cappy.errors import ConfigError, RecordError
from cappy.preparation.columns import parse
from cappy.progress import Progress, silent
from cappy.records import Instance, Manifest
from cappy.records.shard import ShardOf, parse_shard, refuse_same
from cappy.steps import step_version

if TYPE_CHECKING:
    from cappy.preparation.prompted import Tally
    from cappy.preparation.sources import Source


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
    num_per_family: Annotated[int, Field(ge=1, description="Instances of each built-in family")] = 80
    families: Annotated[tuple[str, ...], Field(description="Built-in families to draw from; all if left out")] = ()
    pool: Annotated[
        Literal["adaptation", "pretraining"],
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
        float, Field(ge=0, le=1, description="Largest share of its rows that a template may fail on")
    ] = 0.0
    missing: Annotated[
        Literal["blank", "fail"],
        Field(description="A field that a template reads and a row lacks is nothing, as in PromptSource, or a failure"),
    ] = "blank"
    mixture: Annotated[
        Literal["t0", "heldout", "bigbench45"] | None,
        Field(description="Datasets of the paper by name, read from the hub; takes the place of --source"),
    ] = None
    subsets: Annotated[tuple[str, ...], Field(description="Pattern of the mixture's datasets; all if left out")] = ()
    local: Annotated[
        Path | None, LOCATION, Field(description="Folder of the mixture's datasets that are at hand, NAME.SPLIT.jsonl")
    ] = None
    against: Annotated[
        tuple[Path, ...],
        LOCATION,
        Field(description="Folder of an evaluation set: no instance to train on may have a prompt, group or row of it"),
    ] = ()
    leaked: Annotated[
        Literal["refuse", "drop"], Field(description="What to do with training instances that stand in --against")
    ] = "refuse"
    max_characters: Annotated[int, Field(ge=1, description="Longest text accepted from a file, in characters")] = 20_000
    part_rows: Annotated[int, Field(ge=1, description="Instances per part; a killed run continues at a part")] = 512
    shard: ShardOf = ""
    work: Work = DEFAULT_WORK
    fresh: Fresh = ""

    def __post_init__(self) -> None:
        parse_shard(self.shard)
        parse(self.columns)
        if self.test + self.validation >= 1:
            share = f"--test {self.test} and --validation {self.validation}"
            raise ConfigError(f"preparation: {share} leave nothing to train on; their sum must be below 1")
        for name, needs in _NEEDS.items():
            if getattr(self, name) and not needs(self):
                raise ConfigError(f"preparation: --{name} {_WITHOUT[name]}")
        if both := sorted(set(self.ignore_columns) & set(parse(self.columns).values())):
            what = f"--columns reads {both[0]}, --ignore-columns leaves it out"
            raise ConfigError(f"preparation: {what}; give one of them")
        if self.leaked == "drop" and not self.against:
            raise ConfigError("preparation: --leaked says what to do with instances of --against; give that too")


_HELD_OUT_TOO = ("dropped_shared_with_held_out", "dropped_near_held_out", "dropped_leaked")
_WITHOUT = {
    "columns": "names columns of a file; leave it out without a --source",
    "families": "chooses among the built-in tasks; leave it out with a --source",
    "dataset": "says whose templates are meant; give --templates FOLDER, or leave it out",
    "template": "chooses among templates; give --templates FOLDER, or leave it out",
    "subsets": "chooses among the datasets of a mixture; give --mixture, or leave it out",
    "local": "holds datasets of a mixture; give --mixture, or leave it out",
    "mixture": "takes the place of --source; leave one of them out",
}
_NEEDS: Mapping[str, Any] = {
    "columns": lambda config: config.source != BUILTIN,
    "families": lambda config: config.source == BUILTIN,
    "dataset": lambda config: config.templates,
    "template": lambda config: config.templates,
    "subsets": lambda config: config.mixture,
    "local": lambda config: config.mixture,
    "mixture": lambda config: config.source == BUILTIN,
}


def run(config: PreparationConfig, progress: Progress = silent) -> Manifest:
    """Prepares `source` or `mixture` into `target`.

    Of a file, every row is checked before anything is written, so a bad one costs no half-written folder: it is read
    twice and never held in memory, for each row only the hashes of its id, group and prompt are. Where a row makes
    many prompts (templates, mixtures), see `prompted`.
    """
    from cappy.preparation.leakage import evaluated, kept_apart
    from cappy.preparation.prompted import Tally
    from cappy.preparation.sources import group_rows, open_source
    from cappy.records import read_manifest
    from cappy.records.parts import process
    from cappy.records.work import claim, finish

    refuse_same(config.source, config.target)
    source = group_rows(open_source(config), config)
    tally = Tally(max_failed=config.max_failed, missing=config.missing)
    instances, total, metrics = _placed(source, config, tally, progress)
    apart = [read_manifest(folder).hash for folder in config.against]
    values = {**identity(config), "task": source.task}
    with claim(
        config.work, "preparation", {**values, "format": source.format, "apart": apart}, source.parents
    ) as folder:
        parts = process(
            kept_apart(instances, evaluated(config.against), config.against, tally, drop=config.leaked == "drop"),
            folder,
            lambda part: part,
            part_rows=config.part_rows,
            progress=partial(progress, unit="instances"),
            total=total,
            count=_count,
        )
        source.check_unchanged()
        tally.check()
        if not parts.rows:
            raise RecordError(f"{source.name}: nothing is left to write; give more rows, or fewer shards")
        _say_left_out(source, tally, parts.counts)
        dropped = sum(count for name, count in tally.counts.items() if name in _HELD_OUT_TOO)
        if dropped and not config.shard and not parts.counts.get("train"):
            what = f"nothing is left to train on: {dropped:,} instances have a prompt that is held out too, or nearly"
            raise RecordError(f"{source.name}: {what}; check --dataset, --against and the data")
        counts = {**dict.fromkeys(("train", "validation", "test"), 0), **parts.counts}
        manifest = Manifest(
            step="preparation",
            files=parts.files,
            config=values,
            step_version=step_version("preparation"),
            seed=config.seed,
            generators=source.generators,
            parents=source.parents,
            metrics={
                "instances": float(parts.rows),
                **{name: float(count) for name, count in {**counts, **metrics, **tally.counts}.items()},
                "candidates": float(parts.candidates),
            },
            facts={"format": source.format, **_facts(source, tally)},
        )
        return finish(folder, config.target, manifest)


def _placed(
    source: "Source", config: PreparationConfig, tally: "Tally", progress: Progress
) -> tuple[Iterator[Instance], int | None, dict[str, float]]:
    """This shard's instances with their splits, how many there are where that is known, and what was counted."""
    from cappy.preparation import prompted
    from cappy.preparation.splits import place, survey

    shard = parse_shard(config.shard)
    if source.datasets:
        places = prompted.Places(
            seed=config.seed, test=0.0 if config.mixture else config.test, validation=config.validation, shard=shard
        )
        return prompted.instances(source.datasets, places, tally, progress), None, {}
    plan = survey(source, config, progress)
    source.unused.check(config.ignore_columns)
    source.unused.warn()
    rows = shard.rows(plan.num_rows)
    dropped = int(plan.left_out[rows.start : rows.stop].sum())
    if dropped:
        tally.counts["dropped_near_held_out"] = dropped
    placed = (one for one in islice(place(source.rows(), plan), rows.start, rows.stop) if one is not None)
    return placed, len(rows) - dropped, dict(plan.metrics)


def _say_left_out(source: "Source", tally: "Tally", counts: Mapping[str, int]) -> None:
    """Says of a source whose rows make prompts what was left out as it was written."""
    if source.datasets and (count := tally.counts["dropped_near_held_out"]):
        total = count + sum(number for split, number in counts.items() if split != "test")
        what = f"left out of training: {count:,} of {total:,} prompts, near-duplicates of held-out ones"
        source.unused.say("near_held_out", what)
        source.unused.warn()


def _count(part: Sequence[Instance]) -> Mapping[str, int]:
    return Counter(str(instance.split) for instance in part)


def _facts(source: "Source", tally: "Tally") -> dict[str, Any]:
    failed = {name: {"rows": count, "first": tally.errors[name]} for name, count in sorted(tally.failed.items())}
    facts = {
        "made_of": dict(source.commits),
        "failed_templates": failed,
        "missing_fields": dict(tally.holes),
        **source.unused.facts(),
    }
    return {name: fact for name, fact in facts.items() if fact}
