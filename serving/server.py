"""Loads a scorer and serves it until SIGTERM."""

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from cappy import registry
from cappy.errors import CappyError, ConfigError, FolderError, quote
from cappy.records.folder import MANIFEST
from cappy.registry import Version
from cappy.specs import parse_spec
from serving.access import start_tracing
from serving.admin import read_secret
from serving.app import Options, create_app
from serving.config import Environment, ServeConfig
from serving.engine import Model, Models, load
from serving.following import Follower, load_version
from serving.guards import hosts_of, read_keys
from serving.listener import GracefulServer, address_errors, bind, check_tls, format_url, http_config, prepare_process

MakeFollower = Callable[[Models], Follower]
"""Creates the follower, which changes the model while requests are answered."""


def run(config: ServeConfig, environment: Environment | None = None) -> None:
    """Binds the address, loads the scorer and serves it; returns after a graceful shutdown.

    Raises ConfigError before the scorer is loaded if the address cannot be bound. SIGTERM ends the process with status
    0.
    """
    check_tls(config.tls_certificate, config.tls_key)
    # Report invalid keys before a folder is copied from a bucket.
    read_keys(config.api_keys)
    read_secret()
    with local_scorer(config.scorer) as scorer:
        parse_spec(scorer)
        seconds = config.follow_interval
        if not seconds:
            serve(lambda: load(scorer, config.model_name, config.precision), config, environment)
            return

        def read_alias() -> Version:
            return registry.resolve(scorer)

        def load_current(version: Version) -> Model:
            return load_version(version, scorer, config.model_name, config.precision)

        def make_follower(models: Models) -> Follower:
            return Follower(models=models, alias=scorer, read_alias=read_alias, load=load_current, seconds=seconds)

        serve(lambda: load_current(read_alias()), config, environment, make_follower=make_follower)


def serve(
    load: Callable[[], Model],
    config: ServeConfig,
    environment: Environment | None = None,
    *,
    make_follower: MakeFollower | None = None,
) -> None:
    """Like `run`, but serves the model that `load` returns."""
    keys, secret, environment = read_keys(config.api_keys), read_secret(), environment or Environment()
    prepare_process()
    failures: list[CappyError] = []

    def on_failure(error: CappyError) -> None:
        failures.append(error)
        server.should_exit = True

    with bind(config.host, config.port) as listener:
        executor = ThreadPoolExecutor(1, "computing")
        models = Models(executor.submit(load).result())
        with address_errors(config.host, config.port):
            listener.listen(2048)
        options = Options(
            limits=config,
            batch_tokens=config.batch_tokens or getattr(models.current.engine, "batch_tokens", Options.batch_tokens),
            max_queued_tokens=config.max_queued_tokens,
            keys=keys,
            origins=config.allow_origin,
            hosts=hosts_of(listener, config.hosts, bool(keys)),
            webhook_secret=secret,
            routes=environment.routes,
            ready_path=environment.ready_path,
        )
        follower = make_follower(models) if make_follower else None
        app = create_app(
            models, options, on_failure=on_failure, follower=follower, executor=executor, tracing=start_tracing()
        )
        http = http_config(app, config, certificate=config.tls_certificate, key=config.tls_key)
        server = GracefulServer(http, models, config.notice)
        scheme = "https" if config.tls_certificate else "http"
        sys.stderr.write(
            f"cappy serve: scorer {models.current.version} at {format_url(listener, scheme)} "
            "(a page at /, POST /score, GET /ready; all paths: /openapi.json)\n"
        )
        server.run(sockets=[listener])
    if failures:
        raise failures[0]


@contextlib.contextmanager
def local_scorer(scorer: str) -> Iterator[str]:
    """Yields the spec itself, or, for a folder in a bucket (`gs://bucket/folder`), a temporary local copy.

    Raises ConfigError if the bucket cannot be read, and FolderError if the folder has no manifest, because a missing
    file would not be noticed then. Loading checks every file against the manifest.
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
            reason = quote(" ".join(str(error).split()), 200)
            remedy = "check the URI, the credentials and the network"
            raise ConfigError(f"{quote(scorer)}: cannot be read ({reason}); {remedy}") from error
        if not (folder / MANIFEST).exists():
            raise FolderError(f"{quote(scorer)}: has no {MANIFEST}; give a complete scorer folder")
        yield str(folder)


def _copy(uri: str, folder: Path) -> None:
    """Copies a folder with fsspec, or with google-cloud-storage if gcsfs is not installed."""
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(uri)
    except ImportError:
        if not uri.startswith("gs://"):
            raise
        _copy_blobs(uri, folder)
        return
    files.get(root.rstrip("/") + "/", str(folder) + "/", recursive=True)


class _Blob(Protocol):
    """An object in Google Cloud Storage, whose library has no types."""

    name: str

    def download_to_filename(self, filename: str) -> None:
        """Downloads the object to a file."""


def _copy_blobs(uri: str, folder: Path) -> None:
    import google.cloud.storage as storage

    bucket, _, prefix = uri.removeprefix("gs://").partition("/")
    prefix = f"{prefix.rstrip('/')}/" if prefix else ""
    blobs: Iterable[_Blob] = storage.Client().list_blobs(bucket, prefix=prefix)
    for blob in blobs:
        name = blob.name.removeprefix(prefix)
        if not name or name.endswith("/"):
            continue
        if ".." in name.split("/") or name.startswith("/"):
            raise ValueError(f"the object name {blob.name} points outside of the folder")
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        blob.download_to_filename(str(target))
