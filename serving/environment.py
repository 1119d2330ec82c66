"""What Vertex AI tells a container by its environment: where the model lies, on which port and paths to answer."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cappy.errors import ConfigError, FolderError, shown
from cappy.records.folder import MANIFEST
from serving.server import DEFAULT_SCORER, Address


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What to serve and where, as far as no flag says so."""

    scorer: str = DEFAULT_SCORER
    """A spec, or the URI of a bucket's folder."""
    host: str = Address.host
    port: int = Address.port
    routes: Mapping[str, str] = field(default_factory=dict)
    ready_path: str = ""
    allowed_hosts: Sequence[str] = ()


def read(variables: Mapping[str, str]) -> Environment:
    """The settings that AIP_STORAGE_URI, AIP_HTTP_PORT, AIP_PREDICT_ROUTE and AIP_HEALTH_ROUTE hold; ConfigError.

    Where AIP_HTTP_PORT is given, other machines are let in, under any name: the platform's own proxy stands in front.
    """
    place, port = variables.get("AIP_STORAGE_URI", ""), variables.get("AIP_HTTP_PORT", "")
    if port and not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ConfigError(f"AIP_HTTP_PORT: {shown(port)} is no port; give 0 to 65535 or none")
    predict, health = _route(variables, "AIP_PREDICT_ROUTE"), _route(variables, "AIP_HEALTH_ROUTE")
    return Environment(
        scorer=place.rstrip("/") or DEFAULT_SCORER,
        host="0.0.0.0" if port else Address.host,  # noqa: S104 (a container's only way to be reached)
        port=int(port) if port else Address.port,
        routes={predict: "vertex"} if predict else {},
        ready_path=health,
        allowed_hosts=("*",) if port else (),
    )


def _route(variables: Mapping[str, str], name: str) -> str:
    route = variables.get(name, "")
    if route and (not route.startswith("/") or set(route) & set("{}?# ")):
        raise ConfigError(f"{name}: {shown(route)} is no path; give one such as /predict")
    return route


@contextlib.contextmanager
def local(scorer: str) -> Iterator[str]:
    """The spec itself, or the folder that a bucket's (`gs://bucket/folder`) was copied to, kept until the block ends.

    Of a bucket a manifest is asked for, since without one nobody would see that a file is missing; loading checks every
    file against it. ConfigError where the bucket cannot be read, FolderError without a manifest.
    """
    if "://" not in scorer:
        yield scorer
        return
    with tempfile.TemporaryDirectory(prefix="cappy-") as target:
        folder = Path(target) / (scorer.rstrip("/").rpartition("/")[2] or "scorer")
        folder.mkdir()
        try:
            _copy(scorer, folder)
        except Exception as error:
            reason = shown(" ".join(str(error).split()), 200)
            remedy = "check the URI, the credentials and the network"
            raise ConfigError(f"{shown(scorer)}: cannot be read ({reason}); {remedy}") from error
        if not (folder / MANIFEST).exists():
            raise FolderError(f"{shown(scorer)}: holds no {MANIFEST}; give the folder of a scorer, whole")
        yield str(folder)


def _copy(uri: str, folder: Path) -> None:
    """By fsspec, or by the library of Google Cloud Storage where fsspec's part for it is not installed."""
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(uri)
    except ImportError:
        if not uri.startswith("gs://"):
            raise
        _copy_blobs(uri, folder)
        return
    files.get(root.rstrip("/") + "/", str(folder) + "/", recursive=True)


def _copy_blobs(uri: str, folder: Path) -> None:
    from google.cloud import storage  # type: ignore[attr-defined] # untyped

    client: Any = storage.Client()
    bucket, _, prefix = uri.removeprefix("gs://").partition("/")
    prefix = f"{prefix.rstrip('/')}/" if prefix else ""
    for blob in client.list_blobs(bucket, prefix=prefix):
        name = blob.name.removeprefix(prefix)
        if not name or name.endswith("/"):
            continue
        if ".." in name.split("/") or name.startswith("/"):
            raise ValueError(f"the object {blob.name} leads out of the folder")
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        blob.download_to_filename(str(target))
