"""The registry of runs, registered scorers and their aliases in MLflow; the first call imports MLflow."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cappy.registry.models import Version
from cappy.runs import tune_garbage_collector

if TYPE_CHECKING:
    from cappy.registry.aliases import Move

__all__ = ["Version", "attach", "champion", "check_tracking", "download", "history", "resolve", "rollback", "track_run"]

MODELS = Path(".cappy/models")
"""Default folder of downloaded scorers."""


def resolve(spec: str, *, tracking_uri: str = "") -> Version:
    """The version that `models:/name@alias` or `models:/name/number` names. Raises RegistryError if there is none."""
    from cappy.registry import versions

    return versions.resolve(spec, tracking_uri=tracking_uri)


def champion(name: str, *, tracking_uri: str = "") -> Version | None:
    """The champion of a registered model, or None; does not import MLflow if there is no database yet."""
    from cappy.registry.models import no_database_yet

    if no_database_yet(tracking_uri):
        return None
    from cappy.registry import versions

    return versions.champion(name, tracking_uri=tracking_uri)


def download(spec: str, *, tracking_uri: str = "", cache: Path = MODELS) -> Path:
    """Downloads a registered scorer to `cache`, unless it is there, and returns its folder.

    The sha256 of every file is checked. Raises RegistryError if there is no such version, if its files differ from what
    was registered, or if MLflow does not answer.
    """
    from cappy.registry import versions

    return versions.download(spec, tracking_uri=tracking_uri, cache=cache)


def rollback(name: str, *, why: str = "", tracking_uri: str = "") -> "Move":
    """Moves the champion alias back to the previous champion, or removes it if there was none.

    Raises RegistryError if the model has no champion.
    """
    from cappy.registry import aliases

    return aliases.rollback(name, why=why, tracking_uri=tracking_uri)


def history(name: str, *, tracking_uri: str = "") -> list["Move"]:
    """Every move of the champion alias, oldest first. Raises RegistryError if there is no such model."""
    from cappy.registry import aliases

    return aliases.history(name, tracking_uri=tracking_uri)


def check_tracking(tracking_uri: str = "") -> None:
    """Checks within seconds that MLflow answers and lets this user in, and creates nothing.

    Raises UnreachableError, with the remedy, if not.
    """
    from cappy.registry import models

    address = models.tracking_address(tracking_uri)
    if (path := models.database(address)) is not None:
        models.check_writable(address, path)
        return
    from cappy.registry.client import connect

    with connect(address):
        pass


def track_run(
    fingerprints: Mapping[str, str], settings: str = "", *, run: str, state: str = "SUCCEEDED", created: str = ""
) -> None:
    """Logs every step of a pipeline run to MLflow; a CappyError ends the process with one line on stderr.

    `fingerprints` maps each step to the fingerprint of its work. `settings` is a string returned by
    `cappy.config.encode`. `run` is the id of the pipeline run, `state` its final state. `created` (ISO 8601) is
    when it was created: of the steps that do not know their run, those that started later belong to it.
    """
    tune_garbage_collector()
    from cappy.registry import tracking

    tracking.track_run(fingerprints, settings, run=run, state=state, created=created)


def attach(
    texts: Mapping[str, str], *, run: str, tracking_uri: str = "", facts: Mapping[str, str] | None = None
) -> None:
    """Logs texts (file name -> text) as artifacts, and facts as tags, to the MLflow run of the pipeline run `run`."""
    from cappy.registry import tracking

    tracking.attach(texts, run=run, tracking_uri=tracking_uri, facts=facts or {})
