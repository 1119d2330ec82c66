"""The client for MLflow: checks that the server can be reached and turns its errors into one line."""

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

# Before MLflow is imported: by default it loads pickles, sends telemetry, and prints addresses to standard output.
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import sqlalchemy.exc
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from cappy.errors import RegistryError, UnreachableError, quote
from cappy.files import hold_lock
from cappy.redaction import redact_address
from cappy.registry.models import artifact_root, check_reachable, database, no_database_yet

__all__ = ["MlflowClient", "MlflowException", "connect", "experiment_id", "metric_key"]

CREDENTIALS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_INVALID_CHARACTERS = re.compile(r"[^\w\-. :/]")


@contextlib.contextmanager
def connect(tracking_uri: str) -> Iterator[MlflowClient]:
    """Yields an MlflowClient. Raises UnreachableError for its errors, within seconds if MLflow cannot be reached."""
    _trim_credentials()
    address = check_reachable(tracking_uri)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    try:
        path = database(address)
        with _lock_database(path), warnings.catch_warnings():
            # MLflow 3.17 uses a loader that SQLAlchemy 2.1 warns about when the store is loaded.
            warnings.simplefilter("ignore")
            if path is not None and no_database_yet(address):
                _create_tables(path)
            client = _client(address)
            client.search_experiments(max_results=1)
        yield client
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError) as error:
        reason = " ".join(str(error).split())
        raise UnreachableError(
            f"{redact_address(address)}: MLflow failed ({quote(reason, 200)}); see its log, then run again"
        ) from error


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
        shown_address = redact_address(address)
        raise RegistryError(
            f"{shown_address}: MLflow needs {missing.name} for this address; pip install it"
        ) from missing


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
