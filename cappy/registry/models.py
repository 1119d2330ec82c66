"""The parts of the registry that work without MLflow: its address, names of tags and files, and `Version`."""

import importlib.util
import os
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cappy.errors import UnreachableError
from cappy.evaluation.findings import OUT_OF_FOLD, ReportValues
from cappy.redaction import redact_address, register_address
from cappy.scoring.calibration import CALIBRATION, VERIFICATION_PAIRS
from cappy.selection.linear import SELECTOR

CHAMPION = "champion"
CHALLENGER = "challenger"
MANIFEST_TAG = "cappy.manifest"
FORMER_TAG = "cappy.former"
RUN_TAG = "cappy.run"
TESTED_TAG = "cappy.tested_groups"
"""Sketch of the groups that the version was tested on; see `cappy.records.overlap`."""
ATTEMPT_TAG = "cappy.attempt"
"""Number of the promotion attempt on the same test groups."""
REPORT_SUBJECT_TAG = "cappy.evidence"
"""Subject of the report of the version; see `report_subject`."""
SELECTOR_TAG = "cappy.selector"
EVALUATION_TAGS = {
    SELECTOR: SELECTOR_TAG,
    CALIBRATION: "cappy.calibration",
    VERIFICATION_PAIRS: "cappy.probe",
    OUT_OF_FOLD: "cappy.out_of_fold",
}
"""Files of the evaluation that are registered with the scorer -> tag of the version with their sha256.

The manifest of the scorer does not list them, because it is written before the evaluation.
"""


def report_subject(report: ReportValues) -> str:
    """The subject of a report: `scorer`, or `recipe` if the report is cross-fitted."""
    return "recipe" if report.get("folds") else "scorer"


@dataclass(frozen=True, kw_only=True)
class Version:
    """A version of a registered model; `source` is the location of its files."""

    name: str
    number: int
    source: str
    aliases: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        """Its spec by number, which does not change when aliases move."""
        return f"models:/{self.name}/{self.number}"

    @property
    def manifest_hash(self) -> str:
        """Hash of the scorer's manifest, and thus of every file; empty if another tool registered it."""
        return self.tags.get(MANIFEST_TAG, "")

    @property
    def selector_hash(self) -> str:
        """The sha256 of its selector.json; empty if it picks by the score alone."""
        return self.tags.get(SELECTOR_TAG, "")

    @property
    def content_hash(self) -> str:
        """The hashes of the scorer and of its evaluation files, joined by `-`."""
        evaluation_hashes = (self.tags.get(tag, "")[:12] for tag in EVALUATION_TAGS.values())
        return "-".join(filter(None, (self.manifest_hash, *evaluation_hashes)))

    @property
    def former(self) -> str:
        """Number of the previous champion; empty if there was none."""
        return self.tags.get(FORMER_TAG, "")

    @property
    def serving_spec(self) -> str:
        """The spec to serve: by alias, so that the service follows promotions; by number if it has no alias."""
        return f"models:/{self.name}@{self.alias}" if self.alias else self.uri

    @property
    def alias(self) -> str:
        """`champion` or `challenger`; empty if it is neither."""
        return next((alias for alias in (CHAMPION, CHALLENGER) if alias in self.aliases), "")


DATABASE = Path(".cappy/mlflow.db")
CHECK_TIMEOUT_SECONDS = 4.0
_SQLITE = "sqlite:///"
_DATABASE_REMEDY = "choose a writable file with --tracking-uri or MLFLOW_TRACKING_URI"


def tracking_address(uri: str = "") -> str:
    """The MLflow address to use: `uri`, else MLFLOW_TRACKING_URI, else the database in `.cappy`.

    Its secrets are redacted in all messages from now on.
    """
    address = (uri or os.environ.get("MLFLOW_TRACKING_URI", "")).strip() or f"{_SQLITE}{DATABASE.absolute()}"
    if address.startswith("postgresql://") and importlib.util.find_spec("psycopg") is None:
        # SQLAlchemy's default driver; the extra `registry` has the older one.
        address = address.replace("postgresql://", "postgresql+psycopg2://", 1)
    register_address(address)
    return address


def database(uri: str) -> Path | None:
    """The file of a SQLite address; None for any other address."""
    address = tracking_address(uri)
    return Path(address.removeprefix(_SQLITE)) if address.startswith(_SQLITE) else None


def no_database_yet(uri: str = "") -> bool:
    """Whether the address is a SQLite file that is missing or empty."""
    path = database(uri)
    return path is not None and not (path.exists() and path.stat().st_size)


def artifact_root(uri: str) -> str | None:
    """Artifact location of a new experiment: next to the SQLite file, or None if the server decides."""
    path = database(uri)
    return None if path is None else (path.absolute().parent / "mlartifacts").as_uri()


def check_writable(address: str, path: Path) -> None:
    """Checks that the SQLite file can be written; of a missing one, which is not created, only the folder.

    Raises UnreachableError if not.
    """
    if path.exists():
        check_database(address, path)
        return
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        problem = f"MLflow's database cannot be created ({folder} is not a folder that this user may write to)"
        raise UnreachableError(f"{redact_address(address)}: {problem}; {_DATABASE_REMEDY}")


def check_database(address: str, path: Path) -> None:
    """Checks that the SQLite file can be opened and written, and creates it. Raises UnreachableError if not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=CHECK_TIMEOUT_SECONDS)
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()
        finally:
            connection.close()
    except (OSError, sqlite3.Error) as error:
        raise UnreachableError(
            f"{redact_address(address)}: MLflow's database cannot be opened ({error}); {_DATABASE_REMEDY}"
        ) from error
