"""The registry: runs, registered scorers and their aliases, in MLflow, which is imported by the first call."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cappy.registry.models import Version

if TYPE_CHECKING:
    from cappy.registry.aliases import Move

__all__ = ["Version", "attach", "champion", "download", "history", "resolve", "rollback", "track_run"]

MODELS = Path(".cappy/models")


def resolve(spec: str, *, tracking_uri: str = "") -> Version:
    """The version that `models:/name@alias` or `models:/name/number` names; RegistryError if there is none."""
    from cappy.registry import versions

    return versions.resolve(spec, tracking_uri=tracking_uri)


def champion(name: str, *, tracking_uri: str = "") -> Version | None:
    """The champion of a registered model, or None; MLflow is not imported if there is no database yet."""
    from cappy.registry.models import no_database_yet

    if no_database_yet(tracking_uri):
        return None
    from cappy.registry import versions

    return versions.champion(name, tracking_uri=tracking_uri)


def download(spec: str, *, tracking_uri: str = "", cache: Path = MODELS) -> Path:
    """The local folder of a registered scorer, every file's sha256 checked; downloaded once per content hash."""
    from cappy.registry import versions

    return versions.download(spec, tracking_uri=tracking_uri, cache=cache)


def rollback(name: str, *, why: str = "", tracking_uri: str = "") -> "Move":
    """Moves the champion alias back to the previous champion, or removes it; RegistryError without a champion."""
    from cappy.registry import aliases

    return aliases.rollback(name, why=why, tracking_uri=tracking_uri)


def history(name: str, *, tracking_uri: str = "") -> list["Move"]:
    """Every move of the champion alias, oldest first; RegistryError if there is no such model."""
    from cappy.registry import aliases

    return aliases.history(name, tracking_uri=tracking_uri)


def track_run(fingerprints: Mapping[str, str], settings: str = "", *, run: str, state: str = "SUCCEEDED") -> None:
    """Logs every step of a pipeline run to MLflow; a RegistryError ends the process with one line on stderr."""
    from cappy.registry import tracking

    tracking.track_run(fingerprints, settings, run=run, state=state)


def attach(
    texts: Mapping[str, str], *, run: str, tracking_uri: str = "", facts: Mapping[str, str] | None = None
) -> None:
    """Logs texts (file name -> text) as artifacts of the MLflow run of a pipeline run, and facts as its tags."""
    from cappy.registry import tracking

    tracking.attach(texts, run=run, tracking_uri=tracking_uri, facts=facts or {})
