"""What `--source` names: the built-in tasks, a file, a folder, a dataset of the hub; or what `--mixture` does."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from pathlib import Path

from cappy.errors import ConfigError, FolderError, shown
from cappy.preparation import BUILTIN, PreparationConfig
from cappy.preparation.bigbench import TASK_FILE, is_task, read_tasks
from cappy.preparation.columns import mapped, parse
from cappy.preparation.fields import choice_candidates, row
from cappy.preparation.files import plain, reader_of
from cappy.preparation.hub import PREFIX, commit_of, parse_hub, read_hub
from cappy.preparation.lines import readable
from cappy.preparation.prompted import Dataset
from cappy.preparation.rows import Row, Rows
from cappy.preparation.shapes import known
from cappy.records import Instance, read, read_manifest
from cappy.records.folder import MANIFEST, Manifest, sha256_of
from cappy.records.shard import parse_shard


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows that can be read again and again, and what of them belongs in the manifest.

    `parents` holds the sha256 of the file, the commit of the hub, or the manifest hash of the folder; `task` what
    instances are called that name no task. `datasets` stands in place of `rows` where a row makes many prompts.
    """

    name: str
    format: str
    rows: Callable[[], Iterator[Row]] = lambda: iter(())
    datasets: Sequence[Dataset] = ()
    task: str = ""
    parents: tuple[str, ...] = ()
    generators: Mapping[str, str] = field(default_factory=dict)
    commits: Mapping[str, str] = field(default_factory=dict)
    check_unchanged: Callable[[], None] = lambda: None


def open_source(config: PreparationConfig) -> Source:
    """The source of a config; ConfigError or FolderError if there is none."""
    if config.mixture or config.templates:
        return _datasets(config)
    if config.source == BUILTIN:
        return _builtin(config)
    if config.source.startswith(PREFIX):
        return _hub(config)
    path = Path(config.source)
    if path.is_dir():
        return _folder(path, config)
    if not path.is_file():
        kinds = f"{BUILTIN}, a JSON Lines, CSV or Parquet file, a BIG-bench task, a folder of records or hub:org/name"
        raise ConfigError(f"{path}: no such file or folder; --source is {kinds}")
    return _bigbench([path], path, config) if is_task(path) else _file(path, config)


def _datasets(config: PreparationConfig) -> Source:
    from cappy.preparation.mixed import mixture, templated

    datasets, made_of = mixture(config) if config.mixture else templated(config)
    return Source(
        name=config.mixture or config.source,
        format="mixture" if config.mixture else "templates",
        datasets=datasets,
        parents=tuple(dict.fromkeys(made_of.values())),
        commits=made_of,
    )


def _builtin(config: PreparationConfig) -> Source:
    from cappy.builtin.tasks import instances

    def rows() -> Iterator[Row]:
        drawn = instances(
            config.pool, num_per_family=config.num_per_family, seed=config.seed, families=config.families or None
        )
        for instance in drawn:
            yield _given(BUILTIN, _with_choices(instance), config.task)

    return Source(name=BUILTIN, format=BUILTIN, rows=rows, task=config.task or "")


def _folder(path: Path, config: PreparationConfig) -> Source:
    if config.columns:
        raise ConfigError(f"{path}: is a folder, whose fields have their names; leave --columns out")
    shards = [path] if (path / MANIFEST).is_file() else sorted(found.parent for found in path.glob(f"*/{MANIFEST}"))
    if not shards:
        tasks = sorted(path.rglob(TASK_FILE))
        if tasks:
            return _bigbench(tasks, path, config)
        remedy = "name a file in it, or run the step that writes it again"
        raise FolderError(f"{path}: is a folder without {MANIFEST}, of its own or in folders of it; {remedy}")
    manifests = [_of_records(shard) for shard in shards]
    _check_shards(shards, manifests)
    return Source(
        name=str(path),
        format="records",
        rows=lambda: (_given(str(shard), found, config.task) for shard in shards for found in read(shard)),
        task=config.task or "",
        parents=tuple(manifest.hash for manifest in manifests),
        generators=dict(chain.from_iterable(manifest.generators.items() for manifest in manifests)),
    )


def _check_shards(folders: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    """FolderError unless the folders are all shards of one piece of work, or none is a shard."""
    shards = [str(manifest.config.get("shard", "")) for manifest in manifests]
    if len(folders) == 1 or not any(shards):
        return
    works = [
        (manifest.step, manifest.code, manifest.parents, {**manifest.config, "shard": ""}) for manifest in manifests
    ]
    try:
        count = parse_shard(next(filter(None, shards))).count
    except ConfigError as error:
        raise FolderError(f"{folders[0].parent}: a manifest in it names no shard; {error}") from error
    missing = {f"{index}/{count}" for index in range(count)} - set(shards)
    odd = next((index for index, work in enumerate(works) if work != works[0] or not shards[index]), None)
    if odd is not None:
        remedy = "move it elsewhere, or run that shard again"
        raise FolderError(f"{folders[odd]}: is no shard of the work that {folders[0]} is a shard of; {remedy}")
    if missing or len(set(shards)) != len(shards):
        what = f"shard {min(missing)} is missing" if missing else "a shard stands there twice"
        raise FolderError(f"{folders[0].parent}: {what}, found {', '.join(sorted(shards))}; run each shard once")


def _of_records(path: Path) -> Manifest:
    manifest = read_manifest(path)
    if not manifest.rows:
        raise FolderError(f"{path}: holds no instances (written by {manifest.step or 'nobody'}); choose another")
    return manifest


def _bigbench(tasks: Sequence[Path], path: Path, config: PreparationConfig) -> Source:
    def rows() -> Rows:
        return read_tasks(tasks, path, seed=config.seed, validation=config.validation)

    return Source(
        name=str(path),
        format="bigbench",
        rows=lambda: (row(*found, task="", max_characters=config.max_characters) for found in rows()),
        parents=tuple(map(sha256_of, tasks)),
    )


def _hub(config: PreparationConfig) -> Source:
    dataset = parse_hub(config.source)
    commit, columns = commit_of(dataset), parse(config.columns)
    task = config.task or dataset.configuration or dataset.repository.partition("/")[2]

    def rows() -> Rows:
        found = read_hub(dataset, commit, config.split)
        return mapped(found, columns) if columns else known(found)

    return Source(
        name=config.source,
        format="hub",
        rows=lambda: (row(*found, task=task, max_characters=config.max_characters) for found in rows()),
        task=task,
        parents=(commit,),
        commits={dataset.name: commit},
    )


def _file(path: Path, config: PreparationConfig) -> Source:
    read_rows = reader_of(path)
    task, columns = config.task or plain(path).stem, parse(config.columns)
    read_row = partial(row, task=task, max_characters=config.max_characters, unlabelled=config.unlabelled)
    with readable(path):
        sha256 = sha256_of(path)

    def read_found() -> Rows:
        return mapped(read_rows(path), columns) if columns else known(read_rows(path))

    def check_unchanged() -> None:
        if sha256_of(path) != sha256:
            raise FolderError(f"{path}: changed while it was read; run the same command again")

    return Source(
        name=str(path),
        format=read_rows.__name__.removeprefix("read_"),
        rows=lambda: (_without(read_row(*found), config.exclude) for found in read_found()),
        task=task,
        parents=(sha256,),
        check_unchanged=check_unchanged,
    )


def _without(found: Row, patterns: Sequence[str]) -> Row:
    """The row without the candidates of the systems that match a pattern."""
    if not patterns:
        return found
    kept = tuple(
        candidate
        for candidate in found.instance.candidates
        if not any(fnmatchcase(candidate.generator, pattern) for pattern in patterns)
    )
    return replace(found, instance=replace(found.instance, candidates=kept))


def _given(name: str, instance: Instance, task: str | None) -> Row:
    """A row of a source of ours, whose ids and splits stand."""
    named = instance if instance.task or not task else replace(instance, task=task)
    return Row(f"{name}: instance {shown(instance.instance_id)}", named)


def _with_choices(instance: Instance) -> Instance:
    return instance if instance.candidates else replace(instance, candidates=choice_candidates(instance.choices))
