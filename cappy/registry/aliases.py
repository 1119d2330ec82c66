"""The champion's alias: moved by one at a time, each move kept with who, when and why."""

import contextlib
import getpass
import json
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from cappy.errors import RegistryError, quote
from cappy.registry.client import MlflowClient, MlflowException, connect
from cappy.registry.models import CHALLENGER, CHAMPION, FORMER_TAG, Version
from cappy.registry.versions import find, describe_available

HISTORY_TAG = "cappy.history."
LOCK = ".alias-is-moving"
OWNER_TAG = "cappy.owner"
LOCK_SECONDS = 120.0
"""A lock older than this was left by a process that died: a move takes about a second."""
WAIT_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Move:
    """One move of the champion's alias: to `version`, from `former` (0 for none, on either side)."""

    at: str
    kind: Literal["promotion", "rollback"]
    version: int
    former: int
    by: str
    why: str


@contextlib.contextmanager
def lock_alias(client: MlflowClient, name: str) -> Iterator[None]:
    """One process at a time, on every machine that uses the registry; RegistryError where another does not finish.

    MLflow has no lock, but of two that register a model of one name it lets one win: that name is the lock, and a tag
    says whose it is. Whoever took so long that its lock was removed leaves the next one's alone.
    """
    lock, owner, deadline = f"{name}{LOCK}", uuid.uuid4().hex, time.monotonic() + WAIT_SECONDS
    while not _acquire_lock(client, lock, owner):
        if time.monotonic() > deadline:
            raise RegistryError(
                f"models:/{name}@{CHAMPION}: another promotion or rollback is at work; run again when it is done"
            )
        time.sleep(0.2)
    try:
        yield
    finally:
        _release_lock(client, lock, owner)


def promote(client: MlflowClient, version: Version, why: str) -> None:
    """Gives a version the champion's alias and notes its predecessor, so that it can be undone."""
    former = find(client, version.name, CHAMPION)
    if former is None or former.number != version.number:
        if former is not None:
            client.set_model_version_tag(version.name, str(version.number), FORMER_TAG, str(former.number))
        _move(client, version.name, version, former, "promotion", why)
    challenger = find(client, version.name, CHALLENGER)
    if challenger is not None and challenger.number == version.number:
        client.delete_registered_model_alias(version.name, CHALLENGER)


def rollback(name: str, *, why: str, tracking_uri: str) -> Move:
    """Gives the champion's alias back to its predecessor, or takes it away where there was none; RegistryError without
    a champion.

    The move says which version had the alias when the lock was taken: one read before may have lost it meanwhile.
    """
    with connect(tracking_uri) as client, lock_alias(client, name):
        present = find(client, name, CHAMPION)
        if present is None:
            raise RegistryError(
                f"models:/{name}: has no champion, so there is nothing to roll back ({describe_available(client, name)})"
            )
        former = find(client, name, present.former) if present.former else None
        if former is not None and former.number == present.number:
            former = None
        return _move(client, name, former, present, "rollback", why)


def was_rolled_back(client: MlflowClient, version: Version) -> bool:
    """Whether the last move that the version had a part in took the champion's alias from it by a rollback."""
    own = [move for move in _moves(client, version.name) if version.number in (move.version, move.former)]
    lost = [move for move in own if not (move.kind == "promotion" and move.former == version.number)]
    return bool(lost) and lost[-1].kind == "rollback" and lost[-1].former == version.number


def history(name: str, *, tracking_uri: str) -> list[Move]:
    """Every move of the champion's alias, the first one first; RegistryError where there is no such model."""
    with connect(tracking_uri) as client:
        return _moves(client, name)


def _moves(client: MlflowClient, name: str) -> list[Move]:
    try:
        tags = client.get_registered_model(name).tags
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise RegistryError(f"models:/{name}: {describe_available(client, name)}") from error
        raise
    return [_read_move(name, key, tags[key]) for key in sorted(tags) if key.startswith(HISTORY_TAG)]


def _read_move(name: str, key: str, text: str) -> Move:
    """The move in a tag, which anyone with rights to the registry may have written."""
    try:
        return TypeAdapter(Move).validate_json(text, strict=True)
    except ValidationError as error:
        remedy = "delete the tag in MLflow"
        raise RegistryError(f"models:/{name}: its tag {quote(key, 60)} is not a move of an alias; {remedy}") from error


def _move(
    client: MlflowClient,
    name: str,
    version: Version | None,
    former: Version | None,
    kind: Literal["promotion", "rollback"],
    why: str,
) -> Move:
    """Keeps the move, then sets the alias, or deletes it for no version; whoever calls holds the lock."""
    move = Move(
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        kind=kind,
        version=version.number if version else 0,
        former=former.number if former else 0,
        by=_current_user(),
        why=why,
    )
    kept = sum(key.startswith(HISTORY_TAG) for key in client.get_registered_model(name).tags)
    # First the history: a process that dies between the two leaves an entry without a move, which the next try repeats.
    client.set_registered_model_tag(name, f"{HISTORY_TAG}{kept:05d}", json.dumps(asdict(move)))
    if version is None:
        client.delete_registered_model_alias(name, CHAMPION)
    else:
        client.set_registered_model_alias(name, CHAMPION, str(version.number))
    return move


def _current_user() -> str:
    """MLflow's user, else the system's; in a container its number may be all there is."""
    try:
        return os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def _acquire_lock(client: MlflowClient, lock: str, owner: str) -> bool:
    """Whether the lock is ours now; one that a dead process left is removed."""
    description = "A move of an alias is under way; gone in a second."
    try:
        client.create_registered_model(lock, tags={OWNER_TAG: owner}, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    else:
        return True
    with contextlib.suppress(MlflowException):
        held = client.get_registered_model(lock)
        if time.time() - held.creation_timestamp / 1000 > LOCK_SECONDS:
            _release_lock(client, lock, held.tags.get(OWNER_TAG, ""))
    return False


def _release_lock(client: MlflowClient, lock: str, owner: str) -> None:
    """Takes the lock of this owner away; another's stays, and one that is gone is not an error."""
    try:
        if client.get_registered_model(lock).tags.get(OWNER_TAG, "") == owner:
            client.delete_registered_model(lock)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
