"""PromptSource's template files, downloaded from its repository and taken only if they are the ones that we know."""

import hashlib
import io
import json
import shutil
import tarfile
import urllib.request
import zlib
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from tempfile import mkdtemp

from cappy.errors import ConfigError, FolderError, shown

URL = "https://github.com/bigscience-workshop/promptsource/archive/refs/heads/main.tar.gz"
"""The main branch, where nothing has changed since June 2023. `hashes.json` is what pins the files, not this address.

It lists the 279 files that this project was tested with: release 0.2.3 with the languages of each template, and the
later changes to trec, multi_news and race. The full name of their commit could not be established.
"""
MAX_BYTES = 2**26
_FOLDER = ("promptsource", "templates")


def known_hashes() -> Mapping[str, str]:
    """sha256 of every known file, by its path below the folder of templates."""
    hashes: dict[str, str] = json.loads(Path(__file__).with_name("hashes.json").read_text())
    return hashes


def fetch(target: Path, *, url: str = URL, hashes: Mapping[str, str] | None = None, seconds: float = 60) -> int:
    """Writes the template files to `target`, a new folder, and counts them.

    `url` is a tar.gz of the repository; `seconds` bounds each wait for it. Nothing is written unless every file of
    `hashes` (the known ones, if left out) is there with its sha256; other files of the archive are left out.
    ConfigError if the target is taken or the address gives nothing, FolderError if the archive is not the known one.
    """
    if target.exists():
        raise ConfigError(f"{target}: is there already; name a folder that is not")
    wanted = known_hashes() if hashes is None else hashes
    files = _checked(url, _members(url, _download(url, seconds)), wanted)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for name, content in files.items():
            path = unfinished / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        unfinished.chmod(0o755)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return len(files)


def _download(url: str, seconds: float) -> bytes:
    remedy = "check the address and the network, or fetch it elsewhere and name its templates' folder"
    if not url.startswith(("https://", "http://")):
        raise ConfigError(f"{shown(url)}: is no web address; {remedy}")
    try:
        with urllib.request.urlopen(url, timeout=seconds) as answer:  # noqa: S310 # the scheme is checked above
            content: bytes = answer.read(MAX_BYTES + 1)
    except (OSError, HTTPException) as error:
        raise ConfigError(f"{url}: gives no archive ({shown(str(error), limit=120)}); {remedy}") from error
    if len(content) > MAX_BYTES:
        raise FolderError(f"{url}: gives more than {MAX_BYTES:,} bytes; {remedy}")
    return content


def _members(url: str, content: bytes) -> dict[str, bytes]:
    """The files below the folder of templates, by their path there; no member may point out of the archive."""
    found, left = {}, MAX_BYTES
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise FolderError(f"{url}: {shown(member.name)} points out of the archive; use another address")
                left -= member.size
                if left < 0:
                    raise FolderError(f"{url}: unpacks to more than {MAX_BYTES:,} bytes; use another address")
                file = archive.extractfile(member) if member.isreg() and path.parts[1:3] == _FOLDER else None
                if file is not None:
                    found[PurePosixPath(*path.parts[3:]).as_posix()] = file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise FolderError(f"{url}: is no tar.gz ({shown(str(error))}); check the address, or fetch again") from error
    return found


def _checked(url: str, found: Mapping[str, bytes], wanted: Mapping[str, str]) -> dict[str, bytes]:
    remedy = "nothing was written; fetch again, or from the address of the known files"
    for name, sha256 in wanted.items():
        if name not in found:
            raise FolderError(f"{url}: has no {name}; {remedy}")
        if hashlib.sha256(found[name]).hexdigest() != sha256:
            raise FolderError(f"{url}: {name} is not the known file (its sha256 differs); {remedy}")
    return {name: found[name] for name in wanted}
