"""Writes and verifies folders of Parquet parts, scorers or reports; a folder is finished once it has a manifest."""

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cappy.errors import FolderError, quote
from cappy.files import atomic_write, refuse_links
from cappy.records.instance import Instance
from cappy.records.schema import SCHEMA_VERSION, to_table
from cappy.steps import KEY

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 * 2**20
"""Size limit of a manifest; one of 100,000 parts has 13 MB."""
PART_ROWS = 512
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_FOLDER_RENAME = (errno.EMFILE, errno.ENOSYS, errno.ENOTSUP)
"""Errors of file systems that can rename files but not folders; Cloud Storage FUSE reports EMFILE."""
_BAD_PATH = (errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ENOENT)


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of the folder: its sha256, and its numbers of instances and candidates (0 for other files)."""

    name: str
    sha256: str
    rows: int = 0
    candidates: int = 0


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder contains and how it was made. The same work writes the same manifest, so it has no times or paths.

    `config` has the settings of the step, `generators` the revision of each LLM, `parents` the hashes of the inputs,
    `metrics` numbers and `facts` other values about the result. `step_version` is the version of the step that wrote
    the folder. Older manifests have a hash of the code in `code` instead.
    """

    step: str
    files: tuple[File, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    code: str = ""
    seed: int | None = None
    generators: Mapping[str, str] = field(default_factory=dict)
    parents: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
    step_version: int = 0

    @property
    def rows(self) -> int:
        """Instances in all parts."""
        return sum(file.rows for file in self.files)

    @property
    def candidates(self) -> int:
        """Candidates in all parts."""
        return sum(file.candidates for file in self.files)

    @property
    def hash(self) -> str:
        """sha256 of the manifest, and thus of every file that it lists."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The text of manifest.json: the fields, and the total rows and candidates."""
        values = {**asdict(self), "rows": self.rows, "candidates": self.candidates}
        if not self.step_version:
            # Older manifests have no such field: the hash of a registered scorer must not change.
            del values["step_version"]
        return json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str) -> "Manifest":
        """The inverse of `to_json`. Raises ValueError, TypeError or KeyError if the text is not a manifest."""
        values = json.loads(text)
        for derived in ("rows", "candidates"):
            values.pop(derived, None)
        files = tuple(File(**file) for file in values.pop("files"))
        manifest = Manifest(**{**values, "files": files, "parents": tuple(values.pop("parents"))})
        _check_fields(manifest)
        return manifest


def _check_fields(manifest: Manifest) -> None:
    """Raises ValueError if a field has the wrong type, or if the manifest cannot be encoded."""
    for file in manifest.files:
        _check_file_name(file.name)
        if not isinstance(file.sha256, str) or not all(map(_is_count, (file.rows, file.candidates))):
            raise ValueError(f"the file {file.name!r} has no sha256, or an invalid number of rows")
    if len({file.name for file in manifest.files}) < len(manifest.files):
        raise ValueError("it lists a file twice")
    objects = (manifest.config, manifest.generators, manifest.metrics, manifest.facts)
    texts = (manifest.step, manifest.code, *manifest.parents)
    if not all(isinstance(value, dict) for value in objects) or not all(isinstance(text, str) for text in texts):
        raise ValueError("a field has the wrong type")
    if not _is_count(manifest.step_version):
        raise ValueError(f"step_version is {manifest.step_version!r}")
    if not _is_count(manifest.schema_version):
        raise ValueError(f"schema_version is {manifest.schema_version!r}")
    manifest.to_json().encode()


def _is_count(value: object) -> bool:
    """Whether a value is an integer from 0 to 2**63 - 1."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _check_file_name(name: str) -> None:
    """Raises ValueError if the name leads out of the folder.

    Manifests may come from a registry that others write to.
    """
    if name.startswith("/") or "\\" in name or "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise ValueError(f"the file name {name!r} leads out of the folder")


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full disk, a missing permission or an invalid path into a FolderError with the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            remedy = "free some space and run the same command again; finished parts are kept"
            raise FolderError(f"{path}: no space left on the disk; {remedy}") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise FolderError(
                f"{path}: cannot be written; choose another --target or change its permissions"
            ) from error
        if error.errno in _BAD_PATH:
            raise FolderError(f"{path}: cannot be a folder ({error.strerror}); choose another path") from error
        raise


def write_bytes(path: Path, data: bytes, *, private: bool = False) -> None:
    """Writes a file atomically: under a temporary name, flushed to the disk, then renamed.

    A private file is readable by its owner only, whatever the umask.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, private=private) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def rename_folder(source: Path, target: Path, *, last: str) -> None:
    """Renames a folder atomically, or file by file with `last` at the end if the file system cannot rename folders.

    A mounted Cloud Storage bucket is such a file system. Readers treat `target` as complete once it contains `last`;
    without that file it was left by a killed process.
    """
    shutil.rmtree(target, ignore_errors=True)
    try:
        source.rename(target)
        return
    except OSError as error:
        if error.errno not in _NO_FOLDER_RENAME:
            raise
    files = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    for name in (*(name for name in files if name != Path(last)), Path(last)):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).replace(target / name)
    shutil.rmtree(source, ignore_errors=True)


def write_part(folder: Path, index: int, instances: Sequence[Instance]) -> File:
    """Writes one Parquet part (zstd) atomically."""
    buffer = io.BytesIO()
    pq.write_table(to_table(instances), buffer, compression="zstd")
    data = buffer.getvalue()
    name = f"part-{index:05d}.parquet"
    write_bytes(folder / name, data)
    return File(
        name=name,
        sha256=hashlib.sha256(data).hexdigest(),
        rows=len(instances),
        candidates=sum(len(instance.candidates) for instance in instances),
    )


def write_manifest(folder: Path, manifest: Manifest, *, private: bool = False) -> None:
    """Writes the manifest, which marks the folder as finished."""
    write_bytes(folder / MANIFEST, manifest.to_json().encode(), private=private)


def describe_files(folder: Path) -> tuple[File, ...]:
    """Every file of a folder with its sha256, except the manifest, the key of the work and hidden files."""
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    visible_names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    return tuple(
        File(name=name.as_posix(), sha256=sha256_of(folder / name))
        for name in visible_names
        if name.as_posix() not in (MANIFEST, KEY)
    )


def write(folder: str | Path, instances: Iterable[Instance], *, step: str = "", part_rows: int = PART_ROWS) -> Manifest:
    """Writes instances as a finished folder, `part_rows` per part, and returns its manifest.

    Raises FolderError if the folder is already finished.
    """
    target = Path(folder)
    if (target / MANIFEST).exists():
        raise FolderError(f"{target}: is already finished; choose another folder, or delete this one first")
    files = [write_part(target, index, part) for index, part in enumerate(batched(instances, part_rows))]
    manifest = Manifest(step=step, files=tuple(files))
    write_manifest(target, manifest)
    return manifest


def read_manifest(folder: str | Path) -> Manifest:
    """Reads the manifest of a finished folder. Raises FolderError if there is none or it is invalid."""
    path = Path(folder) / MANIFEST
    if path.parent.is_file():
        raise FolderError(
            f"{folder}: is a file; give the folder that a step wrote (cappy preparation makes one from a file)"
        )
    if not path.parent.is_dir():
        raise FolderError(f"{folder}: no such folder; check the path")
    if not path.is_file() and any(path.parent.glob(f"*/{MANIFEST}")):
        remedy = f"join them: cappy preparation --source {folder}"
        raise FolderError(f"{folder}: contains folders of records but is not one itself; {remedy}")
    if not path.is_file():
        raise FolderError(f"{folder}: has no {MANIFEST}, so it is unfinished; run the step that writes it again")
    try:
        if (size := path.stat().st_size) > MAX_MANIFEST_BYTES:
            raise ValueError(f"it has {size:,} bytes")
        manifest = Manifest.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FolderError(
            f"{path}: is not a manifest ({quote(str(error))}); run the step that wrote it again"
        ) from error
    if manifest.schema_version > SCHEMA_VERSION:
        limit = f"this version reads up to {SCHEMA_VERSION}"
        raise FolderError(f"{path}: has schema version {manifest.schema_version}, {limit}; update cappy")
    return manifest


def verify(folder: str | Path, manifest: Manifest | None = None) -> Manifest:
    """Checks the sha256 of every file in the manifest and returns the manifest. Raises FolderError if one differs."""
    manifest = manifest or read_manifest(folder)
    for file in manifest.files:
        verify_file(Path(folder), file)
    return manifest


def publish(work: Path, target: Path, manifest: Manifest) -> None:
    """Publishes the files of a work folder in `target`; the manifest is written last.

    Uses hard links where the file system allows them, so that publishing takes no disk space.
    """
    with disk_errors(target):
        if target.exists() and not target.is_dir():
            raise FolderError(f"{target}: is a file; --target must be a folder")
        (target / MANIFEST).unlink(missing_ok=True)
        for stale in target.glob("part-*.parquet"):
            stale.unlink()
        for file in manifest.files:
            refuse_links(target, file.name)
            link_or_copy(work / file.name, target / file.name)
    write_manifest(target, manifest)


def link_or_copy(source: Path, path: Path) -> None:
    """Hard-links `source` as `path`, or copies it if links are not possible; an existing file is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    try:
        os.link(source, path)
    except OSError:
        with source.open("rb") as original, atomic_write(path) as file:
            shutil.copyfileobj(original, file)


def verify_file(folder: Path, file: File) -> Path:
    """Checks the sha256 of a file of the folder and returns its path. Raises FolderError if it differs."""
    path = folder / file.name
    remedy = f"delete {folder} and run the step that wrote it again"
    try:
        missing = not path.is_file()
    except OSError:  # The name is too long.
        missing = True
    if missing:
        raise FolderError(f"{path}: is missing but listed in the manifest; {remedy}")
    if (sha256 := sha256_of(path)) != file.sha256:
        raise FolderError(f"{path}: is damaged (sha256 {sha256[:12]}, manifest {file.sha256[:12]}); {remedy}")
    return path


def batched(instances: Iterable[Instance], size: int) -> Iterator[list[Instance]]:
    """Yields the instances in lists of `size`; the last one may be shorter."""
    iterator = iter(instances)
    while part := list(itertools.islice(iterator, size)):
        yield part
