"""Folders of data files: shards of one table (Parquet, CSV, JSON Lines), or what `datasets` wrote with save_to_disk."""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cappy.errors import ConfigError, FolderError, shown
from cappy.preparation.arrow import read_arrow
from cappy.preparation.files import READERS, Reader, reader_of
from cappy.preparation.packing import plain, readable
from cappy.preparation.rows import Rows

STATE, DICT = "state.json", "dataset_dict.json"
DEFAULT = "train"
MAX_STATE_BYTES = 64 * 2**20
_LINES = (".jsonl", ".ndjson", ".json")
_SUFFIXES = (*READERS, *_LINES)
SPLIT_NAMES = frozenset(
    ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
)
"""Words by which the names of files and folders tell splits, as `datasets` has them."""
_SHARD = re.compile(r"(?P<split>.+?)-(?P<number>\d{5})-of-(?P<count>\d{5})(?:-\w+)?\.")


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The files of a table in order, what reads them, and the splits that lie there and are not read."""

    files: Sequence[Path]
    reader: Reader
    others: Sequence[str] = ()
    split: str = ""

    def rows(self) -> Rows:
        """The rows of all files, one after another."""
        for file in self.files:
            yield from self.reader(file)


def find_shards(folder: Path, split: str) -> Shards | None:
    """The table in a folder, or None where it holds no data files; FolderError where it holds several or half of one.

    Where the files or the folder name splits, `split` is read.
    """
    if (folder / DICT).is_file():
        return _of_dict(folder, split)
    if (folder / STATE).is_file():
        _refuse_split(folder, split)
        return Shards(files=_saved_files(folder), reader=read_arrow)
    files = sorted(found for found in folder.rglob("*") if _is_data(found, folder))
    if not files:
        return None
    kinds = {reader_of(file) for file in files}
    if len(kinds) > 1:
        names = ", ".join(sorted({plain(file).suffix for file in files}))
        raise FolderError(f"{folder}: holds files of several formats ({names}); name one of them as --source")
    files, others = _of_split(folder, files, split)
    return Shards(files=files, reader=kinds.pop(), others=others, split=split if others else "")


def _is_data(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    return not hidden and path.is_file() and plain(path).suffix.lower() in _SUFFIXES and path.name not in _METADATA


_METADATA = ("dataset_info.json", "dataset_infos.json", STATE, DICT, "task.json", "manifest.json")


def _of_split(folder: Path, files: list[Path], split: str) -> tuple[list[Path], list[str]]:
    """The files of the split that their names tell, all of them where they tell none, and the other splits."""
    named: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        named[_split_of(file, folder)].append(file)
    _check_whole(folder, files)
    loose = named.get("")
    if loose and named.keys() - {"", DEFAULT}:
        splits = ", ".join(sorted(filter(None, named)))
        what = f"holds files of splits ({splits}) and {loose[0].relative_to(folder)}, whose name tells none"
        raise FolderError(f"{folder}: {what}; name one of them as --source, or rename that file")
    if loose or (len(named) == 1 and split == DEFAULT):
        _refuse_split(folder, split)
        return files, []
    if split not in named:
        raise _no_split(folder, split, sorted(named))
    return named[split], sorted(named.keys() - {split})


def _split_of(file: Path, folder: Path) -> str:
    """The split that the name of a file tells, or else that of the nearest folder; empty where none tells one."""
    shard = _SHARD.match(file.name)
    if shard and _words(shard["split"]):
        return shard["split"]
    parts = (file.name, *reversed(file.relative_to(folder).parts[:-1]))
    word = next((words[0] for words in map(_words, parts) if len(words) == 1), "")
    return word or (shard["split"] if shard else "")


def _words(name: str) -> list[str]:
    """The names of splits among the words of a name."""
    return sorted(SPLIT_NAMES.intersection(re.split(r"[^a-z0-9]+", name.lower())))


def _check_whole(folder: Path, files: Sequence[Path]) -> None:
    """FolderError where a number is missing among the shards of one name in one folder."""
    shards: dict[tuple[Path, str], list[re.Match[str]]] = defaultdict(list)
    for file in files:
        if found := _SHARD.match(file.name):
            shards[file.parent, found["split"]].append(found)
    for own in shards.values():
        count = int(own[0]["count"])
        missing = set(range(count)) - {int(found["number"]) for found in own}
        if missing:
            raise FolderError(f"{folder}: shard {min(missing)} of {count} is missing; fetch or write it again")


def _of_dict(folder: Path, split: str) -> Shards:
    names = _object(folder / DICT).get("splits")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FolderError(f"{folder / DICT}: names no splits; write the folder again with save_to_disk")
    if split not in names:
        raise _no_split(folder, split, names)
    others = [name for name in names if name != split]
    return Shards(
        files=_saved_files(folder / _plain_name(folder, split)), reader=read_arrow, others=others, split=split
    )


def _saved_files(folder: Path) -> list[Path]:
    listed = _object(folder / STATE).get("_data_files")
    names = [item.get("filename") for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    if not names:
        raise FolderError(f"{folder / STATE}: names no files; write the folder again with save_to_disk")
    files = [folder / _plain_name(folder, name) for name in names]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise FolderError(f"{missing}: is missing; fetch it, or write the folder again with save_to_disk")
    return files


def _refuse_split(folder: Path, split: str) -> None:
    if split != DEFAULT:
        raise ConfigError(f"{folder}: tells no splits apart, so there is no {shown(split)}; leave --split out")


def _plain_name(folder: Path, name: object) -> str:
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise FolderError(f"{folder}: names a file outside of it, {shown(name)}; write it again with save_to_disk")
    return name


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FolderError(f"{path}: is missing; write the folder again with save_to_disk")
    with readable(path):
        data = path.read_bytes() if path.stat().st_size <= MAX_STATE_BYTES else b""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise FolderError(f"{path}: is no JSON object; write the folder again with save_to_disk")
    return found


def _no_split(folder: Path, split: str, names: Sequence[str]) -> ConfigError:
    return ConfigError(f"{folder}: has no split {shown(split)}; choose one of {', '.join(names)} with --split")
