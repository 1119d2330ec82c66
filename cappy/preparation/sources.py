"""Opens the source of `--source` or `--mixture`, excludes candidates by generator, and groups rows of one prompt."""

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
from cappy.preparation.files import HUB_PREFIX, Reader, choose_reader, find_shards, parse_hub, read_hub, resolve_commit
from cappy.preparation.prompt_sources import open_mixture, open_templated_dataset
from cappy.preparation.prompted import Dataset
from cappy.preparation.rows import Rows, SourceRow, choice_candidates, complete_likelihood, hash64, parse_row
from cappy.preparation.tables import read_csv
from cappy.preparation.text_files import strip_compression_suffix, translate_read_errors
from cappy.records import Instance, read, read_manifest
from cappy.records.folder import MANIFEST, Manifest, sha256_of
from cappy.records.work import parse_shard

MAX_PENDING_CHARACTERS = 512 * 2**20
"""Maximum number of characters in the rows that wait for further rows of the same prompt."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows that can be read repeatedly, and facts about them for the manifest.

    `parents` are the sha256 of each file, the commit of the hub, or the manifest hashes of folders. `task` is the name
    for instances without a task. Warnings are added to `warnings` while rows are read. `datasets` replaces `rows` if
    one row makes many prompts. `commits` has the commit or hash of each input by its name. `check_unchanged` raises
    FolderError if a file has changed since it was opened.
    """

    name: str
    format: str
    rows: Callable[[], Iterator[SourceRow]] = lambda: iter(())
    datasets: Sequence[Dataset] = ()
    task: str = ""
    parents: tuple[str, ...] = ()
    generators: Mapping[str, str] = field(default_factory=dict)
    warnings: SourceWarnings = field(default_factory=lambda: SourceWarnings(name=""))
    commits: Mapping[str, str] = field(default_factory=dict)
    check_unchanged: Callable[[], None] = lambda: None


def open_source(config: PreparationConfig) -> Source:
    """Opens the source; raises ConfigError or FolderError if it does not exist or a setting does not apply to it."""
    kind, opener = _find_source(config)
    check_settings(config, kind)
    return opener()


def _find_source(config: PreparationConfig) -> tuple[Kind, Callable[[], Source]]:
    """The kind of the source, and a function that opens it."""
    if config.mixture or config.templates:
        return ("mixture" if config.mixture else "templates"), lambda: _open_datasets(config)
    if config.source == BUILTIN:
        return "builtin", lambda: _open_builtin(config)
    if config.source.startswith(HUB_PREFIX):
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
    shards = (
        [path] if (path / MANIFEST).is_file() else sorted(manifest.parent for manifest in path.glob(f"*/{MANIFEST}"))
    )
    if shards:
        return "records", lambda: _open_records(shards, path, config)
    if tasks := find_tasks(path):
        return "bigbench", lambda: _open_bigbench(tasks, path, config)
    table = find_shards(path, config.split)
    if table is not None:
        return "tables", lambda: _open_tables(table.files, path, table.reader, config, table.other_splits)
    remedy = "give a file in it, or run the step that writes it again"
    raise FolderError(f"{path}: neither the folder nor its subfolders have a {MANIFEST}; {remedy}")


def _open_datasets(config: PreparationConfig) -> Source:
    datasets, hashes = open_mixture(config) if config.mixture else open_templated_dataset(config)
    return Source(
        name=config.mixture or config.source,
        format="mixture" if config.mixture else "templates",
        datasets=datasets,
        parents=tuple(dict.fromkeys(hashes.values())),
        commits=hashes,
    )


def _open_builtin(config: PreparationConfig) -> Source:
    def rows() -> Iterator[SourceRow]:
        instances = builtin_instances(
            config.pool, num_per_family=config.num_per_family, seed=config.seed, families=config.families or None
        )
        for instance in instances:
            yield _make_row(BUILTIN, _add_choice_candidates(instance), config.task)

    return Source(name=BUILTIN, format=BUILTIN, rows=rows, task=config.task or "")


def _open_records(shards: Sequence[Path], path: Path, config: PreparationConfig) -> Source:
    manifests = [_read_records_manifest(shard) for shard in shards]
    _check_shards(shards, manifests)
    warnings = SourceWarnings(name=str(path))

    def rows() -> Iterator[SourceRow]:
        for shard in shards:
            for instance in read(shard):
                candidates = tuple(map(complete_likelihood, instance.candidates))
                complete = replace(instance, candidates=candidates)
                yield _check_responses(_make_row(str(shard), complete, config.task), config)

    return Source(
        name=str(path),
        format="records",
        rows=lambda: _exclude_generators(rows(), config.exclude, warnings),
        task=config.task or "",
        warnings=warnings,
        parents=tuple(manifest.hash for manifest in manifests),
        generators=dict(chain.from_iterable(manifest.generators.items() for manifest in manifests)),
    )


def _check_responses(row: SourceRow, config: PreparationConfig) -> SourceRow:
    if config.unlabelled and not row.instance.candidates:
        remedy = "sample responses first, or leave --unlabelled out"
        raise RecordError(f"{row.where}: has no responses; {remedy}")
    return row


def _check_shards(folders: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    """Raises FolderError unless the folders are all the shards of the same work, or none is a shard."""
    shards = [str(manifest.config.get("shard", "")) for manifest in manifests]
    if len(folders) == 1 or not any(shards):
        return
    identities = [
        (manifest.step, manifest.step_version, manifest.code, manifest.parents, {**manifest.config, "shard": ""})
        for manifest in manifests
    ]
    try:
        count = parse_shard(next(filter(None, shards))).count
    except ConfigError as error:
        raise FolderError(f"{folders[0].parent}: contains a manifest without a valid shard; {error}") from error
    missing = {f"{index}/{count}" for index in range(count)} - set(shards)
    stray_index = next(
        (index for index, item in enumerate(identities) if item != identities[0] or not shards[index]), None
    )
    if stray_index is not None:
        remedy = "move it elsewhere, or run that shard again"
        raise FolderError(f"{folders[stray_index]}: is not a shard of the same work as {folders[0]}; {remedy}")
    if missing or len(set(shards)) != len(shards):
        problem = f"shard {min(missing)} is missing" if missing else "a shard exists twice"
        raise FolderError(f"{folders[0].parent}: {problem}, found {', '.join(sorted(shards))}; run each shard once")


def _read_records_manifest(path: Path) -> Manifest:
    manifest = read_manifest(path)
    if not manifest.rows:
        raise FolderError(
            f"{path}: holds no instances (written by {manifest.step or 'an unknown step'}); choose another folder"
        )
    return manifest


def _open_bigbench(tasks: Sequence[Path], path: Path, config: PreparationConfig) -> Source:
    warnings = SourceWarnings(name=str(path))

    def rows() -> Rows:
        shares = HeldOutShares(test=config.test, validation=config.validation)
        return read_tasks(tasks, path, seed=config.seed, shares=shares, task=config.task or "", warnings=warnings)

    return Source(
        name=str(path),
        format="bigbench",
        rows=lambda: (parse_row(*row, task="", max_characters=config.max_characters) for row in rows()),
        task=config.task or "",
        warnings=warnings,
        parents=tuple(map(sha256_of, tasks)),
    )


def _open_hub(config: PreparationConfig) -> Source:
    dataset = parse_hub(config.source)
    commit = resolve_commit(dataset)
    task = config.task or dataset.configuration or dataset.repository.partition("/")[2]
    warnings = SourceWarnings(name=config.source)
    return Source(
        name=config.source,
        format="hub",
        rows=lambda: _parse_rows(read_hub(dataset, commit, config.split), task, config, warnings),
        task=task,
        warnings=warnings,
        parents=(commit,),
        commits={dataset.name: commit},
    )


def _open_tables(
    files: Sequence[Path], path: Path, reader: Reader, config: PreparationConfig, other_splits: Sequence[str] = ()
) -> Source:
    """The source of the rows of a file, or of one table whose shards are the `files` of a folder."""
    task = config.task or (strip_compression_suffix(path).stem if path.is_file() else path.resolve().name)
    warnings = SourceWarnings(name=str(path))
    if other_splits:
        names = ", ".join(other_splits)
        warnings.add("splits", f"read split {config.split}, not {names}; choose another with --split")
    with translate_read_errors(path):
        sha256s = [sha256_of(file) for file in files]

    def rows() -> Iterator[SourceRow]:
        rows_of_files = chain.from_iterable(map(reader, files))
        return _parse_rows(rows_of_files, task, config, warnings, is_csv=reader is read_csv)

    def check_unchanged() -> None:
        changed = next((file for file, sha256 in zip(files, sha256s, strict=True) if sha256_of(file) != sha256), None)
        if changed is not None:
            raise FolderError(f"{changed}: changed while it was read; run the same command again")

    return Source(
        name=str(path),
        format=reader.__name__.removeprefix("read_"),
        rows=rows,
        task=task,
        warnings=warnings,
        parents=tuple(sha256s),
        check_unchanged=check_unchanged,
    )


def _parse_rows(
    rows: Rows, task: str, config: PreparationConfig, warnings: SourceWarnings, *, is_csv: bool = False
) -> Iterator[SourceRow]:
    """Maps the columns of rows and parses the rows to instances; with `is_csv`, lists are parsed from text."""
    columns = Columns(by_field=parse_columns(config.columns), ignored=frozenset(config.ignore_columns))
    read_row = partial(parse_row, task=task, max_characters=config.max_characters, unlabelled=config.unlabelled)

    def read_rows() -> Iterator[SourceRow]:
        mapped_rows = map_columns(rows if columns.by_field else map_known_columns(rows), columns, warnings)
        for where, values in parse_lists(mapped_rows, is_csv=is_csv):
            warnings.check_candidate_fields(where, values)
            yield read_row(where, values)

    return _exclude_generators(read_rows(), config.exclude, warnings)


def _exclude_generators(
    rows: Iterator[SourceRow], patterns: Sequence[str], warnings: SourceWarnings
) -> Iterator[SourceRow]:
    """The rows without the responses of generators that match a pattern; choices stay candidates, as without them."""
    if not patterns:
        yield from rows
        return
    pattern_by_generator: dict[str, str | None] = {}
    for row in rows:
        for name in (candidate.generator for candidate in row.instance.candidates if candidate.source == "llm"):
            if name not in pattern_by_generator:
                pattern_by_generator[name] = next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)
        remaining = tuple(
            candidate
            for candidate in row.instance.candidates
            if candidate.source != "llm" or pattern_by_generator[candidate.generator] is None
        )
        candidates = remaining or choice_candidates(row.instance.choices)
        if row.instance.candidates and not candidates and not row.instance.references:
            remedy = "correct --exclude, or delete the row"
            raise RecordError(f"{row.where}: --exclude leaves no candidate; {remedy}")
        yield replace(row, instance=replace(row.instance, candidates=candidates))
    unmatched = sorted(set(patterns) - set(pattern_by_generator.values()))
    if unmatched:
        generators = quote(", ".join(sorted(filter(None, pattern_by_generator))) or "none", 120)
        warnings.add("exclude", f"--exclude {unmatched[0]} matches no generator; generators found: {generators}")


def _make_row(name: str, instance: Instance, task: str | None) -> SourceRow:
    """A row of a source whose instances already have ids and splits; `task` is for an instance that has no task."""
    with_task = instance if instance.task or not task else replace(instance, task=task)
    return SourceRow(f"{name}: instance {quote(instance.instance_id)}", with_task)


def _add_choice_candidates(instance: Instance) -> Instance:
    return instance if instance.candidates else replace(instance, candidates=choice_candidates(instance.choices))


def group_rows(source: Source, config: PreparationConfig) -> Source:
    """The source with the rows of one prompt joined into one instance, if `group_responses` asks for it."""
    if source.format in (BUILTIN, "records", "bigbench") or source.datasets:
        return source
    grouping = _count_prompts(source.rows, config.group_responses)
    if not grouping.has_groups:
        return source
    grouped = f"grouped {grouping.rows:,} rows into {grouping.instances:,} instances, one for each prompt"
    source.warnings.add("grouped", f"{grouped}; set --group-responses never to keep rows separate")
    return replace(source, rows=lambda: _group_responses(source.rows, grouping))


@dataclass(frozen=True, kw_only=True)
class _Grouping:
    """The number of rows and of instances after grouping, and the rows of each prompt with more than one."""

    rows: int
    instances: int
    counts: Counter[int] = field(default_factory=Counter)

    @property
    def has_groups(self) -> bool:
        """Whether any prompt has several rows."""
        return self.rows > self.instances


def _count_prompts(rows: Callable[[], Iterator[SourceRow]], mode: Literal["auto", "always", "never"]) -> _Grouping:
    """Counts the rows of each prompt in one pass, with 8 bytes of memory per row; counts nothing if `mode` is never.

    If it is auto, rows are grouped only if every row has exactly one response: reading stops at the first other row.
    """
    keys: list[int] = []
    for row in rows() if mode != "never" else ():
        if mode == "auto" and len(row.instance.candidates) != 1:
            keys = []
            break
        keys.append(_prompt_key(row))
    hashes, prompt_counts = np.unique(np.array(keys, dtype=np.uint64), return_counts=True)
    repeated = prompt_counts > 1
    counts = Counter(dict(zip(hashes[repeated].tolist(), prompt_counts[repeated].tolist(), strict=True)))
    return _Grouping(rows=len(keys), instances=len(hashes), counts=counts)


def _group_responses(rows: Callable[[], Iterator[SourceRow]], grouping: _Grouping) -> Iterator[SourceRow]:
    """Joins the rows of one prompt to one row at the position of the last, with candidates in the order of the file.

    Raises RecordError if more than `MAX_PENDING_CHARACTERS` wait for further rows.
    """
    remaining, pending, num_characters = Counter(grouping.counts), dict[int, SourceRow](), 0
    for row in rows():
        key = _prompt_key(row)
        if key not in remaining:
            yield row
            continue
        remaining[key] -= 1
        if key in pending:
            earlier = pending.pop(key)
            num_characters -= _num_characters(earlier)
            row = _join_rows(earlier, row)
        if remaining[key]:
            pending[key] = row
            num_characters += _num_characters(row)
            if num_characters > MAX_PENDING_CHARACTERS:
                remedy = "sort the file by prompt, or set --group-responses never"
                raise RecordError(f"{row.where}: rows of the same prompt are too far apart to group; {remedy}")
        else:
            yield row


def _join_rows(first: SourceRow, second: SourceRow) -> SourceRow:
    candidates = first.instance.candidates + second.instance.candidates
    return replace(first, instance=replace(first.instance, candidates=candidates))


def _num_characters(row: SourceRow) -> int:
    return sum(len(candidate.response) for candidate in row.instance.candidates) + len(row.instance.instruction)


def _prompt_key(row: SourceRow) -> int:
    """A key that is equal for rows that differ only in responses, ids and groups."""
    instance = row.instance
    all_labelled = all(candidate.labels for candidate in instance.candidates)
    parts = (
        instance.instruction,
        instance.references,
        instance.choices,
        instance.task,
        instance.template,
        instance.split,
        row.has_split,
        all_labelled,
    )
    return hash64(repr(parts))
