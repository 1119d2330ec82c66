"""Where MLflow is, and whether it can be reached, found out before MLflow's minutes of retries."""

import http.client
import os
import sqlite3
from pathlib import Path
from urllib.parse import urlsplit

from cappy.errors import UnreachableError
from cappy.redaction import redact_address, remember_address

DATABASE = Path(".cappy/mlflow.db")
REACH_SECONDS = 4.0
_SQLITE = "sqlite:///"
_REMEDY = "start it, or give another address with --tracking-uri or MLFLOW_TRACKING_URI"


def tracking_address(uri: str = "") -> str:
    """The MLflow address to use: the one given, else MLFLOW_TRACKING_URI, else the database in `.cappy`.

    What it holds of secrets stands in no message from now on.
    """
    address = (uri or os.environ.get("MLFLOW_TRACKING_URI", "")).strip() or f"{_SQLITE}{DATABASE.absolute()}"
    remember_address(address)
    return address


def database(uri: str) -> Path | None:
    """The file behind a SQLite address; None for any other."""
    address = tracking_address(uri)
    return Path(address.removeprefix(_SQLITE)) if address.startswith(_SQLITE) else None


def no_database_yet(uri: str = "") -> bool:
    """Whether the address is a SQLite file that the first run will make; an empty file is none."""
    path = database(uri)
    return path is not None and not (path.exists() and path.stat().st_size)


def artifact_root(uri: str) -> str | None:
    """Where a new experiment's artifacts go: beside a SQLite file; None where the server decides."""
    path = database(uri)
    return None if path is None else (path.absolute().parent / "mlartifacts").as_uri()


def check(uri: str) -> str:
    """The address, if it can be reached within seconds; RegistryError with the remedy if not."""
    address = tracking_address(uri)
    parts = urlsplit(address)
    path = database(address)
    if path is not None:
        _check_database(address, path)
    elif parts.scheme in ("http", "https"):
        _check_server(address)
    return address


def _check_database(address: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=REACH_SECONDS)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()
        finally:
            connection.close()
    except (OSError, sqlite3.Error) as error:
        remedy = "choose a file that may be written, with --tracking-uri or MLFLOW_TRACKING_URI"
        raise UnreachableError(
            f"{redact_address(address)}: MLflow's database cannot be opened ({error}); {remedy}"
        ) from error


def _check_server(address: str) -> None:
    parts = urlsplit(address)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    try:
        connection = kind(parts.hostname or "", parts.port, timeout=REACH_SECONDS)
        try:
            connection.request("GET", f"{parts.path.rstrip('/')}/health")
            connection.getresponse()
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UnreachableError(
            f"{redact_address(address)}: MLflow does not answer ({error or type(error).__name__}); {_REMEDY}"
        ) from error
