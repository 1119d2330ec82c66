"""Registered versions: lookup by alias, number or content, verified downloads, and counts of attempts.

Every version tested on the same groups is another chance to win by luck, so the gate requires more confidence
for later ones.
"""

import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import mlflow.artifacts
from mlflow.entities.model_registry import ModelVersion

from cappy.errors import FolderError, RegistryError, UnreachableError, quote
from cappy.model_folder import verify_exactly
from cappy.records import read_manifest
from cappy.records.folder import sha256_of
from cappy.records.overlap import merge_sketches, sketch_overlap
from cappy.redaction import redact_address
from cappy.registry.client import MlflowClient, MlflowException, connect
from cappy.registry.models import ATTEMPT_TAG, CHAMPION, EVALUATION_TAGS, MANIFEST_TAG, TESTED_TAG, Version
from cappy.specs import parse_spec

NEWEST = "version_number DESC"
SCORER_PATH = "artifacts/scorer"
"""Path of the scorer folder inside a version."""
_CONTENT = re.compile(r"[0-9a-f]{64}(-[0-9a-f]{12}){0,4}")
_PORTS = {"http": 80, "https": 443}
_SAME_SHARE = 0.5
"""If a version's own tag has at least this share of the groups, it was tested first, so later versions do not count."""
ARTIFACT_HOSTS = "CAPPY_ARTIFACT_HOSTS"
"""Environment variable: comma-separated artifact servers (host:port) that may receive MLflow's credentials."""


def resolve(spec: str, *, tracking_uri: str) -> Version:
    """The version for a `models:/` spec. Raises RegistryError if there is none."""
    parsed = parse_spec(spec)
    if parsed.kind != "models":
        raise RegistryError(f"{quote(spec)}: not a registered version; give models:/name@alias or models:/name/3")
    with connect(tracking_uri) as client:
        version = find(client, parsed.name, parsed.revision)
        if version is None:
            raise RegistryError(f"{spec}: {describe_available(client, parsed.name)}")
        return version


def champion(name: str, *, tracking_uri: str) -> Version | None:
    """The champion of a registered model, or None."""
    with connect(tracking_uri) as client:
        return find(client, name, CHAMPION)


def find(client: MlflowClient, name: str, revision: str) -> Version | None:
    """The version with this number or alias, or None."""
    try:
        if revision.isdigit():
            return _version(client.get_model_version(name, revision))
        return _version(client.get_model_version_by_alias(name, revision))
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def find_content(client: MlflowClient, name: str, manifest_hash: str, selector_hash: str) -> Version | None:
    """The newest version with this scorer and this selector, or None; both are given by their sha256."""
    query = f"name = '{name}' and tags.`{MANIFEST_TAG}` = '{manifest_hash}'"
    registered = map(_version, client.search_model_versions(query, order_by=[NEWEST], max_results=1000))
    newest = next((version for version in registered if version.selector_hash == selector_hash), None)
    # Search results have no aliases.
    return find(client, name, str(newest.number)) if newest else None


def same_scorer(client: MlflowClient, version: Version) -> set[int]:
    """The numbers of the other versions that have this scorer, with another selector."""
    others = _other_versions(client, version)
    return {other.number for other in others if version.manifest_hash and other.manifest_hash == version.manifest_hash}


def _other_versions(client: MlflowClient, version: Version) -> list[Version]:
    """All other versions of the model, without aliases, oldest first."""
    others: list[Version] = []
    token = None
    while True:
        page = client.search_model_versions(f"name = '{version.name}'", max_results=200, page_token=token)
        others += [_version(registered) for registered in page]
        token = page.token
        if not token:
            return sorted((other for other in others if other.number != version.number), key=lambda other: other.number)


def download(spec: str, *, tracking_uri: str, cache: Path) -> Path:
    """Downloads a registered scorer to a folder of `cache` named by its content, verifies it and returns the folder."""
    version = resolve(spec, tracking_uri=tracking_uri)
    if not version.manifest_hash:
        raise RegistryError(f"{version.uri}: was not registered by cappy (no tag {MANIFEST_TAG}); register it again")
    # The name comes from tags, and a folder of that name may be deleted below, so it must be a hash.
    if not _CONTENT.fullmatch(version.content_hash):
        problem = f"its tags have {quote(version.content_hash, 60)} instead of sha256 hashes"
        raise RegistryError(f"{version.uri}: was not registered by cappy ({problem}); register it again")
    folder = cache / version.content_hash
    if folder.is_dir():
        try:
            verify_exactly(folder)
            _check_evaluation_files(folder, version)
        except (FolderError, RegistryError):
            shutil.rmtree(folder)
        else:
            return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as temporary:
        _download_verified(version, Path(temporary), tracking_uri)
        with contextlib.suppress(FileExistsError):
            # Another process may have downloaded the same content in the meantime.
            _rename(Path(temporary) / "scorer", folder)
    return folder


def _download_verified(version: Version, folder: Path, tracking_uri: str) -> None:
    """Downloads the scorer to `folder/scorer` and verifies it against the tag of the version."""
    with connect(tracking_uri) as client:
        location = _location(version, client)
        try:
            mlflow.artifacts.download_artifacts(
                artifact_uri=f"{location}/{SCORER_PATH}", dst_path=str(folder), tracking_uri=client.tracking_uri
            )
        except Exception as error:  # Every artifact store raises its own errors.
            reason = " ".join(str(error).split())
            remedy = "check the artifact store, then run again"
            raise UnreachableError(
                f"{version.uri}: its files cannot be downloaded ({quote(reason, 200)}); {remedy}"
            ) from error
    scorer = folder / "scorer"
    try:
        manifest_hash = verify_exactly(scorer).hash
    except FolderError as error:
        reason = str(error).replace(str(scorer), f"{version.source}/{SCORER_PATH}")
        raise RegistryError(f"{version.uri}: {reason.partition(';')[0]}; register the scorer again") from error
    if manifest_hash != version.manifest_hash:
        hashes = f"manifest {manifest_hash[:12]}, registered {version.manifest_hash[:12]}"
        raise RegistryError(f"{version.uri}: differs from what was registered ({hashes}); register the scorer again")
    _check_evaluation_files(scorer, version)


def _location(version: Version, client: MlflowClient) -> str:
    """Location of the files of a version. Raises RegistryError if it is on an HTTP server other than MLflow's.

    MLflow sends its credentials (MLFLOW_TRACKING_TOKEN etc.) to any host in the source of a version. A copied version
    (`copy_model_version`) refers to the files of the original.
    """
    location = version.source
    if urlsplit(location).scheme.lower() == "models":
        location = client.get_model_version_download_uri(version.name, str(version.number))
    source, server = urlsplit(location), urlsplit(client.tracking_uri)
    if source.scheme.lower() in ("runs", "models"):
        problem = f"its source {quote(location, 80)} does not contain files"
        raise RegistryError(f"{version.uri}: {problem}; register it again")
    if source.scheme.lower() not in ("http", "https", "mlflow-artifacts") or not source.netloc:
        return location
    if source.netloc in os.environ.get(ARTIFACT_HOSTS, "").split(","):
        return location
    try:
        scheme = server.scheme if source.scheme.lower() == "mlflow-artifacts" else source.scheme.lower()
        file_server = (scheme, source.hostname, source.port or _PORTS.get(scheme))
        mlflow_server = (server.scheme, server.hostname, server.port or _PORTS.get(server.scheme))
    except ValueError:
        file_server, mlflow_server = ("", "", None), ("", None, None)
    if file_server != mlflow_server:
        problem = f"its files are on a server other than MLflow ({quote(redact_address(location), 80)})"
        raise RegistryError(f"{version.uri}: {problem}; register it again, or name host:port in {ARTIFACT_HOSTS}")
    return location


def is_intact(version: Version, *, tracking_uri: str) -> bool:
    """Downloads a version and returns whether its files are those that were registered.

    Raises UnreachableError if the store does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="cappy-") as folder:
        try:
            _download_verified(version, Path(folder), tracking_uri)
        except UnreachableError:
            raise
        except RegistryError:
            return False
    return True


def _check_evaluation_files(folder: Path, version: Version) -> None:
    """Checks the evaluation files, which are not in the manifest, against the sha256 in the version's tags.

    Raises RegistryError if such a file is missing, differs, or was not registered.
    """
    for name, tag in EVALUATION_TAGS.items():
        path, expected = folder / name, version.tags.get(tag, "")
        sha256 = sha256_of(path) if path.is_file() else ""
        if sha256 != expected:
            hashes = f"sha256 {sha256[:12] or 'none'}, registered {expected[:12] or 'none'}"
            raise RegistryError(f"{version.uri}: {name} differs from what was registered ({hashes}); register it again")


def _rename(source: Path, target: Path) -> None:
    """Renames a folder. Raises FileExistsError if the target is already a finished folder."""
    try:
        source.rename(target)
    except OSError as error:
        if read_manifest(target):
            raise FileExistsError(target) from error
        raise


def _version(registered: ModelVersion) -> Version:
    return Version(
        name=registered.name,
        number=int(registered.version),
        source=registered.source,
        aliases=tuple(registered.aliases),
        tags=dict(registered.tags),
    )


def describe_available(client: MlflowClient, name: str) -> str:
    """The end of an error message about a missing version: the aliases and the newest version that exist."""
    versions = client.search_model_versions(f"name = '{name}'", order_by=[NEWEST], max_results=1)
    if not versions:
        return "no such model in the registry; run `cappy adapt`, or set MLFLOW_TRACKING_URI to the right registry"
    aliases = sorted(client.get_registered_model(name).aliases)
    available = f"aliases: {', '.join(aliases) or 'none'}, newest version: {versions[0].version}"
    return f"no such version ({available}); choose one of these"


def count_attempt(client: MlflowClient, version: Version, tested_groups: str) -> int:
    """The number of this attempt on the groups: 1 plus the attempts of earlier versions.

    A version counts by the share of the groups that it was tested on, so that adding a row does not reset the count;
    the sum is rounded. Other versions with the same scorer and selector do not count.
    """
    own_overlap = sketch_overlap(tested_groups, version.tags.get(TESTED_TAG, ""))
    used = sum(
        sketch_overlap(tested_groups, other.tags.get(TESTED_TAG, ""))
        for other in _other_versions(client, version)
        if (other.manifest_hash, other.selector_hash) != (version.manifest_hash, version.selector_hash)
        and (other.number < version.number or own_overlap < _SAME_SHARE)
    )
    return 1 + int(used + 0.5)


def record_attempt(client: MlflowClient, version: Version, tested_groups: str, attempt: int) -> None:
    """Tags the version with the tested groups and the attempt; 0 means that attempts were not counted."""
    groups = merge_sketches(version.tags.get(TESTED_TAG, ""), tested_groups)
    tags = {TESTED_TAG: groups, ATTEMPT_TAG: str(attempt) if attempt else "not counted"}
    for key, value in tags.items():
        client.set_model_version_tag(version.name, str(version.number), key, value)
