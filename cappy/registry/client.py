"""The client for MLflow: checks that the server can be reached and turns its errors into one line."""

import contextlib
import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

# Before MLflow is imported: by default it loads pickles, sends telemetry, and prints addresses to standard output.
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import sqlalchemy
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from cappy.errors import RegistryError, UnreachableError, quote
from cappy.files import hold_lock
from cappy.redaction import redact_address
from cappy.registry.models import artifact_root, check_database, database, no_database_yet, tracking_address

__all__ = ["MlflowClient", "MlflowException", "connect", "experiment_id", "metric_key"]

CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
CHECK_SECONDS = 4
"""Time limit of the first request to a server or a database."""
_LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(CHECK_SECONDS), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
_LIMITS_LOCK = threading.Lock()
_OTHER_ADDRESS = "give another address with --tracking-uri or MLFLOW_TRACKING_URI"
_STATUS = re.compile(r"(?:error code|too many) (\d{3})\b")
_NO_JSON = re.compile(r"not in a valid JSON format|JSONDecodeError")
_NO_ANSWER = re.compile(r"Max retries|Connection|timed out|resolve", re.IGNORECASE)
_INVALID_CHARACTERS = re.compile(r"[^\w\-. :/]")


@contextlib.contextmanager
def connect(tracking_uri: str) -> Iterator[MlflowClient]:
    """Yields an MlflowClient. Raises UnreachableError for its errors, within seconds if MLflow cannot be reached.

    The first request is authenticated and has a short time limit, whereas MLflow itself retries for minutes. It uses
    MLflow's own settings for proxies and certificates.
    """
    _trim_credentials()
    address = tracking_address(tracking_uri)
    if (path := database(address)) is not None:
        check_database(address, path)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    try:
        with _lock_database(path), _short_limits(address), warnings.catch_warnings():
            # MLflow 3.17 uses a loader that SQLAlchemy 2.1 warns about when the store is loaded.
            warnings.simplefilter("ignore")
            if path is not None and no_database_yet(address):
                _create_tables(path)
            if path is None and "://" in address and not address.startswith(("http://", "https://", "file:")):
                _check_database_server(address)
            client = _client(address)
            client.search_experiments(max_results=1)
        yield client
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError) as error:
        raise UnreachableError(f"{redact_address(address)}: {_describe(error)}") from error


def _describe(error: Exception) -> str:
    """Problem and remedy of an error of MLflow or of its database."""
    reason = " ".join(str(error).split())
    status = _STATUS.search(reason)
    shown = quote(reason.partition("(Caused by ")[2].rstrip(")") or reason, 200)
    if isinstance(error, sqlalchemy.exc.SQLAlchemyError):
        first = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        return f"MLflow's database does not answer ({quote(first, 200)}); start it, or {_OTHER_ADDRESS}"
    if status and status[1] in ("401", "403"):
        names = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        return f"MLflow refuses these credentials (status {status[1]}); set {names}"
    if status and status[1] in ("502", "503", "504"):
        return f"a proxy answers that MLflow behind it does not (status {status[1]}); start MLflow, or try again later"
    if status and status[1] == "421":
        return f"MLflow does not serve this host name ({shown}); start it with --allowed-hosts"
    if (status and status[1] in ("404", "405")) or _NO_JSON.search(reason):
        return f"what answers is not MLflow ({shown}): a login page, a proxy or another path; {_OTHER_ADDRESS}"
    if status is None and _NO_ANSWER.search(reason):
        return f"MLflow does not answer ({shown}); start it, or {_OTHER_ADDRESS}; check HTTPS_PROXY and certificates"
    return f"MLflow failed ({shown}); see its log, or {_OTHER_ADDRESS}"


def _check_database_server(address: str) -> None:
    """Connects once, with a time limit: MLflow would try for two minutes."""
    try:
        url = sqlalchemy.make_url(address)
        limit = {"connect_timeout": CHECK_SECONDS} if url.get_backend_name() in ("postgresql", "mysql") else {}
        engine = sqlalchemy.create_engine(url, connect_args=limit)
    except sqlalchemy.exc.NoSuchModuleError:
        return  # Not an address of a database; MLflow may know it.
    except ModuleNotFoundError as missing:
        raise _missing_module(address, missing) from missing
    try:
        engine.connect().close()
    finally:
        engine.dispose()


@contextlib.contextmanager
def _short_limits(address: str) -> Iterator[None]:
    """Limits each request of MLflow's client in this block, which reads these settings at each request."""
    if not address.startswith(("http://", "https://")):
        yield
        return
    with _LIMITS_LOCK:  # Another thread would take these limits for the user's own and keep them.
        former = {name: os.environ.get(name) for name in _LIMITS}
        os.environ.update(_LIMITS)
        try:
            yield
        finally:
            for name, value in former.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def experiment_id(client: MlflowClient, name: str, tracking_uri: str) -> str:
    """The id of the experiment with this name, which is created if it is missing."""
    with _lock_database(database(tracking_uri)):
        experiment = client.get_experiment_by_name(name)
        if experiment is not None:
            return str(experiment.experiment_id)
        return str(client.create_experiment(name, artifact_location=artifact_root(tracking_uri)))


def metric_key(name: str) -> str:
    """The metric name with `_` for characters that MLflow rejects, such as those in 0.5*rougeL+0.5*bleu."""
    return _INVALID_CHARACTERS.sub("_", name)


def _client(address: str) -> MlflowClient:
    try:
        return MlflowClient(tracking_uri=address, registry_uri=address)
    except ModuleNotFoundError as missing:
        raise _missing_module(address, missing) from missing


def _missing_module(address: str, missing: ModuleNotFoundError) -> RegistryError:
    return RegistryError(f"{redact_address(address)}: MLflow needs {missing.name} for this address; pip install it")


def _trim_credentials() -> None:
    """Removes the newline that `echo` and mounted files add to a secret, which is invalid in a header."""
    for name in CREDENTIALS:
        value = os.environ.get(name, "")
        if value != value.strip():
            os.environ[name] = value.strip()


def _create_tables(path: Path) -> None:
    """Creates the SQLite file atomically: MLflow rejects a file that a killed process left half finished."""
    draft = path.absolute().with_name(f".{path.name}.new")
    for leftover in (draft, draft.with_name(f"{draft.name}-journal")):
        leftover.unlink(missing_ok=True)
    # Imported here because it loads all tables, which is not needed for a server.
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(f"sqlite:///{draft}", artifact_root(f"sqlite:///{path}")).engine.dispose()
    draft.replace(path)


@contextlib.contextmanager
def _lock_database(path: Path | None) -> Iterator[None]:
    """Locks the creation of the tables of a SQLite file, so that two processes do not both create them."""
    if path is None:
        yield
        return
    with hold_lock(path.with_name(f".{path.name}.lock")):
        yield
