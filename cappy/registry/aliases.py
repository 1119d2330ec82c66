"""The champion's alias: moved by one at a time, each move kept with who, when and why."""

import contextlib
import getpass
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from cappy.errors import RegistryError
from cappy.registry.client import MlflowException, connected
from cappy.registry.models import CHALLENGER, CHAMPION, FORMER_TAG, Version
from cappy.registry.versions import find, known

HISTORY_TAG = "cappy.history."
LOCK = ".alias-is-moving"
LOCK_SECONDS = 120.0
"""A lock older than this was left by a process that died: a move takes about a second."""
WAIT_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Move:
    """One move of the champion's alias: to `version`, from `former` (0 where there was none)."""

    at: str
    kind: Literal["promotion", "rollback"]
    version: int
    former: int
    by: str
    why: str


@contextlib.contextmanager
def alone(client: Any, name: str) -> Iterator[None]:
    """One process at a time, on every machine that uses the registry; RegistryError where another does not finish.

    MLflow has no lock, but of two that register a model of one name it lets one win: that name is the lock.
    """
    lock, deadline = f"{name}{LOCK}", time.monotonic() + WAIT_SECONDS
    while not _taken(client, lock):
        if time.monotonic() > deadline:
            raise RegistryError(
                f"models:/{name}@{CHAMPION}: another promotion or rollback is at work; run again when it is done"
            )
        time.sleep(0.2)
    try:
        yield
    finally:
        client.delete_registered_model(lock)


def promote(client: Any, version: Version, why: str) -> None:
    """Gives a version the champion's alias and notes its predecessor, so that it can be undone."""
    former = find(client, version.name, CHAMPION)
    if former is not None and former.number != version.number:
        client.set_model_version_tag(version.name, str(version.number), FORMER_TAG, str(former.number))
    _move(client, version, former, "promotion", why)
    challenger = find(client, version.name, CHALLENGER)
    if challenger is not None and challenger.number == version.number:
        client.delete_registered_model_alias(version.name, CHALLENGER)


def rollback(name: str, *, why: str, tracking_uri: str) -> Version:
    """Gives the champion's alias back to its predecessor; RegistryError without champion or predecessor."""
    with connected(tracking_uri) as client, alone(client, name):
        present = find(client, name, CHAMPION)
        if present is None:
            raise RegistryError(f"models:/{name}@{CHAMPION}: {known(client, name)}")
        former = find(client, name, present.former) if present.former else None
        if former is None:
            raise RegistryError(f"{present.uri}: had no champion before it, so there is nothing to roll back to")
        _move(client, former, present, "rollback", why)
        return find(client, name, str(former.number)) or former


def history(name: str, *, tracking_uri: str) -> list[Move]:
    """Every move of the champion's alias, the first one first; RegistryError where there is no such model."""
    with connected(tracking_uri) as client:
        try:
            tags = client.get_registered_model(name).tags
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise RegistryError(f"models:/{name}: {known(client, name)}") from error
            raise
    return [Move(**json.loads(tags[key])) for key in sorted(tags) if key.startswith(HISTORY_TAG)]


def _move(
    client: Any, version: Version, former: Version | None, kind: Literal["promotion", "rollback"], why: str
) -> None:
    """Keeps the move, then sets the alias; whoever calls holds the lock."""
    if former is not None and former.number == version.number:
        return
    move = Move(
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        kind=kind,
        version=version.number,
        former=former.number if former else 0,
        by=_who(),
        why=why,
    )
    kept = sum(key.startswith(HISTORY_TAG) for key in client.get_registered_model(version.name).tags)
    # First the history: a process that dies between the two leaves an entry without a move, which the next try repeats.
    client.set_registered_model_tag(version.name, f"{HISTORY_TAG}{kept:05d}", json.dumps(asdict(move)))
    client.set_registered_model_alias(version.name, CHAMPION, str(version.number))


def _who() -> str:
    """MLflow's user, else the system's; in a container its number may be all there is."""
    try:
        return os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def _taken(client: Any, lock: str) -> bool:
    """Whether the lock is ours now; one that a dead process left is removed."""
    try:
        client.create_registered_model(lock, description="A move of an alias is under way; gone in a second.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    else:
        return True
    with contextlib.suppress(MlflowException):
        age = time.time() - client.get_registered_model(lock).creation_timestamp / 1000
        if age > LOCK_SECONDS:
            client.delete_registered_model(lock)
    return False
