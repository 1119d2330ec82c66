"""What `--source` or `--mixture` names, as rows of instances; systems left out, rows of one prompt gathered."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np

from cappy.builtin.tasks import instances as builtin_instances
from cappy.errors import ConfigError, FolderError, RecordError, quote
from cappy.preparation.bigbench import HeldOutShares, find_tasks, is_task, map_known_columns, read_tasks
from cappy.preparation.cells import parse_lists
from cappy.preparation.columns import Columns, SourceWarnings, map_columns, parse_columns
from cappy.preparation.config import BUILTIN, Kind, PreparationConfig, check_settings
from cappy.preparation.files import PREFIX, Reader, resolve_commit, find_shards, parse_hub, read_hub, choose_reader
from cappy.preparation.mixed import open_mixture, open_templated_dataset
from cappy.preparation.prompted import Dataset
from cappy.preparation.rows import Row, Rows, choice_candidates, hash64, parse_row
from cappy.preparation.tables import read_csv
from cappy.preparation.text_files import strip_compression_suffix, translate_read_errors
from cappy.records import Instance, read, read_manifest
from cappy.records.folder import MANIFEST, Manifest, sha256_of
from cappy.records.work import parse_shard

MAX_PENDING_CHARACTERS = 512 * 2**20
"""Of responses whose prompt comes again further down."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows that can be read again and again, and what of them belongs in the manifest.

    `parents` holds the sha256 of each file, the commit of the hub, or the manifest hashes of the folders; `task` what
    instances are called that name no task; `unused` fills as rows are read. `datasets` stands in place of `rows` where
    a row makes many prompts.
    """

    name: str
    format: str
    rows: Callable[[], Iterator[Row]] = lambda: iter(())
    datasets: Sequence[Dataset] = ()
    task: str = ""
    parents: tuple[str, ...] = ()
    generators: Mapping[str, str] = field(default_factory=dict)
    unused: SourceWarnings = field(default_factory=lambda: SourceWarnings(name=""))
    commits: Mapping[str, str] = field(default_factory=dict)
    check_unchanged: Callable[[], None] = lambda: None


def open_source(config: PreparationConfig) -> Source:
    """The source of a config; ConfigError or FolderError if there is none, or for a setting that it does not heed."""
    kind, find = _find_source(config)
    check_settings(config, kind)
    return find()


def _find_source(config: PreparationConfig) -> tuple[Kind, Callable[[], Source]]:
    """What kind of source it is, and what opens it."""
    if config.mixture or config.templates:
        return ("mixture" if config.mixture else "templates"), lambda: _open_datasets(config)
    if config.source == BUILTIN:
        return "builtin", lambda: _open_builtin(config)
    if config.source.startswith(PREFIX):
        return "hub", lambda: _open_hub(config)
    path = Path(config.source)
    if path.is_dir():
        return _find_in_folder(path, config)
    if not path.is_file():
        kinds = f"{BUILTIN}, a JSON Lines, CSV or Parquet file, a BIG-bench task, a folder of records or hub:org/name"
        raise ConfigError(f"{path}: no such file or folder; --source is {kinds}")
    if is_task(path):
        return "bigbench", lambda: _open_bigbench([path], path, config)
    return "file", lambda: _open_tables([path], path, choose_reader(path), config)


def _find_in_folder(path: Path, config: PreparationConfig) -> tuple[Kind, Callable[[], Source]]:
    shards = [path] if (path / MANIFEST).is_file() else sorted(tables.parent for tables in path.glob(f"*/{MANIFEST}"))
    if shards:
        return "records", lambda: _open_records(shards, path, config)
    if tasks := find_tasks(path):
        return "bigbench", lambda: _open_bigbench(tasks, path, config)
    tables = find_shards(path, config.split)
    if tables is not None:
        return "tables", lambda: _open_tables(tables.files, path, tables.reader, config, tables.other_splits)
    remedy = "name a file in it, or run the step that writes it again"
    raise FolderError(f"{path}: is a folder without {MANIFEST}, of its own or in folders of it; {remedy}")


def _open_datasets(config: PreparationConfig) -> Source:
    datasets, made_of = open_mixture(config) if config.mixture else open_templated_dataset(config)
    return Source(
        name=config.mixture or config.source,
        format="mixture" if config.mixture else "templates",
        datasets=datasets,
        parents=tuple(dict.fromkeys(made_of.values())),
        commits=made_of,
    )


def _open_builtin(config: PreparationConfig) -> Source:
    def rows() -> Iterator[Row]:
        drawn = builtin_instances(
            config.pool, num_per_family=config.num_per_family, seed=config.seed, families=config.families or None
        )
        for instance in drawn:
            yield _make_row(BUILTIN, _add_choice_candidates(instance), config.task)

    return Source(name=BUILTIN, format=BUILTIN, rows=rows, task=config.task or "")


def _open_records(shards: Sequence[Path], path: Path, config: PreparationConfig) -> Source:
    manifests = [_read_records_manifest(shard) for shard in shards]
    _check_shards(shards, manifests)
    unused = SourceWarnings(name=str(path))

    def rows() -> Iterator[Row]:
        for shard in shards:
            for instance in read(shard):
                yield _check_responses(_make_row(str(shard), instance, config.task), config)

    return Source(
        name=str(path),
        format="records",
        rows=lambda: _exclude_systems(rows(), config.exclude, unused),
        task=config.task or "",
        unused=unused,
        parents=tuple(manifest.hash for manifest in manifests),
        generators=dict(chain.from_iterable(manifest.generators.items() for manifest in manifests)),
    )


def _check_responses(row: Row, config: PreparationConfig) -> Row:
    if config.unlabelled and not row.instance.candidates:
        remedy = "sample responses first, or leave --unlabelled out"
        raise RecordError(f"{row.where}: has no responses; {remedy}")
    return row


def _check_shards(folders: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    """FolderError unless the folders are all shards of one piece of work, or none is a shard."""
    shards = [str(manifest.config.get("shard", "")) for manifest in manifests]
    if len(folders) == 1 or not any(shards):
        return
    works = [(one.step, one.step_version, one.code, one.parents, {**one.config, "shard": ""}) for one in manifests]
    try:
        count = parse_shard(next(filter(None, shards))).count
    except ConfigError as error:
        raise FolderError(f"{folders[0].parent}: a manifest in it names no shard; {error}") from error
    missing = {f"{index}/{count}" for index in range(count)} - set(shards)
    odd = next((index for index, work in enumerate(works) if work != works[0] or not shards[index]), None)
    if odd is not None:
        remedy = "move it elsewhere, or run that shard again"
        raise FolderError(f"{folders[odd]}: is not a shard of the work that {folders[0]} is a shard of; {remedy}")
    if missing or len(set(shards)) != len(shards):
        what = f"shard {min(missing)} is missing" if missing else "a shard stands there twice"
        raise FolderError(f"{folders[0].parent}: {what}, found {', '.join(sorted(shards))}; run each shard once")


def _read_records_manifest(path: Path) -> Manifest:
    manifest = read_manifest(path)
    if not manifest.rows:
        raise FolderError(f"{path}: holds no instances (written by {manifest.step or 'nobody'}); choose another")
    return manifest


def _open_bigbench(tasks: Sequence[Path], path: Path, config: PreparationConfig) -> Source:
    unused = SourceWarnings(name=str(path))

    def rows() -> Rows:
        shares = HeldOutShares(test=config.test, validation=config.validation)
        return read_tasks(tasks, path, seed=config.seed, shares=shares, task=config.task or "", unused=unused)

    return Source(
        name=str(path),
        format="bigbench",
        rows=lambda: (parse_row(*row, task="", max_characters=config.max_characters) for row in rows()),
        task=config.task or "",
        unused=unused,
        parents=tuple(map(sha256_of, tasks)),
    )


def _open_hub(config: PreparationConfig) -> Source:
    dataset = parse_hub(config.source)
    commit = resolve_commit(dataset)
    task = config.task or dataset.configuration or dataset.repository.partition("/")[2]
    unused = SourceWarnings(name=config.source)
    return Source(
        name=config.source,
        format="hub",
        rows=lambda: _parse_rows(read_hub(dataset, commit, config.split), task, config, unused),
        task=task,
        unused=unused,
        parents=(commit,),
        commits={dataset.name: commit},
    )


def _open_tables(
    files: Sequence[Path], path: Path, reader: Reader, config: PreparationConfig, others: Sequence[str] = ()
) -> Source:
    """The rows of a file, or of a folder's shards of one table."""
    task = config.task or (strip_compression_suffix(path).stem if path.is_file() else path.resolve().name)
    unused = SourceWarnings(name=str(path))
    if others:
        unused.say("splits", f"split {config.split} is read, {', '.join(others)} not; --split names another")
    with translate_read_errors(path):
        hashes = [sha256_of(file) for file in files]

    def rows() -> Iterator[Row]:
        found = chain.from_iterable(map(reader, files))
        return _parse_rows(found, task, config, unused, cells=reader is read_csv)

    def check_unchanged() -> None:
        changed = next((file for file, known in zip(files, hashes, strict=True) if sha256_of(file) != known), None)
        if changed is not None:
            raise FolderError(f"{changed}: changed while it was read; run the same command again")

    return Source(
        name=str(path),
        format=reader.__name__.removeprefix("read_"),
        rows=rows,
        task=task,
        unused=unused,
        parents=tuple(hashes),
        check_unchanged=check_unchanged,
    )


def _parse_rows(
    rows: Rows, task: str, config: PreparationConfig, unused: SourceWarnings, *, cells: bool = False
) -> Iterator[Row]:
    """The instances in rows of columns, whatever holds them; `cells` says that it knows no lists."""
    columns = Columns(named=parse_columns(config.columns), ignored=frozenset(config.ignore_columns))
    read_row = partial(parse_row, task=task, max_characters=config.max_characters, unlabelled=config.unlabelled)

    def read_rows() -> Iterator[Row]:
        named = map_columns(rows if columns.named else map_known_columns(rows), columns, unused)
        for where, values in parse_lists(named, cells=cells):
            unused.candidates(where, values)
            yield read_row(where, values)

    return _exclude_systems(read_rows(), config.exclude, unused)


def _exclude_systems(rows: Iterator[Row], patterns: Sequence[str], unused: SourceWarnings) -> Iterator[Row]:
    """The rows without the candidates of the systems that match a pattern."""
    if not patterns:
        yield from rows
        return
    hit: dict[str, str | None] = {}
    for row in rows:
        for candidate in row.instance.candidates:
            name = candidate.generator
            if name not in hit:
                hit[name] = next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)
        kept = tuple(one for one in row.instance.candidates if hit[one.generator] is None)
        if row.instance.candidates and not kept and not row.instance.references:
            remedy = "mend --exclude, or delete the row"
            raise RecordError(f"{row.where}: no candidate is left without the excluded systems; {remedy}")
        yield replace(row, instance=replace(row.instance, candidates=kept))
    idle = sorted(set(patterns) - set(hit.values()))
    if idle:
        systems = quote(", ".join(sorted(filter(None, hit))) or "none", 120)
        unused.say("exclude", f"--exclude {idle[0]} matches no system; systems found: {systems}")


def _make_row(name: str, instance: Instance, task: str | None) -> Row:
    """A row of a source of ours, whose ids and splits stand."""
    named = instance if instance.task or not task else replace(instance, task=task)
    return Row(f"{name}: instance {quote(instance.instance_id)}", named)


def _add_choice_candidates(instance: Instance) -> Instance:
    return instance if instance.candidates else replace(instance, candidates=choice_candidates(instance.choices))


def group_rows(source: Source, config: PreparationConfig) -> Source:
    """The source with rows of one prompt gathered, where `group_responses` says so and there are any."""
    if source.format in (BUILTIN, "records", "bigbench") or source.datasets:
        return source
    grouping = _count_prompts(source.rows, config.group_responses)
    if not grouping.has_groups:
        return source
    what = f"{grouping.rows:,} rows of {grouping.instances:,} prompts are gathered into an instance for each prompt"
    source.unused.say("grouped", f"{what}; --group-responses never keeps them apart")
    return replace(source, rows=lambda: _group_responses(source.rows, grouping))


@dataclass(frozen=True, kw_only=True)
class _Grouping:
    """How often each prompt comes, where it comes more than once; and what all that makes."""

    rows: int
    instances: int
    counts: Counter[int] = field(default_factory=Counter)

    @property
    def has_groups(self) -> bool:
        """Whether any rows belong together."""
        return self.rows > self.instances


def _count_prompts(rows: Callable[[], Iterator[Row]], wanted: Literal["auto", "always", "never"]) -> _Grouping:
    """Reads a source once for the rows that belong together, 8 bytes of each; none where `wanted` is never.

    With auto, nothing is gathered unless every row has exactly one response: reading ends at the first that has not.
    """
    keys: list[int] = []
    for row in rows() if wanted != "never" else ():
        if wanted == "auto" and len(row.instance.candidates) != 1:
            keys = []
            break
        keys.append(_prompt_key(row))
    hashes, numbers = np.unique(np.array(keys, dtype=np.uint64), return_counts=True)
    many = numbers > 1
    counts = Counter(dict(zip(hashes[many].tolist(), numbers[many].tolist(), strict=True)))
    return _Grouping(rows=len(keys), instances=len(hashes), counts=counts)


def _group_responses(rows: Callable[[], Iterator[Row]], grouping: _Grouping) -> Iterator[Row]:
    """The rows, those of one prompt as one: its candidates in the order of the file, at the place of the last row.

    RecordError where so much is held at once that memory would run out.
    """
    left, held, characters = Counter(grouping.counts), dict[int, Row](), 0
    for row in rows():
        key = _prompt_key(row)
        if key not in left:
            yield row
            continue
        left[key] -= 1
        if key in held:
            earlier = held.pop(key)
            characters -= _num_characters(earlier)
            row = _join_rows(earlier, row)
        if left[key]:
            held[key] = row
            characters += _num_characters(row)
            if characters > MAX_PENDING_CHARACTERS:
                remedy = "sort the file by prompt, or set --group-responses never"
                raise RecordError(f"{row.where}: rows of one prompt stand too far apart to be gathered; {remedy}")
        else:
            yield row


def _join_rows(first: Row, second: Row) -> Row:
    candidates = first.instance.candidates + second.instance.candidates
    return replace(first, instance=replace(first.instance, candidates=candidates))


def _num_characters(row: Row) -> int:
    return sum(len(candidate.response) for candidate in row.instance.candidates) + len(row.instance.instruction)


def _prompt_key(row: Row) -> int:
    """Equal for rows that are one instance but for their responses: their ids and groups may be row numbers."""
    one = row.instance
    rated = all(candidate.labels for candidate in one.candidates)
    parts = (one.instruction, one.references, one.choices, one.task, one.template, one.split, row.has_split, rated)
    return hash64(repr(parts))
