"""Reads a file, a folder of data files or a Hugging Face dataset as rows; finds the format by magic bytes and suffix.

A folder holds the shards of one table (Parquet, CSV, JSON Lines), or was written by save_to_disk of `datasets`.
Datasets of the hub are streamed at a pinned commit; no code of a repository is executed.
"""

import contextlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cappy.errors import ConfigError, FolderError, RecordError, quote
from cappy.hub_client import guard_client
from cappy.preparation.jsonlines import read_json_lines
from cappy.preparation.mixtures import CONVERTED_BRANCH
from cappy.preparation.rows import Rows
from cappy.preparation.tables import ARROW_FILE, ARROW_STREAM, TAB_SUFFIXES, read_arrow, read_csv, read_parquet
from cappy.preparation.text_files import (
    COMPRESSION_SUFFIXES,
    read_head,
    strip_compression_suffix,
    translate_read_errors,
)

Reader = Callable[[Path], Rows]

_READERS: Mapping[str, Reader] = {
    ".csv": read_csv,
    **dict.fromkeys(TAB_SUFFIXES, read_csv),
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
}
"""Reader by suffix; any other file is read as JSON Lines."""
_BINARY: Mapping[Reader, str] = {read_parquet: "Parquet", read_arrow: "Arrow"}
_MAGIC: Mapping[bytes, Reader] = {b"PAR1": read_parquet, ARROW_FILE: read_arrow, ARROW_STREAM: read_arrow}
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")

_STATE_FILE, _DATASET_DICT_FILE = "state.json", "dataset_dict.json"
_DEFAULT_SPLIT = "train"
_MAX_STATE_BYTES = 64 * 2**20
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_SUFFIXES = (*_READERS, *_JSON_SUFFIXES)
_SPLIT_NAMES = frozenset(
    ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
)
"""Names of splits in the names of files and folders, as `datasets` recognises them."""
_SHARD = re.compile(r"(?P<split>.+?)-(?P<number>\d{5})-of-(?P<count>\d{5})(?:-\w+)?\.")
_METADATA = ("dataset_info.json", "dataset_infos.json", _STATE_FILE, _DATASET_DICT_FILE, "task.json", "manifest.json")


def choose_reader(path: Path) -> Reader:
    """The reader for a file by magic bytes or suffix; raises RecordError for a compressed Parquet or Arrow file."""
    first_bytes = read_head(path)
    reader = next((reader for magic, reader in _MAGIC.items() if first_bytes.startswith(magic)), None)
    reader = reader or _READERS.get(strip_compression_suffix(path).suffix.lower(), read_json_lines)
    if reader in _BINARY and path.suffix in COMPRESSION_SUFFIXES:
        raise RecordError(f"{path}: is a compressed {_BINARY[reader]} file, which cannot be read; decompress it first")
    return reader


def read_file(path: Path) -> Rows:
    """Yields the rows of a dataset file; integers in CSV cells become int, because templates compute with them."""
    read = choose_reader(path)
    for where, values in read(path):
        yield where, {name: _parse_integer(value) for name, value in values.items()} if read is read_csv else values


def _parse_integer(cell: object) -> object:
    return int(cell) if isinstance(cell, str) and _INTEGER.fullmatch(cell) else cell


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The files of a table in order, their reader, and the splits in the same folder that are not read."""

    files: Sequence[Path]
    reader: Reader
    other_splits: Sequence[str] = ()


def find_shards(folder: Path, split: str) -> Shards | None:
    """The table in a folder, or None if it has no data files.

    If the names of files or folders contain splits, only those of `split` are read. Raises FolderError for several
    tables or an incomplete one, and ConfigError if there is no such split.
    """
    if (folder / _DATASET_DICT_FILE).is_file():
        return _find_in_dataset_dict(folder, split)
    if (folder / _STATE_FILE).is_file():
        _refuse_split(folder, split)
        return Shards(files=_find_saved_files(folder), reader=read_arrow)
    files = sorted(path for path in folder.rglob("*") if _is_data(path, folder))
    if not files:
        return None
    readers = {choose_reader(file) for file in files}
    if len(readers) > 1:
        names = ", ".join(sorted({strip_compression_suffix(file).suffix for file in files}))
        raise FolderError(f"{folder}: contains files of several formats ({names}); give one of them as --source")
    files, other_splits = _select_split(folder, files, split)
    return Shards(files=files, reader=readers.pop(), other_splits=other_splits)


def _is_data(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    return (
        not hidden
        and path.is_file()
        and strip_compression_suffix(path).suffix.lower() in _SUFFIXES
        and path.name not in _METADATA
    )


def _select_split(folder: Path, files: list[Path], split: str) -> tuple[list[Path], list[str]]:
    """The files whose names belong to the split (all files if no name has a split), and the other splits."""
    files_by_split: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        files_by_split[_split_in_name(file, folder)].append(file)
    _check_complete(folder, files)
    files_without_split = files_by_split.get("")
    if files_without_split and files_by_split.keys() - {"", _DEFAULT_SPLIT}:
        splits = ", ".join(sorted(filter(None, files_by_split)))
        other = files_without_split[0].relative_to(folder)
        problem = f"contains files of splits ({splits}) and {other}, whose name has no split"
        raise FolderError(f"{folder}: {problem}; give one of them as --source, or rename that file")
    if files_without_split or (len(files_by_split) == 1 and split == _DEFAULT_SPLIT):
        _refuse_split(folder, split)
        return files, []
    if split not in files_by_split:
        raise _missing_split_error(folder, split, sorted(files_by_split))
    return files_by_split[split], sorted(files_by_split.keys() - {split})


def _split_in_name(file: Path, folder: Path) -> str:
    """The split in the name of a file, or else of the nearest folder; empty if neither has one."""
    shard = _SHARD.match(file.name)
    if shard and _split_names_in(shard["split"]):
        return shard["split"]
    parts = (file.name, *reversed(file.relative_to(folder).parts[:-1]))
    word = next((words[0] for words in map(_split_names_in, parts) if len(words) == 1), "")
    return word or (shard["split"] if shard else "")


def _split_names_in(name: str) -> list[str]:
    """The names of splits among the words of a file name."""
    return sorted(_SPLIT_NAMES.intersection(re.split(r"[^a-z0-9]+", name.lower())))


def _check_complete(folder: Path, files: Sequence[Path]) -> None:
    """Raises FolderError if a shard is missing according to the file names (NAME-00000-of-00004)."""
    shards: dict[tuple[Path, str], list[re.Match[str]]] = defaultdict(list)
    for file in files:
        if match := _SHARD.match(file.name):
            shards[file.parent, match["split"]].append(match)
    for matches in shards.values():
        count = int(matches[0]["count"])
        missing = set(range(count)) - {int(match["number"]) for match in matches}
        if missing:
            raise FolderError(f"{folder}: shard {min(missing)} of {count} is missing; fetch or write it again")


def _find_in_dataset_dict(folder: Path, split: str) -> Shards:
    names = _read_object(folder / _DATASET_DICT_FILE).get("splits")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FolderError(f"{folder / _DATASET_DICT_FILE}: lists no splits; write the folder again with save_to_disk")
    if split not in names:
        raise _missing_split_error(folder, split, names)
    other_splits = [name for name in names if name != split]
    files = _find_saved_files(folder / _check_file_name(folder, split))
    return Shards(files=files, reader=read_arrow, other_splits=other_splits)


def _find_saved_files(folder: Path) -> list[Path]:
    entries = _read_object(folder / _STATE_FILE).get("_data_files")
    names = [item.get("filename") for item in entries if isinstance(item, dict)] if isinstance(entries, list) else []
    if not names:
        raise FolderError(f"{folder / _STATE_FILE}: lists no files; write the folder again with save_to_disk")
    files = [folder / _check_file_name(folder, name) for name in names]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise FolderError(f"{missing}: is missing; fetch it, or write the folder again with save_to_disk")
    return files


def _refuse_split(folder: Path, split: str) -> None:
    if split != _DEFAULT_SPLIT:
        raise ConfigError(f"{folder}: has no splits, got --split {quote(split)}; leave --split out")


def _check_file_name(folder: Path, name: object) -> str:
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise FolderError(f"{folder}: lists a file outside of it, {quote(name)}; write it again with save_to_disk")
    return name


def _read_object(path: Path) -> dict[str, object]:
    if not path.is_file():
        raise FolderError(f"{path}: is missing; write the folder again with save_to_disk")
    with translate_read_errors(path):
        data = path.read_bytes() if path.stat().st_size <= _MAX_STATE_BYTES else b""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise FolderError(f"{path}: is not a JSON object; write the folder again with save_to_disk")
    return value


def _missing_split_error(folder: Path, split: str, names: Sequence[str]) -> ConfigError:
    return ConfigError(f"{folder}: has no split {quote(split)}; choose one of {', '.join(names)} with --split")


HUB_PREFIX = "hub:"
_HUB_PATTERN = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?::(?P<configuration>[^@]+))?(?:@(?P<revision>\S+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubDataset:
    """A repository, one of its configurations (None if it has only one), and a commit, branch or tag."""

    repository: str
    configuration: str | None = None
    revision: str = "main"

    @property
    def name(self) -> str:
        """The dataset as written for --source: hub:org/name:configuration@revision."""
        configuration = f":{self.configuration}" if self.configuration else ""
        return f"{HUB_PREFIX}{self.repository}{configuration}@{self.revision}"


def parse_hub(text: str) -> HubDataset:
    """Parses hub:org/name[:configuration][@revision]; raises ConfigError for any other form."""
    match = _HUB_PATTERN.fullmatch(text.removeprefix(HUB_PREFIX))
    if match is None:
        form = "hub:org/name, hub:org/name:configuration or hub:org/name:configuration@revision"
        raise ConfigError(f"{quote(text)}: is not a dataset of the hub; write {form}")
    return HubDataset(**{key: value for key, value in match.groupdict().items() if value})


def resolve_commit(dataset: HubDataset) -> str:
    """The commit that the revision points to; a commit is returned as it is, without a request to the hub.

    Raises ConfigError if the hub cannot be reached or does not have the repository or revision.
    """
    if _COMMIT.fullmatch(dataset.revision):
        return dataset.revision
    from huggingface_hub import HfApi

    guard_client()
    with _translate_hub_errors(dataset):
        commit = str(HfApi().dataset_info(dataset.repository, revision=dataset.revision).sha)
        if not _COMMIT.fullmatch(commit):
            raise ValueError(f"the hub answered {quote(commit, 50)}, which is not a commit")
        return commit


def read_hub(dataset: HubDataset, commit: str, split: str) -> Rows:
    """Yields the rows of one split, streamed in the hub's order; raises ConfigError if they cannot be read."""
    import datasets

    # datasets would load a local folder of this name instead, and ignore the commit.
    if Path(dataset.repository).exists():
        remedy = "run in another directory, or give the file in it as --source"
        raise ConfigError(f"{dataset.name}: a local folder {dataset.repository} hides the repository; {remedy}")
    guard_client()
    where = f"{dataset.name} {split}"
    # On refs/convert/parquet every configuration is a folder, not a named configuration, so it is passed as `data_dir`
    # (as of datasets 5.2).
    key = "data_dir" if dataset.revision == CONVERTED_BRANCH else "name"
    arguments = {key: dataset.configuration} if dataset.configuration else {}
    with _translate_hub_errors(dataset):
        rows = datasets.load_dataset(dataset.repository, revision=commit, split=split, streaming=True, **arguments)
        # Images and audio stay bytes, because decoding opens any path that a row contains.
        rows = rows.decode(False)
        for number, row in enumerate(rows, start=1):
            yield f"{where}: row {number}", row


@contextlib.contextmanager
def _translate_hub_errors(dataset: HubDataset) -> Iterator[None]:
    try:
        yield
    except (ConfigError, GeneratorExit):
        raise
    except Exception as error:  # the hub's clients raise a dozen error types of four libraries
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "check its name, configuration, split and revision, and the network"
        raise ConfigError(f"{dataset.name}: cannot be read from the hub ({quote(reason, 160)}); {remedy}") from error
