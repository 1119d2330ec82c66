"""What `--source` names: the built-in tasks, a file, or a folder of records."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from cappy.errors import ConfigError, FolderError, shown
from cappy.preparation import BUILTIN, PreparationConfig
from cappy.preparation.columns import mapped, parse
from cappy.preparation.fields import choice_candidates, row
from cappy.preparation.jsonlines import read_json_lines
from cappy.preparation.lines import readable
from cappy.preparation.rows import Row, Rows
from cappy.preparation.tables import read_csv, read_parquet
from cappy.records import Instance, read, read_manifest
from cappy.records.folder import MANIFEST, sha256_of

READERS: Mapping[str, Callable[[Path], Rows]] = {".csv": read_csv, ".parquet": read_parquet}
"""Reader by the suffix of the name; every other file is JSON Lines."""
_PACKED = (".gz", ".xz")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows that can be read again and again, and what of them belongs in the manifest.

    `parents` holds the sha256 of the file, or the manifest hash of the folder; `task` what instances are called that
    name no task.
    """

    name: str
    format: str
    rows: Callable[[], Iterator[Row]]
    task: str = ""
    parents: tuple[str, ...] = ()
    generators: Mapping[str, str] = field(default_factory=dict)
    check_unchanged: Callable[[], None] = lambda: None


def open_source(config: PreparationConfig) -> Source:
    """The source of a config; ConfigError or FolderError if there is none."""
    if config.source == BUILTIN:
        return _builtin(config)
    path = Path(config.source)
    if path.is_dir():
        return _folder(path, config)
    if not path.is_file():
        known = f"{BUILTIN}, a JSON Lines, CSV or Parquet file, or a folder of records"
        raise ConfigError(f"{path}: no such file or folder; --source is {known}")
    return _file(path, config)


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
        raise ConfigError(f"{path}: is a folder of records, whose fields have their names; leave --columns out")
    if not (path / MANIFEST).is_file():
        remedy = "name a file in it, or run the step that writes it again"
        raise FolderError(f"{path}: is a folder without {MANIFEST}; {remedy}")
    manifest = read_manifest(path)
    if not manifest.rows:
        raise FolderError(f"{path}: holds no instances (written by {manifest.step or 'nobody'}); choose another")
    return Source(
        name=str(path),
        format="records",
        rows=lambda: (_given(str(path), instance, config.task) for instance in read(path)),
        task=config.task or "",
        parents=(manifest.hash,),
        generators=manifest.generators,
    )


def _file(path: Path, config: PreparationConfig) -> Source:
    plain = path.with_suffix("") if path.suffix in _PACKED else path
    read_rows = READERS.get(plain.suffix, read_json_lines)
    task, columns = config.task or plain.stem, parse(config.columns)
    with readable(path):
        sha256 = sha256_of(path)

    def check_unchanged() -> None:
        if sha256_of(path) != sha256:
            raise FolderError(f"{path}: changed while it was read; run the same command again")

    return Source(
        name=str(path),
        format=read_rows.__name__.removeprefix("read_"),
        rows=lambda: (
            _without(row(*found, task=task, max_characters=config.max_characters), config.exclude)
            for found in mapped(read_rows(path), columns)
        ),
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
