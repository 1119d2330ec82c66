"""A new version without a restart: follows an alias of the registry, and the routes around that.

A new version is downloaded, verified, loaded and probed in a thread beside the model that answers, and put in its place
between two requests. One that cannot be had, loaded or that answers otherwise than it was evaluated never serves.

GET /model says which model answers; with a key there is another look at the alias and the way back. A webhook of
MLflow, a signed request, says that an alias moved: the service looks at its own alias, and nothing that a request names
is ever fetched. The signature is that of MLflow 3: HMAC-SHA256 over the delivery's id, its time and its body, in base64
behind "v1,".
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from pydantic_core import from_json

from cappy.errors import CappyError, ConfigError, UnreachableError, quote
from cappy.registry.models import Version
from cappy.scoring import Precision
from cappy.specs import parse_spec
from serving.bodies import Bounds, Refusal, receive_body
from serving.config import FOLLOW_SECONDS
from serving.dialects.own import Problem, refuse
from serving.engine import PROBES, Model, Models, load, probe
from serving.guards import MIN_SECRET_CHARACTERS, Keys, unknown_key_refusal

LOGGER = logging.getLogger("serving")
MAX_FETCH_ATTEMPTS = 3
"""How often a version is fetched whose files cannot be reached, before it is refused."""
SHUTDOWN_SECONDS = 5.0
"""How long a version that is being loaded may hold up the end of the process."""
Result = TypeVar("Result")
Change = Literal["swap", "refusal"]


@dataclass(kw_only=True)
class Follower:
    """Keeps `models` at what an alias names; `find` reads the alias, `load` makes a model of a version.

    `on_change` is called after each swap and each refusal. While the registry cannot be read, the model that answers
    goes on, and `trouble` says why.
    """

    models: Models
    alias: str
    read_alias: Callable[[], Version]
    load: Callable[[Version], Model]
    seconds: float = FOLLOW_SECONDS
    on_change: Callable[[Change], None] = lambda change: None
    trouble: str = ""
    _rolled_back_content: str = ""
    """Content that a rollback by hand took out of service: not taken again until the alias has named another."""
    _refused_content: dict[str, str] = field(default_factory=dict)
    """Version that was refused -> its content then."""
    _num_attempts: dict[str, int] = field(default_factory=dict)
    _check_requested: asyncio.Event = field(default_factory=asyncio.Event)
    _worker_done: "asyncio.Future[None] | None" = None

    async def run(self) -> None:
        """Looks at the alias every so many seconds and whenever asked, until it is cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.seconds):
                    await self._check_requested.wait()
            self._check_requested.clear()
            try:
                await self.check()
            except Exception as error:
                # A defect of ours: what answers goes on, and GET /model tells it until a look succeeds.
                LOGGER.exception("following %s failed", self.alias)
                self.trouble = format_error(error)

    def request_check(self, *, retry_refused: bool = False) -> None:
        """Has `run` look at once; `again` gives versions that were refused another chance."""
        if retry_refused:
            for records in (self._refused_content, self._num_attempts, self.models.refused):
                records.clear()
        self._check_requested.set()

    def rollback(self) -> Model | None:
        """Changes the model for the one before, which stays until the alias moves; None if there is none."""
        model = self.models.roll_back()
        if model is not None and self.models.former is not None:
            self._rolled_back_content = self.models.former.content
            self._report_swap("by hand")
        return model

    async def check(self) -> None:
        """Reads the alias once and does what follows from it."""
        version = await self._resolve_alias()
        if version is None or version.content == self._rolled_back_content:
            return
        self._rolled_back_content = ""
        current, former = self.models.current, self.models.former
        if version.content == current.content or self._refused_content.get(version.uri) == version.content:
            return
        if former is not None and version.content == former.content:
            self.models.roll_back()
            self._report_swap(f"{self.alias} names it again")
            return
        model = await self._prepare(version)
        if model is not None:
            await self._activate(version, model)

    async def close(self) -> None:
        """Waits a little for what is being loaded."""
        if self._worker_done is not None:
            await asyncio.wait([self._worker_done], timeout=SHUTDOWN_SECONDS)

    async def _resolve_alias(self) -> Version | None:
        """The version that the alias names; None, and one warning until it succeeds again, where that is not known."""
        try:
            version = await self._run_in_thread(self.read_alias)
        except Exception as error:  # noqa: BLE001 (whatever it is, the model that answers goes on)
            if not self.trouble:
                LOGGER.warning(
                    "%s cannot be read, version %s goes on: %s", self.alias, self._version, format_error(error)
                )
            self.trouble = format_error(error)
            return None
        if self.trouble:
            LOGGER.info("%s can be read again", self.alias)
        self.trouble = ""
        return version

    async def _prepare(self, version: Version) -> Model | None:
        """The version, loaded and probed; None where it may not serve, or not yet."""
        try:
            return await self._run_in_thread(lambda: prepare_model(version, self.load))
        except UnreachableError as error:
            attempt = self._num_attempts[version.uri] = self._num_attempts.get(version.uri, 0) + 1
            if attempt < MAX_FETCH_ATTEMPTS:
                LOGGER.warning(
                    "%s cannot be had, attempt %d of %d: %s",
                    version.uri,
                    attempt,
                    MAX_FETCH_ATTEMPTS,
                    format_error(error),
                )
                return None
            self._refuse(version, format_error(error))
        except Exception as error:  # noqa: BLE001 (a version may be bad in any way)
            self._refuse(version, format_error(error))
            traceback.clear_frames(error.__traceback__)  # they hold the model
        return None

    async def _activate(self, version: Version, model: Model) -> None:
        """Lets the model answer, unless the alias has moved on while it was loaded."""
        now = await self._resolve_alias()
        if now is not None and now.content != version.content:
            self._check_requested.set()
            return
        self.models.swap(model)
        for records in (self._refused_content, self._num_attempts, self.models.refused):
            records.pop(version.uri, None)
        self._report_swap(f"{self.alias} names it")

    def _report_swap(self, reason: str) -> None:
        former = self.models.former
        LOGGER.info("version %s answers instead of %s: %s", self._version, former and former.version, reason)
        self.on_change("swap")

    def _refuse(self, version: Version, reason: str) -> None:
        self._num_attempts.pop(version.uri, None)
        self._refused_content[version.uri] = version.content
        self.models.refused[version.uri] = reason
        LOGGER.error("%s is refused, version %s goes on: %s", version.uri, self._version, reason)
        self.on_change("refusal")

    @property
    def _version(self) -> str:
        return self.models.current.version

    async def _run_in_thread(self, work: Callable[[], Result]) -> Result:
        """What `work` returns, computed in a thread that does not keep the process from ending."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Result] = loop.create_future()
        self._worker_done = loop.create_future()
        threading.Thread(
            target=_run, args=(work, loop, result, self._worker_done), name="following", daemon=True
        ).start()
        return await result


def _run(
    work: Callable[[], Result],
    loop: asyncio.AbstractEventLoop,
    result: "asyncio.Future[Result]",
    worker_done: "asyncio.Future[None]",
) -> None:
    outcome: Result | None = None
    failed: Exception | None = None
    try:
        outcome = work()
    except Exception as error:  # noqa: BLE001 (raised where it is waited for)
        failed = error

    def deliver() -> None:
        worker_done.set_result(None)
        if result.done():
            return
        if failed is not None:
            result.set_exception(failed)
        else:
            result.set_result(outcome)  # type: ignore[arg-type]

    with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(deliver)


def prepare_model(version: Version, load: Callable[[Version], Model]) -> Model:
    """A version's model, loaded, and probed with what its evaluation stored."""
    model = load(version)
    probe(model, model.probes or PROBES)
    return model


def load_version(version: Version, spec: str, name: str = "", precision: Precision = "auto") -> Model:
    """The model of the version that `spec` named: by its number, which no alias can move in between."""
    return replace(load(version.uri, name, precision), spec=spec, registered=version)


def format_error(error: Exception) -> str:
    """What went wrong, in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, CappyError) else quote(f"{type(error).__name__}: {text}", 200)


WEBHOOK_VARIABLE = "CAPPY_WEBHOOK_SECRET"
DELIVERY_ID_HEADER, TIMESTAMP_HEADER, SIGNATURE_HEADER = (
    "x-mlflow-delivery-id",
    "x-mlflow-timestamp",
    "x-mlflow-signature",
)
ALIAS_ENTITY = "model_version_alias"
MAX_DELIVERY_AGE_SECONDS = 300
"""How far a delivery's time may be from ours; older ones are somebody's replay."""
MAX_WEBHOOK_BYTES = 65_536
_UNAUTHORIZED: dict[int | str, dict[str, object]] = {401: {"model": Problem}}


class LoadedModel(BaseModel):
    """A model that is loaded."""

    name: str
    version: Annotated[str, Field(description="12 hexadecimal digits of its manifest's hash")]
    sha256: Annotated[str, Field(description="Hash of its manifest, and through it of every file")]
    registered: Annotated[str, Field(description="models:/name/number in the registry, empty if it came elsewhere")]
    precision: str


class State(BaseModel):
    """What answers, what could answer at once, and what may not."""

    current: LoadedModel
    former: Annotated[LoadedModel | None, Field(description="Stays loaded, for a rollback")] = None
    follows: Annotated[str, Field(description="The alias that is followed, empty if none is")] = ""
    trouble: Annotated[str, Field(description="Why the alias could not be read at the last look")] = ""
    refused: Annotated[dict[str, str], Field(description="Version of the registry -> why it does not serve")]


class RefreshResponse(BaseModel):
    """What was done with a request to look at the alias."""

    looks: Annotated[bool, Field(description="Whether the alias is looked at now; GET /model shows what came of it")]


def add_admin(app: FastAPI, models: Models, follower: Follower | None, keys: Keys, secret: str) -> None:
    """GET /model; where an alias is followed POST /admin/refresh and /admin/rollback if there are keys.

    With a secret also POST /webhooks/mlflow.
    """

    @app.get("/model", tags=["model"], responses=_UNAUTHORIZED, response_model=State)
    async def model(request: Request) -> Response | State:
        """Which model answers; needs a key where there are keys."""
        return _state(models, follower) if keys.allow(request.headers) else _refuse(unknown_key_refusal())

    if follower is not None and keys:
        _add_model_changes(app, models, follower, keys)
    if follower is not None and secret:
        _add_webhook(app, follower, secret)


def _add_model_changes(app: FastAPI, models: Models, follower: Follower, keys: Keys) -> None:
    @app.post(
        "/admin/refresh", tags=["model"], status_code=202, responses=_UNAUTHORIZED, response_model=RefreshResponse
    )
    async def refresh(request: Request) -> Response | RefreshResponse:
        """Looks at the alias now, at versions that were refused too."""
        if not keys.allow(request.headers):
            return _refuse(unknown_key_refusal())
        follower.request_check(retry_refused=True)
        return RefreshResponse(looks=True)

    @app.post(
        "/admin/rollback", tags=["model"], responses={**_UNAUTHORIZED, 409: {"model": Problem}}, response_model=State
    )
    async def rollback(request: Request) -> Response | State:
        """Changes the model for the one before, until the alias moves."""
        if not keys.allow(request.headers):
            return _refuse(unknown_key_refusal())
        if follower.rollback() is None:
            return _refuse(Refusal(409, "no former model is loaded; move the alias: cappy promotion --rollback"))
        return _state(models, follower)


def _add_webhook(app: FastAPI, follower: Follower, secret: str) -> None:
    @app.post(
        "/webhooks/mlflow", tags=["model"], status_code=202, responses=_UNAUTHORIZED, response_model=RefreshResponse
    )
    async def webhook(request: Request) -> Response | RefreshResponse:
        """An event of MLflow's, signed with the secret: looks at the alias now if it is about the alias."""
        try:
            body = await receive_body(request, MAX_WEBHOOK_BYTES, "no event of MLflow is as large")
            Bounds().check(body)
        except Refusal as refusal:
            return _refuse(refusal)
        if not _is_signed(secret, request.headers, body, time.time()):
            return _refuse(Refusal(401, "the signature is not that of this service's secret, or is too old"))
        looks = _is_about(follower.alias, body)
        if looks:
            follower.request_check()
        return RefreshResponse(looks=looks)


def _state(models: Models, follower: Follower | None) -> State:
    return State(
        current=_describe(models.current),
        former=_describe(models.former) if models.former else None,
        follows=follower.alias if follower else "",
        trouble=follower.trouble if follower else "",
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


def _refuse(refusal: Refusal) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
    return JSONResponse(refuse(refusal.status, refusal.message), status_code=refusal.status, headers=headers)


def read_secret() -> str:
    """The secret from CAPPY_WEBHOOK_SECRET, empty if there is none; ConfigError for a short one."""
    secret = os.environ.get(WEBHOOK_VARIABLE, "").strip()
    if secret and len(secret) < MIN_SECRET_CHARACTERS:
        remedy = "make one with: openssl rand -hex 24"
        raise ConfigError(f"{WEBHOOK_VARIABLE}: is shorter than {MIN_SECRET_CHARACTERS} characters; {remedy}")
    return secret


def _is_signed(secret: str, headers: Mapping[str, str], body: bytes, now: float) -> bool:
    """Whether who knows the secret sent this body within five minutes of `now`, in seconds since 1970."""
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
    """Whether an event says that the alias of this spec was set or deleted."""
    try:
        event = from_json(body)
    except ValueError:
        return False
    if not isinstance(event, Mapping) or event.get("entity") != ALIAS_ENTITY:
        return False
    data, spec = event.get("data"), parse_spec(alias)
    return isinstance(data, Mapping) and (data.get("name"), data.get("alias")) == (spec.name, spec.revision)
