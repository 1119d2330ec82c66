"""The preparation step: reads a source and writes instances with their splits."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice

from cappy.config import result_settings
from cappy.errors import RecordError
from cappy.preparation import prompted
from cappy.preparation.config import PreparationConfig
from cappy.preparation.leakage import filter_leaked
from cappy.preparation.prompted import Tally
from cappy.preparation.sources import Source, group_rows, open_source
from cappy.preparation.splits import apply_splits, assign_splits
from cappy.progress import Progress, silent
from cappy.records import Instance, Manifest, read_manifest
from cappy.records.parts import process
from cappy.records.work import claim, finish, parse_shard, refuse_same_folder
from cappy.steps import step_version

__all__ = ["PreparationConfig", "run"]

_LEAKAGE_DROP_COUNTS = ("dropped_shared_with_held_out", "dropped_near_held_out", "dropped_leaked")
"""Names of the counts of training instances that were dropped because held-out ones are equal or similar."""


def run(config: PreparationConfig, progress: Progress = silent) -> Manifest:
    """Makes instances from `source` or `mixture` and writes them to `target`.

    A file is read twice: all rows are checked before anything is written, so an invalid row leaves no partial folder.
    Only the hashes of the id, group and prompt of each row are kept in memory. `prompted` handles sources where one row
    makes many prompts (templates, mixtures). Raises ConfigError, FolderError or RecordError for errors in the settings,
    folders or rows.
    """
    refuse_same_folder(config.source, config.target)
    source = group_rows(open_source(config), config)
    tally = Tally(max_failed=config.max_failed, on_missing_field=config.missing)
    instances, total, metrics = _make_instances(source, config, tally, progress)
    evaluation_hashes = [read_manifest(folder).hash for folder in config.against]
    config_values = {**result_settings(config), "task": source.task}
    # "apart" has the hashes of the evaluation folders (--against) that the instances must not overlap with.
    settings = {**config_values, "format": source.format, "apart": evaluation_hashes}
    with claim(config.work, "preparation", settings, source.parents, fresh=config.fresh) as folder:
        parts = process(
            filter_leaked(instances, config.against, tally.counts, drop=config.leaked == "drop"),
            folder,
            lambda part: part,
            part_rows=config.part_rows,
            progress=partial(progress, unit="instances"),
            total=total,
            count=_count_splits,
        )
        source.check_unchanged()
        tally.check()
        if not parts.rows:
            raise RecordError(f"{source.name}: no instances to write; give more rows, or fewer shards")
        _warn_dropped(source, tally, parts.counts)
        num_dropped = sum(count for name, count in tally.counts.items() if name in _LEAKAGE_DROP_COUNTS)
        if num_dropped and not config.shard and not parts.counts.get("train"):
            problem = (
                f"no training instances: {num_dropped:,} were dropped as duplicates or near-duplicates of held-out rows"
            )
            raise RecordError(f"{source.name}: {problem}; check --dataset, --against and the data")
        counts = {**dict.fromkeys(("train", "validation", "test"), 0), **parts.counts}
        manifest = Manifest(
            step="preparation",
            files=parts.files,
            config=config_values,
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


def _make_instances(
    source: Source, config: PreparationConfig, tally: Tally, progress: Progress
) -> tuple[Iterator[Instance], int | None, dict[str, float]]:
    """The instances of this shard with their splits, their number if it is known, and metrics."""
    shard = parse_shard(config.shard)
    if source.datasets:
        rule = prompted.SplitRule(
            seed=config.seed, test=0.0 if config.mixture else config.test, validation=config.validation, shard=shard
        )
        return prompted.make_instances(source.datasets, rule, tally, progress), None, {}
    assignment = assign_splits(source, config, progress)
    source.warnings.check_ignored(config.ignore_columns)
    source.warnings.log()
    rows = shard.rows(assignment.num_rows)
    num_dropped = int(assignment.dropped[rows.start : rows.stop].sum())
    if num_dropped:
        tally.counts["dropped_near_held_out"] = num_dropped
    selected = islice(apply_splits(source.rows(), assignment), rows.start, rows.stop)
    instances = (instance for instance in selected if instance is not None)
    return instances, len(rows) - num_dropped, dict(assignment.metrics)


def _warn_dropped(source: Source, tally: Tally, counts: Mapping[str, int]) -> None:
    """Warns about near-duplicates dropped from prompt datasets. Their number is only known after writing."""
    if source.datasets and (count := tally.counts["dropped_near_held_out"]):
        total = count + sum(number for split, number in counts.items() if split != "test")
        dropped = f"dropped {count:,} of {total:,} prompts of train and validation"
        source.warnings.add("near_held_out", f"{dropped}, which are near-duplicates of held-out prompts")
        source.warnings.log()


def _count_splits(part: Sequence[Instance]) -> Mapping[str, int]:
    return Counter(str(instance.split) for instance in part)


def _facts(source: Source, tally: Tally) -> dict[str, object]:
    """The facts for the manifest, without empty ones."""
    failed = {name: {"rows": count, "first": tally.errors[name]} for name, count in sorted(tally.failures.items())}
    facts = {
        "made_of": dict(source.commits),  # Name of each input -> its commit or hash.
        "failed_templates": failed,
        "missing_fields": dict(tally.missing_fields),
        **source.warnings.facts(),
    }
    return {name: fact for name, fact in facts.items() if fact}
