"""Which model answers; with a key another look at the alias and the way back; and the webhooks of MLflow.

A webhook, a signed request, says that an alias moved: the service looks at its own alias, and nothing that a request
names is ever fetched. The signature is that of MLflow 3: HMAC-SHA256 over the delivery's id, its time and its body, in
base64 behind "v1,".
"""

import base64
import hashlib
import hmac
import os
import time
from collections.abc import Mapping
from typing import Annotated

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from pydantic_core import from_json

from cappy.errors import ConfigError
from cappy.specs import parse_spec
from serving.bodies import Bounds, received
from serving.dialects.own import Problem, refuse
from serving.engine import Model, Models
from serving.following import Follower
from serving.guards import SHORTEST_SECRET, Keys, unknown_key
from serving.refusals import Refusal

WEBHOOK_VARIABLE = "CAPPY_WEBHOOK_SECRET"
ID, TIMESTAMP, SIGNATURE = "x-mlflow-delivery-id", "x-mlflow-timestamp", "x-mlflow-signature"
ENTITY = "model_version_alias"
FRESH_SECONDS = 300
"""How far a delivery's time may be from ours; older ones are somebody's replay."""
WEBHOOK_BYTES = 65_536
_REFUSED: dict[int | str, dict[str, object]] = {401: {"model": Problem}}


class Loaded(BaseModel):
    """A model that is loaded."""

    name: str
    version: Annotated[str, Field(description="12 hexadecimal digits of its manifest's hash")]
    sha256: Annotated[str, Field(description="Hash of its manifest, and through it of every file")]
    registered: Annotated[str, Field(description="models:/name/number in the registry, empty if it came elsewhere")]
    precision: str


class State(BaseModel):
    """What answers, what could answer at once, and what may not."""

    current: Loaded
    former: Annotated[Loaded | None, Field(description="Stays loaded, for a rollback")] = None
    follows: Annotated[str, Field(description="The alias that is followed, empty if none is")] = ""
    trouble: Annotated[str, Field(description="Why the alias could not be read at the last look")] = ""
    refused: Annotated[dict[str, str], Field(description="Version of the registry -> why it does not serve")]


class Asked(BaseModel):
    """What was done with a request to look at the alias."""

    looks: Annotated[bool, Field(description="Whether the alias is looked at now; GET /model shows what came of it")]


def add_admin(app: FastAPI, models: Models, follower: Follower | None, keys: Keys, secret: str) -> None:
    """GET /model; where an alias is followed POST /admin/refresh and /admin/rollback if there are keys.

    With a secret also POST /webhooks/mlflow.
    """

    @app.get("/model", tags=["model"], responses=_REFUSED, response_model=State)
    async def model(request: Request) -> Response | State:
        """Which model answers; needs a key where there are keys."""
        return _state(models, follower) if keys.allow(request.headers) else _refuse(unknown_key())

    if follower is not None and keys:
        _add_moves(app, models, follower, keys)
    if follower is not None and secret:
        _add_webhook(app, follower, secret)


def _add_moves(app: FastAPI, models: Models, follower: Follower, keys: Keys) -> None:
    @app.post("/admin/refresh", tags=["model"], status_code=202, responses=_REFUSED, response_model=Asked)
    async def refresh(request: Request) -> Response | Asked:
        """Looks at the alias now, at versions that were refused too."""
        if not keys.allow(request.headers):
            return _refuse(unknown_key())
        follower.ask(again=True)
        return Asked(looks=True)

    @app.post("/admin/rollback", tags=["model"], responses={**_REFUSED, 409: {"model": Problem}}, response_model=State)
    async def rollback(request: Request) -> Response | State:
        """Changes the model for the one before, until the alias moves."""
        if not keys.allow(request.headers):
            return _refuse(unknown_key())
        if follower.rollback() is None:
            return _refuse(Refusal(409, "no former model is loaded; move the alias: cappy promotion --rollback"))
        return _state(models, follower)


def _add_webhook(app: FastAPI, follower: Follower, secret: str) -> None:
    @app.post("/webhooks/mlflow", tags=["model"], status_code=202, responses=_REFUSED, response_model=Asked)
    async def webhook(request: Request) -> Response | Asked:
        """An event of MLflow's, signed with the secret: looks at the alias now if it is about the alias."""
        try:
            body = await received(request, WEBHOOK_BYTES, "no event of MLflow is as large")
            Bounds().check(body)
        except Refusal as refusal:
            return _refuse(refusal)
        if not _is_signed(secret, request.headers, body, time.time()):
            return _refuse(Refusal(401, "the signature is not that of this service's secret, or is too old"))
        looks = _is_about(follower.alias, body)
        if looks:
            follower.ask()
        return Asked(looks=looks)


def _state(models: Models, follower: Follower | None) -> State:
    return State(
        current=_loaded(models.current),
        former=_loaded(models.former) if models.former else None,
        follows=follower.alias if follower else "",
        trouble=follower.trouble if follower else "",
        refused=dict(models.refused),
    )


def _loaded(model: Model) -> Loaded:
    return Loaded(
        name=model.name,
        version=model.version,
        sha256=model.sha256,
        registered=model.registered.uri if model.registered else "",
        precision=model.precision,
    )


def _refuse(refusal: Refusal) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
    return JSONResponse(refuse(refusal.status, refusal.message), status_code=refusal.status, headers=headers)


def read_secret() -> str:
    """The secret from CAPPY_WEBHOOK_SECRET, empty if there is none; ConfigError for a short one."""
    secret = os.environ.get(WEBHOOK_VARIABLE, "").strip()
    if secret and len(secret) < SHORTEST_SECRET:
        remedy = "make one with: openssl rand -hex 24"
        raise ConfigError(f"{WEBHOOK_VARIABLE}: is shorter than {SHORTEST_SECRET} characters; {remedy}")
    return secret


def _is_signed(secret: str, headers: Mapping[str, str], body: bytes, now: float) -> bool:
    """Whether who knows the secret sent this body within five minutes of `now`, in seconds since 1970."""
    identity, time, given = (headers.get(name, "") for name in (ID, TIMESTAMP, SIGNATURE))
    if not time.isascii() or not time.isdigit() or len(time) > 12 or abs(now - int(time)) > FRESH_SECONDS:
        return False
    content = f"{identity}.{time}.".encode("utf-8", "surrogatepass") + body
    digest = hmac.new(secret.encode(), content, hashlib.sha256).digest()
    wanted = f"v1,{base64.b64encode(digest).decode()}"
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), wanted.encode())


def _is_about(alias: str, body: bytes) -> bool:
    """Whether an event says that the alias of this spec was set or deleted."""
    try:
        event = from_json(body)
    except ValueError:
        return False
    if not isinstance(event, Mapping) or event.get("entity") != ENTITY:
        return False
    data, spec = event.get("data"), parse_spec(alias)
    return isinstance(data, Mapping) and (data.get("name"), data.get("alias")) == (spec.name, spec.revision)
