"""The gathering step: joins the folders that the shards of a step wrote, in the order of the shards."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from cappy.config import DEFAULT_WORK, RESULT_NEUTRAL, Fresh, Location, Work, settings
from cappy.errors import ConfigError
from cappy.progress import Progress, silent
from cappy.records.folder import File, Manifest, link_or_copy, read_manifest, verify_file
from cappy.records.work import claim, finish, refuse_same_folder

__all__ = ["GatheringConfig", "run"]


@settings
class GatheringConfig:
    """Join the folders that the shards of a step wrote."""

    source: Annotated[
        tuple[Path, ...],
        RESULT_NEUTRAL,
        Field(min_length=1, description="Folder of a shard, in the order of the shards"),
    ]
    target: Annotated[Location, Field(description="Folder to write")]
    work: Work = DEFAULT_WORK
    fresh: Fresh = ""


def run(config: GatheringConfig, progress: Progress = silent) -> Manifest:
    """Gathers the parts of every source in `target`; their sha256 is checked, and they are not rewritten.

    The manifest has the sources as parents and the sums of their counts. Raises ConfigError if the sources come from
    different steps or versions or two are the same, and FolderError if one is damaged.
    """
    for source_folder in config.source:
        refuse_same_folder(source_folder, config.target)
    sources = [read_manifest(folder) for folder in config.source]
    if len({source.hash for source in sources}) < len(sources):
        raise ConfigError("gathering: two sources contain the same work; give each shard once")
    if len({source.step for source in sources}) > 1:
        names = ", ".join(sorted({source.step for source in sources}))
        raise ConfigError(f"gathering: the sources come from different steps ({names}); give the shards of one step")
    if len({source.step_version for source in sources}) > 1:
        numbers = ", ".join(str(number) for number in sorted({source.step_version for source in sources}))
        raise ConfigError(
            f"gathering: the sources come from different versions of the step ({numbers}); run them again"
        )
    with claim(config.work, "gathering", {}, [source.hash for source in sources], fresh=config.fresh) as folder:
        files: list[File] = []
        total = sum(len(source.files) for source in sources)
        for source_folder, source in zip(config.source, sources, strict=True):
            for file in source.files:
                files.append(_link_part(verify_file(source_folder, file), file, folder, len(files)))
                progress(len(files), total, unit="parts")
        manifest = Manifest(
            step=sources[0].step,
            files=tuple(files),
            config=_common_settings([source.config for source in sources]),
            step_version=sources[0].step_version,
            seed=sources[0].seed,
            generators={name: revision for source in sources for name, revision in source.generators.items()},
            parents=tuple(source.hash for source in sources),
            metrics=_sum_counts([source.metrics for source in sources]),
        )
        return finish(folder, config.target, manifest)


def _link_part(path: Path, file: File, folder: Path, index: int) -> File:
    """Links or copies a part under its index among all parts."""
    name = f"part-{index:05d}.parquet"
    link_or_copy(path, folder / name)
    return replace(file, name=name)


def _common_settings(configs: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """The settings that are equal in all shards: all but `shard`."""
    first, *others = configs
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def _sum_counts(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Sums of the counts; metrics that are not integers in some shard (a mean, a rate) are left out."""
    names = {name: None for values in metrics for name in values}
    counts = [name for name in names if all(float(values.get(name, 0)).is_integer() for values in metrics)]
    return {name: sum(values.get(name, 0) for values in metrics) for name in counts}
