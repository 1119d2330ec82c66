"""Routes that describe and change the served model.

GET /model describes the loaded models; POST /admin/refresh and /admin/rollback need a key. POST /webhooks/mlflow
receives MLflow's signed events. An event only makes the service check its own alias; the service never fetches what a
request names. The signature is that of MLflow 3: HMAC-SHA256 of delivery id, timestamp and body, as base64 after "v1,".
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
from serving.bodies import Bounds, Refusal, receive_body
from serving.dialects.native import NativeErrorResponse, error_body
from serving.engine import Model, Models
from serving.following import Follower
from serving.guards import MIN_SECRET_CHARACTERS, Keys, unknown_key_refusal

WEBHOOK_VARIABLE = "CAPPY_WEBHOOK_SECRET"
DELIVERY_ID_HEADER = "x-mlflow-delivery-id"
TIMESTAMP_HEADER = "x-mlflow-timestamp"
SIGNATURE_HEADER = "x-mlflow-signature"
ALIAS_ENTITY = "model_version_alias"
MAX_DELIVERY_AGE_SECONDS = 300
"""Maximum difference between a delivery's timestamp and our clock; protects against replays."""
MAX_WEBHOOK_BYTES = 65_536
_UNAUTHORIZED: dict[int | str, dict[str, object]] = {401: {"model": NativeErrorResponse}}


class LoadedModel(BaseModel):
    """A loaded model."""

    name: str
    version: Annotated[str, Field(description="First 12 hexadecimal digits of the manifest's hash")]
    sha256: Annotated[str, Field(description="Hash of the manifest, which contains the hash of every file")]
    registered: Annotated[str, Field(description="models:/name/number in the registry; empty if not from the registry")]
    precision: str


class ModelState(BaseModel):
    """The current and the former model, the followed alias and refused versions."""

    current: LoadedModel
    former: Annotated[
        LoadedModel | None, Field(description="The previous model, which stays loaded for a rollback")
    ] = None
    follows: Annotated[str, Field(description="The followed alias; empty if none is followed")] = ""
    trouble: Annotated[str, Field(description="Why the last check could not read the alias; empty if it could")] = ""
    refused: Annotated[dict[str, str], Field(description="Version in the registry -> why it was refused")]


class RefreshResponse(BaseModel):
    """Response to a request to check the alias."""

    looks: Annotated[
        bool,
        Field(description="Whether the alias is checked now (not if an event is about another); see GET /model"),
    ]


def add_admin(app: FastAPI, models: Models, follower: Follower | None, keys: Keys, secret: str) -> None:
    """Adds GET /model; if an alias is followed, also POST /admin/refresh and /admin/rollback if there are keys.

    With a secret it also adds POST /webhooks/mlflow.
    """

    @app.get("/model", tags=["model"], responses=_UNAUTHORIZED, response_model=ModelState)
    async def model(request: Request) -> Response | ModelState:
        """The loaded models; needs a key if the service has keys."""
        return _state(models, follower) if keys.allow(request.headers) else _refusal_response(unknown_key_refusal())

    if follower is not None and keys:
        _add_model_changes(app, models, follower, keys)
    if follower is not None and secret:
        _add_webhook(app, follower, secret)


def _add_model_changes(app: FastAPI, models: Models, follower: Follower, keys: Keys) -> None:
    @app.post(
        "/admin/refresh", tags=["model"], status_code=202, responses=_UNAUTHORIZED, response_model=RefreshResponse
    )
    async def refresh(request: Request) -> Response | RefreshResponse:
        """Checks the alias now, and tries refused versions again."""
        if not keys.allow(request.headers):
            return _refusal_response(unknown_key_refusal())
        follower.request_check(retry_refused=True)
        return RefreshResponse(looks=True)

    @app.post(
        "/admin/rollback",
        tags=["model"],
        responses={**_UNAUTHORIZED, 409: {"model": NativeErrorResponse}},
        response_model=ModelState,
    )
    async def rollback(request: Request) -> Response | ModelState:
        """Returns to the former model until the alias moves."""
        if not keys.allow(request.headers):
            return _refusal_response(unknown_key_refusal())
        if follower.rollback() is None:
            return _refusal_response(
                Refusal(409, "no former model is loaded; to move the alias instead: cappy promotion --rollback")
            )
        return _state(models, follower)


def _add_webhook(app: FastAPI, follower: Follower, secret: str) -> None:
    @app.post(
        "/webhooks/mlflow", tags=["model"], status_code=202, responses=_UNAUTHORIZED, response_model=RefreshResponse
    )
    async def webhook(request: Request) -> Response | RefreshResponse:
        """Receives a signed event of MLflow; checks the alias now if the event is about it."""
        try:
            body = await receive_body(request, MAX_WEBHOOK_BYTES, "MLflow's events are smaller")
            Bounds().check(body)
        except Refusal as refusal:
            return _refusal_response(refusal)
        if not _is_signed(secret, request.headers, body, time.time()):
            return _refusal_response(
                Refusal(401, "the signature does not match this service's secret, or its timestamp is too old")
            )
        is_relevant = _is_about(follower.alias, body)
        if is_relevant:
            follower.request_check()
        return RefreshResponse(looks=is_relevant)


def _state(models: Models, follower: Follower | None) -> ModelState:
    return ModelState(
        current=_describe(models.current),
        former=_describe(models.former) if models.former else None,
        follows=follower.alias if follower else "",
        trouble=follower.alias_error if follower else "",
        refused=dict(models.refused),
    )


def _describe(model: Model) -> LoadedModel:
    return LoadedModel(
        name=model.name,
        version=model.version,
        sha256=model.sha256,
        registered=model.registered.uri if model.registered else "",
        precision=model.precision,
    )


def _refusal_response(refusal: Refusal) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
    return JSONResponse(error_body(refusal.status, refusal.message), status_code=refusal.status, headers=headers)


def read_secret() -> str:
    """Reads the secret from CAPPY_WEBHOOK_SECRET, empty if it is not set; raises ConfigError for a short one."""
    secret = os.environ.get(WEBHOOK_VARIABLE, "").strip()
    if secret and len(secret) < MIN_SECRET_CHARACTERS:
        remedy = "make one with: openssl rand -hex 24"
        raise ConfigError(f"{WEBHOOK_VARIABLE}: is shorter than {MIN_SECRET_CHARACTERS} characters; {remedy}")
    return secret


def _is_signed(secret: str, headers: Mapping[str, str], body: bytes, now: float) -> bool:
    """Whether the signature is valid and its timestamp within five minutes of `now` (seconds since 1970)."""
    delivery_id, timestamp, signature = (
        headers.get(name, "") for name in (DELIVERY_ID_HEADER, TIMESTAMP_HEADER, SIGNATURE_HEADER)
    )
    if (
        not timestamp.isascii()
        or not timestamp.isdigit()
        or len(timestamp) > 12
        or abs(now - int(timestamp)) > MAX_DELIVERY_AGE_SECONDS
    ):
        return False
    content = f"{delivery_id}.{timestamp}.".encode("utf-8", "surrogatepass") + body
    digest = hmac.new(secret.encode(), content, hashlib.sha256).digest()
    expected = f"v1,{base64.b64encode(digest).decode()}"
    return hmac.compare_digest(signature.encode("utf-8", "surrogatepass"), expected.encode())


def _is_about(alias: str, body: bytes) -> bool:
    """Whether an event reports that the alias of this spec was set or deleted."""
    try:
        event = from_json(body)
    except ValueError:
        return False
    if not isinstance(event, Mapping) or event.get("entity") != ALIAS_ENTITY:
        return False
    data, spec = event.get("data"), parse_spec(alias)
    return isinstance(data, Mapping) and (data.get("name"), data.get("alias")) == (spec.name, spec.revision)
