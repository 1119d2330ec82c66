"""Moves of the champion alias: one at a time, each recorded with user, time and reason."""

import contextlib
import getpass
import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from cappy.errors import RegistryError, quote
from cappy.registry.client import MlflowClient, MlflowException, connect
from cappy.registry.models import CHALLENGER, CHAMPION, FORMER_TAG, Version
from cappy.registry.versions import describe_available, find, same_scorer

HISTORY_TAG = "cappy.history."
LOCK = ".alias-is-moving"
OWNER_TAG = "cappy.owner"
LOCK_SECONDS = 120.0
"""Age above which a lock counts as left by a process that died: a move takes about a second."""
WAIT_SECONDS = 30.0
"""Maximum wait for a lock that another process holds."""


@dataclass(frozen=True, kw_only=True)
class Move:
    """One move of the champion alias from version `former` to `version`; 0 means no version.

    `at` is the time in ISO 8601 (UTC), `by` the user, `why` the reason.
    """

    at: str
    kind: Literal["promotion", "rollback"]
    version: int
    former: int
    by: str
    why: str


@contextlib.contextmanager
def lock_alias(client: MlflowClient, name: str) -> Iterator[None]:
    """Locks the aliases of a model for all machines that use the registry.

    MLflow has no locks, but only one of two processes can register a model of the same name. Such a model is the lock,
    with its owner in a tag, so that a process whose lock expired does not release the lock of another one. Raises
    RegistryError if another process still holds the lock after `WAIT_SECONDS`.
    """
    lock, owner, deadline = f"{name}{LOCK}", uuid.uuid4().hex, time.monotonic() + WAIT_SECONDS
    while not _acquire_lock(client, lock, owner):
        if time.monotonic() > deadline:
            raise RegistryError(
                f"models:/{name}@{CHAMPION}: another promotion or rollback is in progress; run again when it is done"
            )
        time.sleep(0.2)
    try:
        yield
    finally:
        _release_lock(client, lock, owner)


def promote(client: MlflowClient, version: Version, why: str) -> None:
    """Moves the champion alias to a version and records the previous champion for a rollback."""
    former = find(client, version.name, CHAMPION)
    if former is None or former.number != version.number:
        if former is not None:
            client.set_model_version_tag(version.name, str(version.number), FORMER_TAG, str(former.number))
        _move(client, version.name, version, former, "promotion", why)
    challenger = find(client, version.name, CHALLENGER)
    if challenger is not None and challenger.number == version.number:
        client.delete_registered_model_alias(version.name, CHALLENGER)


def rollback(name: str, *, why: str, tracking_uri: str) -> Move:
    """Moves the champion alias back to the previous champion, or removes it if there was none.

    Raises RegistryError if there is no champion. The champion is read after the lock is acquired, because another
    process may change it before.
    """
    with connect(tracking_uri) as client, lock_alias(client, name):
        current = find(client, name, CHAMPION)
        if current is None:
            available = describe_available(client, name)
            raise RegistryError(f"models:/{name}: has no champion, so there is nothing to roll back ({available})")
        former = find(client, name, current.former) if current.former else None
        if former is not None and former.number == current.number:
            former = None
        return _move(client, name, former, current, "rollback", why)


def was_rolled_back(client: MlflowClient, version: Version) -> bool:
    """Whether the version lost the champion alias by a rollback and has not become champion again.

    Another version of the same scorer, with another selector, counts too: a rerun must not bring back what was rolled
    back.
    """
    moves = _moves(client, version.name)
    return any(is_rolled_back(number, moves) for number in (version.number, *same_scorer(client, version)))


def is_rolled_back(number: int, moves: Sequence[Move]) -> bool:
    """Whether the last move that brought or took the alias from this version was a rollback away from it.

    A promotion of the next version takes the alias too, but says nothing against this one.
    """
    own = [move for move in moves if move.version == number or (move.former == number and move.kind == "rollback")]
    return bool(own) and own[-1].version != number


def history(name: str, *, tracking_uri: str) -> list[Move]:
    """Every move of the champion alias, oldest first. Raises RegistryError if there is no such model."""
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
    """Parses the move in a tag, which anyone with access to the registry may have written."""
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
    """Records the move, then sets the alias, or deletes it if `version` is None; the caller holds the lock."""
    move = Move(
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        kind=kind,
        version=version.number if version else 0,
        former=former.number if former else 0,
        by=_current_user(),
        why=why,
    )
    num_moves = sum(key.startswith(HISTORY_TAG) for key in client.get_registered_model(name).tags)
    # History first: if the process dies in between, the entry is repeated by the next attempt instead of being lost.
    client.set_registered_model_tag(name, f"{HISTORY_TAG}{num_moves:05d}", json.dumps(asdict(move)))
    if version is None:
        client.delete_registered_model_alias(name, CHAMPION)
    else:
        client.set_registered_model_alias(name, CHAMPION, str(version.number))
    return move


def _current_user() -> str:
    """The MLflow user, else the system user, else the user id, for containers without user names."""
    try:
        return os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def _acquire_lock(client: MlflowClient, lock: str, owner: str) -> bool:
    """Tries to acquire the lock and returns whether it succeeded; removes an expired lock."""
    description = "Lock: an alias is being moved; removed within seconds."
    try:
        client.create_registered_model(lock, tags={OWNER_TAG: owner}, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    else:
        return True
    with contextlib.suppress(MlflowException):
        model = client.get_registered_model(lock)
        if time.time() - model.creation_timestamp / 1000 > LOCK_SECONDS:
            _release_lock(client, lock, model.tags.get(OWNER_TAG, ""))
    return False


def _release_lock(client: MlflowClient, lock: str, owner: str) -> None:
    """Removes the lock if this owner holds it; a missing lock is not an error."""
    try:
        if client.get_registered_model(lock).tags.get(OWNER_TAG, "") == owner:
            client.delete_registered_model(lock)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
