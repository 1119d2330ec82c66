"""Which model answers, for all to see; and, for who has a key, another look at the alias and the way back."""

import time
from typing import Annotated

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from serving.bodies import Bounds, received
from serving.dialects.own import Problem, refuse
from serving.following import Follower
from serving.keys import Keys, unknown
from serving.models import Model, Models
from serving.refusals import Refusal
from serving.webhook import about, signed

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
        return _state(models, follower) if keys.allow(request.headers) else _told(unknown())

    if follower is not None and keys:
        _add_moves(app, models, follower, keys)
    if follower is not None and secret:
        _add_webhook(app, follower, secret)


def _add_moves(app: FastAPI, models: Models, follower: Follower, keys: Keys) -> None:
    @app.post("/admin/refresh", tags=["model"], status_code=202, responses=_REFUSED, response_model=Asked)
    async def refresh(request: Request) -> Response | Asked:
        """Looks at the alias now, at versions that were refused too."""
        if not keys.allow(request.headers):
            return _told(unknown())
        follower.ask(again=True)
        return Asked(looks=True)

    @app.post("/admin/rollback", tags=["model"], responses={**_REFUSED, 409: {"model": Problem}}, response_model=State)
    async def rollback(request: Request) -> Response | State:
        """Changes the model for the one before, until the alias moves."""
        if not keys.allow(request.headers):
            return _told(unknown())
        if follower.rollback() is None:
            return _told(Refusal(409, "no former model is loaded; move the alias: cappy promotion --rollback"))
        return _state(models, follower)


def _add_webhook(app: FastAPI, follower: Follower, secret: str) -> None:
    @app.post("/webhooks/mlflow", tags=["model"], status_code=202, responses=_REFUSED, response_model=Asked)
    async def webhook(request: Request) -> Response | Asked:
        """An event of MLflow's, signed with the secret: looks at the alias now if it is about the alias."""
        try:
            body = await received(request, WEBHOOK_BYTES, "no event of MLflow is as large")
            Bounds().check(body)
        except Refusal as refusal:
            return _told(refusal)
        if not signed(secret, request.headers, body, time.time()):
            return _told(Refusal(401, "the signature is not that of this service's secret, or is too old"))
        looks = about(follower.alias, body)
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


def _told(refusal: Refusal) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
    return JSONResponse(refuse(refusal.status, refusal.message), status_code=refusal.status, headers=headers)
