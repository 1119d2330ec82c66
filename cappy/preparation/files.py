"""A file or a folder of data files as rows, whatever the format: by what a file begins with, and by its name.

A folder holds shards of one table (Parquet, CSV, JSON Lines), or what `datasets` wrote with save_to_disk. Datasets of
the Hugging Face hub are streamed at a pinned commit; nothing of a repository is executed.
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
from cappy.preparation.mixtures import CONVERTED
from cappy.preparation.rows import Rows
from cappy.preparation.tables import ARROW_FILE, ARROW_STREAM, TABBED, read_arrow, read_csv, read_parquet
from cappy.preparation.text_files import SUFFIXES as PACKED
from cappy.preparation.text_files import head, plain, readable

Reader = Callable[[Path], Rows]

_READERS: Mapping[str, Reader] = {
    ".csv": read_csv,
    **dict.fromkeys(TABBED, read_csv),
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
}
"""Reader by the suffix of the name; every other file is JSON Lines."""
_BINARY: Mapping[Reader, str] = {read_parquet: "Parquet", read_arrow: "Arrow"}
_MAGIC: Mapping[bytes, Reader] = {b"PAR1": read_parquet, ARROW_FILE: read_arrow, ARROW_STREAM: read_arrow}
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")

_STATE, _DICT = "state.json", "dataset_dict.json"
_DEFAULT_SPLIT = "train"
_MAX_STATE_BYTES = 64 * 2**20
_LINES = (".jsonl", ".ndjson", ".json")
_SUFFIXES = (*_READERS, *_LINES)
_SPLIT_NAMES = frozenset(
    ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
)
"""Words for splits in the names of files and folders, as `datasets` has them."""
_SHARD = re.compile(r"(?P<split>.+?)-(?P<number>\d{5})-of-(?P<count>\d{5})(?:-\w+)?\.")
_METADATA = ("dataset_info.json", "dataset_infos.json", _STATE, _DICT, "task.json", "manifest.json")


def reader_of(path: Path) -> Reader:
    """What reads the file; RecordError for a packed table that is not read by lines."""
    begin = head(path)
    reader = next((reader for magic, reader in _MAGIC.items() if begin.startswith(magic)), None)
    reader = reader or _READERS.get(plain(path).suffix.lower(), read_json_lines)
    if reader in _BINARY and path.suffix in PACKED:
        raise RecordError(f"{path}: is a packed {_BINARY[reader]} file, which is packed within; unpack it first")
    return reader


def read_file(path: Path) -> Rows:
    """The rows of a dataset's file: cells of CSV that are whole numbers are numbers, as templates count with them."""
    read = reader_of(path)
    for where, values in read(path):
        yield where, {name: _number(value) for name, value in values.items()} if read is read_csv else values


def _number(cell: object) -> object:
    return int(cell) if isinstance(cell, str) and _WHOLE.fullmatch(cell) else cell


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The files of a table in order, what reads them, and the splits that lie there and are not read."""

    files: Sequence[Path]
    reader: Reader
    others: Sequence[str] = ()


def find_shards(folder: Path, split: str) -> Shards | None:
    """The table in a folder, or None where it holds no data files; FolderError where it holds several or half of one.

    Where the files or the folder name splits, `split` is read.
    """
    if (folder / _DICT).is_file():
        return _of_dict(folder, split)
    if (folder / _STATE).is_file():
        _refuse_split(folder, split)
        return Shards(files=_saved_files(folder), reader=read_arrow)
    files = sorted(path for path in folder.rglob("*") if _is_data(path, folder))
    if not files:
        return None
    kinds = {reader_of(file) for file in files}
    if len(kinds) > 1:
        names = ", ".join(sorted({plain(file).suffix for file in files}))
        raise FolderError(f"{folder}: holds files of several formats ({names}); name one of them as --source")
    files, others = _select_split(folder, files, split)
    return Shards(files=files, reader=kinds.pop(), others=others)


def _is_data(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    return not hidden and path.is_file() and plain(path).suffix.lower() in _SUFFIXES and path.name not in _METADATA


def _select_split(folder: Path, files: list[Path], split: str) -> tuple[list[Path], list[str]]:
    """The files of the split by their names, all of them where no name says one, and the other splits."""
    named: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        named[_split_in_name(file, folder)].append(file)
    _check_whole(folder, files)
    loose = named.get("")
    if loose and named.keys() - {"", _DEFAULT_SPLIT}:
        splits = ", ".join(sorted(filter(None, named)))
        what = f"holds files of splits ({splits}) and {loose[0].relative_to(folder)}, whose name says none"
        raise FolderError(f"{folder}: {what}; name one of them as --source, or rename that file")
    if loose or (len(named) == 1 and split == _DEFAULT_SPLIT):
        _refuse_split(folder, split)
        return files, []
    if split not in named:
        raise _missing_split(folder, split, sorted(named))
    return named[split], sorted(named.keys() - {split})


def _split_in_name(file: Path, folder: Path) -> str:
    """The split in the name of a file, or else in that of the nearest folder; empty where none says one."""
    shard = _SHARD.match(file.name)
    if shard and _words(shard["split"]):
        return shard["split"]
    parts = (file.name, *reversed(file.relative_to(folder).parts[:-1]))
    word = next((words[0] for words in map(_words, parts) if len(words) == 1), "")
    return word or (shard["split"] if shard else "")


def _words(name: str) -> list[str]:
    """The names of splits among the words of a name."""
    return sorted(_SPLIT_NAMES.intersection(re.split(r"[^a-z0-9]+", name.lower())))


def _check_whole(folder: Path, files: Sequence[Path]) -> None:
    """FolderError where a number is missing among the shards of one name in one folder."""
    shards: dict[tuple[Path, str], list[re.Match[str]]] = defaultdict(list)
    for file in files:
        if match := _SHARD.match(file.name):
            shards[file.parent, match["split"]].append(match)
    for own in shards.values():
        count = int(own[0]["count"])
        missing = set(range(count)) - {int(match["number"]) for match in own}
        if missing:
            raise FolderError(f"{folder}: shard {min(missing)} of {count} is missing; fetch or write it again")


def _of_dict(folder: Path, split: str) -> Shards:
    names = _object(folder / _DICT).get("splits")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FolderError(f"{folder / _DICT}: names no splits; write the folder again with save_to_disk")
    if split not in names:
        raise _missing_split(folder, split, names)
    others = [name for name in names if name != split]
    return Shards(files=_saved_files(folder / _plain_name(folder, split)), reader=read_arrow, others=others)


def _saved_files(folder: Path) -> list[Path]:
    listed = _object(folder / _STATE).get("_data_files")
    names = [item.get("filename") for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    if not names:
        raise FolderError(f"{folder / _STATE}: names no files; write the folder again with save_to_disk")
    files = [folder / _plain_name(folder, name) for name in names]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise FolderError(f"{missing}: is missing; fetch it, or write the folder again with save_to_disk")
    return files


def _refuse_split(folder: Path, split: str) -> None:
    if split != _DEFAULT_SPLIT:
        raise ConfigError(f"{folder}: has no splits, so there is no {quote(split)}; leave --split out")


def _plain_name(folder: Path, name: object) -> str:
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise FolderError(f"{folder}: names a file outside of it, {quote(name)}; write it again with save_to_disk")
    return name


def _object(path: Path) -> dict[str, object]:
    if not path.is_file():
        raise FolderError(f"{path}: is missing; write the folder again with save_to_disk")
    with readable(path):
        data = path.read_bytes() if path.stat().st_size <= _MAX_STATE_BYTES else b""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise FolderError(f"{path}: is not a JSON object; write the folder again with save_to_disk")
    return value


def _missing_split(folder: Path, split: str, names: Sequence[str]) -> ConfigError:
    return ConfigError(f"{folder}: has no split {quote(split)}; choose one of {', '.join(names)} with --split")


PREFIX = "hub:"
_FORM = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?::(?P<configuration>[^@]+))?(?:@(?P<revision>\S+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubDataset:
    """A repository, one of its configurations (None where it has only one), and a commit, branch or tag."""

    repository: str
    configuration: str | None = None
    revision: str = "main"

    @property
    def name(self) -> str:
        """How it is written: hub:org/name:configuration@revision."""
        configuration = f":{self.configuration}" if self.configuration else ""
        return f"{PREFIX}{self.repository}{configuration}@{self.revision}"


def parse_hub(text: str) -> HubDataset:
    """The dataset that hub:org/name[:configuration][@revision] names; ConfigError for another form."""
    match = _FORM.fullmatch(text.removeprefix(PREFIX))
    if match is None:
        form = "hub:org/name, hub:org/name:configuration or hub:org/name:configuration@revision"
        raise ConfigError(f"{quote(text)}: no dataset of the hub; write {form}")
    known = {key: value for key, value in match.groupdict().items() if value}
    return HubDataset(**known)


def commit_of(dataset: HubDataset) -> str:
    """The commit that its revision is now; a commit is itself, and the hub is not asked."""
    if _COMMIT.fullmatch(dataset.revision):
        return dataset.revision
    from huggingface_hub import HfApi

    guard_client()
    with _hub_errors(dataset):
        commit = str(HfApi().dataset_info(dataset.repository, revision=dataset.revision).sha)
        if not _COMMIT.fullmatch(commit):
            raise ValueError(f"it answers with {quote(commit, 50)}, which is not a commit")
        return commit


def read_hub(dataset: HubDataset, commit: str, split: str) -> Rows:
    """The rows of one split as they come, in the hub's order; only what is read is fetched."""
    import datasets

    # datasets would take a folder of this name for the repository, at whatever commit.
    if Path(dataset.repository).exists():
        remedy = "run elsewhere, or give the file in it as --source"
        raise ConfigError(
            f"{dataset.name}: a folder {dataset.repository} of this machine hides the repository; {remedy}"
        )
    guard_client()
    where = f"{dataset.name} {split}"
    # On the converted branch a configuration is a folder and has no name (tried with datasets 5.2).
    key = "data_dir" if dataset.revision == CONVERTED else "name"
    chosen = {key: dataset.configuration} if dataset.configuration else {}
    with _hub_errors(dataset):
        rows = datasets.load_dataset(dataset.repository, revision=commit, split=split, streaming=True, **chosen)
        # Pictures and sounds stay bytes: to decode one opens whatever path the row names.
        rows = rows.decode(False)
        for number, row in enumerate(rows, start=1):
            yield f"{where}: row {number}", row


@contextlib.contextmanager
def _hub_errors(dataset: HubDataset) -> Iterator[None]:
    try:
        yield
    except (ConfigError, GeneratorExit):
        raise
    except Exception as error:  # whatever the hub's clients raise: they have a dozen kinds, of four libraries
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "check its name, configuration, split and revision, and the network"
        raise ConfigError(f"{dataset.name}: cannot be read from the hub ({quote(reason, 160)}); {remedy}") from error
