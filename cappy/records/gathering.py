"""Gathering: the folders that shards of a step wrote become one, part by part, in the order of the shards."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from cappy.config import DEFAULT_WORK, LOCATION, Fresh, Location, Work, settings
from cappy.errors import ConfigError
from cappy.progress import Progress, silent
from cappy.records.folder import File, Manifest, link_or_copy, read_manifest, verify_file
from cappy.records.work import claim, finish, refuse_same

__all__ = ["GatheringConfig", "run"]


@settings
class GatheringConfig:
    """One folder of records, from several."""

    source: Annotated[
        tuple[Path, ...], LOCATION, Field(min_length=1, description="Folder of a shard, in the order of the shards")
    ]
    target: Annotated[Location, Field(description="Folder to write")]
    work: Work = DEFAULT_WORK
    fresh: Fresh = ""


def run(config: GatheringConfig, progress: Progress = silent) -> Manifest:
    """Gathers the parts of every source into `target`, each part's sha256 checked, none rewritten.

    The manifest names the sources as parents and adds up what they counted. ConfigError if the sources come from
    different steps; FolderError if one is damaged.
    """
    for place in config.source:
        refuse_same(place, config.target)
    sources = [read_manifest(folder) for folder in config.source]
    if len({source.hash for source in sources}) < len(sources):
        raise ConfigError("gathering: two sources hold the same work; give each shard once")
    if len({source.step for source in sources}) > 1:
        names = ", ".join(sorted({source.step for source in sources}))
        raise ConfigError(f"gathering: the sources come from different steps ({names}); give the shards of one")
    if len({source.step_version for source in sources}) > 1:
        numbers = ", ".join(str(number) for number in sorted({source.step_version for source in sources}))
        raise ConfigError(f"gathering: the sources are of different versions of the step ({numbers}); run them again")
    with claim(config.work, "gathering", {}, [source.hash for source in sources], fresh=config.fresh) as folder:
        files: list[File] = []
        total = sum(len(source.files) for source in sources)
        for place, source in zip(config.source, sources, strict=True):
            for file in source.files:
                files.append(_link_part(verify_file(place, file), file, folder, len(files)))
                progress(len(files), total, unit="parts")
        manifest = Manifest(
            step=sources[0].step,
            files=tuple(files),
            config=_common_settings([source.config for source in sources]),
            step_version=sources[0].step_version,
            seed=sources[0].seed,
            generators={name: each for source in sources for name, each in source.generators.items()},
            parents=tuple(source.hash for source in sources),
            metrics=_sum_counts([source.metrics for source in sources]),
        )
        return finish(folder, config.target, manifest)


def _link_part(path: Path, file: File, folder: Path, number: int) -> File:
    """The part under the number that it has among all, by hard link where the file system allows it."""
    name = f"part-{number:05d}.parquet"
    link_or_copy(path, folder / name)
    return replace(file, name=name)


def _common_settings(configs: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """The settings that all shards had: all but which shard it was."""
    first, *others = configs
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def _sum_counts(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Counts added up; what is not a whole number in some shard (a mean, a rate) cannot be added, and is left out."""
    names = {name: None for each in metrics for name in each}
    whole = [name for name in names if all(float(each.get(name, 0)).is_integer() for each in metrics)]
    return {name: sum(each.get(name, 0) for each in metrics) for name in whole}
