"""The registry: what was run, which scorers there are, which of them is served. MLflow loads with the first call."""

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
    """The champion of a registered model, or None; without a database yet, MLflow is not even imported."""
    from cappy.registry.models import no_database_yet

    if no_database_yet(tracking_uri):
        return None
    from cappy.registry import versions

    return versions.champion(name, tracking_uri=tracking_uri)


def download(spec: str, *, tracking_uri: str = "", cache: Path = MODELS) -> Path:
    """The local folder of a registered scorer, every file's sha256 checked; downloaded once per content."""
    from cappy.registry import versions

    return versions.download(spec, tracking_uri=tracking_uri, cache=cache)


def rollback(name: str, *, why: str = "", tracking_uri: str = "") -> "Move":
    """Gives the champion's alias back to its predecessor, or to none; RegistryError without a champion."""
    from cappy.registry import aliases

    return aliases.rollback(name, why=why, tracking_uri=tracking_uri)


def history(name: str, *, tracking_uri: str = "") -> list["Move"]:
    """Every move of the champion's alias, the first one first; RegistryError where there is no such model."""
    from cappy.registry import aliases

    return aliases.history(name, tracking_uri=tracking_uri)


def track_run(fingerprints: Mapping[str, str], settings: str = "", *, run: str, state: str = "SUCCEEDED") -> None:
    """Tells MLflow what every step of a pipeline run did; a RegistryError ends the process with its one line."""
    from cappy.registry import tracking

    tracking.track_run(fingerprints, settings, run=run, state=state)


def attach(
    texts: Mapping[str, str], *, run: str, tracking_uri: str = "", facts: Mapping[str, str] | None = None
) -> None:
    """Keeps these texts (file name -> text) as artifacts of a pipeline run's MLflow run, and the facts as its tags."""
    from cappy.registry import tracking

    tracking.attach(texts, run=run, tracking_uri=tracking_uri, facts=facts or {})
