"""The preparation step: from a source to instances with their splits."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice

from cappy.config import identity
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
from cappy.records.work import claim, finish, parse_shard, refuse_same
from cappy.steps import step_version

__all__ = ["PreparationConfig", "run"]

_DROPPED_AS_HELD_OUT = ("dropped_shared_with_held_out", "dropped_near_held_out", "dropped_leaked")


def run(config: PreparationConfig, progress: Progress = silent) -> Manifest:
    """Prepares `source` or `mixture` into `target`.

    Of a file, every row is checked before anything is written, so a bad one costs no half-written folder: it is read
    twice and never held in memory, for each row only the hashes of its id, group and prompt are. Where a row makes
    many prompts (templates, mixtures), see `prompted`.
    """

    refuse_same(config.source, config.target)
    source = group_rows(open_source(config), config)
    tally = Tally(max_failed=config.max_failed, missing=config.missing)
    instances, total, metrics = _assign_instances(source, config, tally, progress)
    apart = [read_manifest(folder).hash for folder in config.against]
    values = {**identity(config), "task": source.task}
    settings = {**values, "format": source.format, "apart": apart}
    with claim(config.work, "preparation", settings, source.parents, fresh=config.fresh) as folder:
        parts = process(
            filter_leaked(instances, config.against, tally.counts, drop=config.leaked == "drop"),
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
        _warn_left_out(source, tally, parts.counts)
        dropped = sum(count for name, count in tally.counts.items() if name in _DROPPED_AS_HELD_OUT)
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


def _assign_instances(
    source: Source, config: PreparationConfig, tally: Tally, progress: Progress
) -> tuple[Iterator[Instance], int | None, dict[str, float]]:
    """This shard's instances with their splits, how many there are where that is known, and what was counted."""
    shard = parse_shard(config.shard)
    if source.datasets:
        places = prompted.SplitRule(
            seed=config.seed, test=0.0 if config.mixture else config.test, validation=config.validation, shard=shard
        )
        return prompted.make_instances(source.datasets, places, tally, progress), None, {}
    plan = assign_splits(source, config, progress)
    source.unused.check(config.ignore_columns)
    source.unused.warn()
    rows = shard.rows(plan.num_rows)
    dropped = int(plan.left_out[rows.start : rows.stop].sum())
    if dropped:
        tally.counts["dropped_near_held_out"] = dropped
    kept = (one for one in islice(apply_splits(source.rows(), plan), rows.start, rows.stop) if one is not None)
    return kept, len(rows) - dropped, dict(plan.metrics)


def _warn_left_out(source: Source, tally: Tally, counts: Mapping[str, int]) -> None:
    """Says of a source whose rows make prompts what was left out as it was written."""
    if source.datasets and (count := tally.counts["dropped_near_held_out"]):
        total = count + sum(number for split, number in counts.items() if split != "test")
        what = f"left out of training: {count:,} of {total:,} prompts, near-duplicates of held-out ones"
        source.unused.say("near_held_out", what)
        source.unused.warn()


def _count(part: Sequence[Instance]) -> Mapping[str, int]:
    return Counter(str(instance.split) for instance in part)


def _facts(source: Source, tally: Tally) -> dict[str, object]:
    failed = {name: {"rows": count, "first": tally.errors[name]} for name, count in sorted(tally.failed.items())}
    facts = {
        "made_of": dict(source.commits),
        "failed_templates": failed,
        "missing_fields": dict(tally.holes),
        **source.unused.facts(),
    }
    return {name: fact for name, fact in facts.items() if fact}
