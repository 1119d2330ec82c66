"""From a request in any dialect to its answer: read, refuse what cannot be answered, score, write."""

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError

from serving.bodies import (
    CLIENT_CLOSED_REQUEST,
    MAX_BODIES_IN_MEMORY,
    BodyBudget,
    Bounds,
    Refusal,
    Reservation,
    describe_error,
    distinct_texts,
    receive_body,
    run_in_thread,
)
from serving.config import Limits
from serving.dialects import Dialect, ScoredPairs
from serving.engine import Batcher, Model, Models
from serving.guards import Keys, unknown_key_refusal

LOGGER = logging.getLogger("serving")
TIMEOUT_HEADER = "x-timeout-seconds"
TRUNCATED_HEADER = "X-Cappy-Pairs-Cut"
"""Header of an answer for which pairs were cut: how many distinct ones."""
REMEDY = "send fewer pairs per request"
VALUES_PER_PAIR = 32
"""How many JSON values a body may have for each pair that a request may: tables have further columns."""


@dataclass(kw_only=True)
class Service:
    """Answers requests of every dialect by one batcher; `models` may change between any two."""

    models: Models
    batcher: Batcher
    limits: Limits
    keys: Keys
    budget: BodyBudget = field(init=False)
    bounds: Bounds = field(init=False)

    def __post_init__(self) -> None:
        limits = self.limits
        self.budget = BodyBudget(MAX_BODIES_IN_MEMORY * limits.max_body_bytes)
        self.bounds = Bounds(
            max_values=VALUES_PER_PAIR * (limits.max_pairs + 2),
            max_characters=limits.max_characters,
            max_text_bytes=limits.max_text_bytes,
            remedy=REMEDY,
        )

    async def answer(self, request: Request, dialects: Sequence[Dialect]) -> Response:
        """The answer to a request at a path of these dialects, a refusal in the dialect's own shape included.

        Before the body says which dialect it is, a refusal has the fields of all of them.
        """
        request.state.dialect = dialects[0].name
        try:
            async with asyncio.timeout(self._timeout_seconds(request)):
                self._admit(request)
                with self.budget.reserve() as reservation:
                    body = await self._receive(request, dialects[0], reservation)
                    value = await run_in_thread(len(body), partial(self._parse, body, request.headers, dialects[0]))
                    dialects = [choose_dialect(dialects, value)]
                    request.state.dialect = dialects[0].name
                    return await self._answer(request, dialects[0], value, len(body))
        except Refusal as refusal:
            return write_refusal(dialects, refusal)
        except TimeoutError:
            return write_refusal(
                dialects, Refusal(504, "the time for this request is over; send fewer pairs or ask later")
            )
        except Exception:
            # The last door: whatever the scorer raises is logged whole, and the client gets an error of its dialect.
            LOGGER.exception("a request failed")
            return write_refusal(dialects, Refusal(500, "the scorer failed; the log of the service says how"))

    async def _answer(self, request: Request, dialect: Dialect, value: object, size: int) -> Response:
        """The answer to a body of `size` bytes."""
        payload, pairs = await run_in_thread(size, partial(self._read_pairs, dialect, value))
        model = self._find_model(dialect.requested_model(payload), *request.path_params.values())
        if dialect.forbids_truncation(payload) and not await self.batcher.fits(model.engine, pairs):
            raise Refusal(dialect.invalid_status, "a pair is longer than the scorer reads; shorten it or let it be cut")
        request.state.pairs, request.state.headers = len(pairs), model.headers()
        result = await self._score(request, model, pairs, n=len(set(pairs)) if dialect.one_pool else 1)
        return await run_in_thread(size, partial(write_response, dialect, payload, result))

    def _read_pairs(self, dialect: Dialect, value: object) -> tuple[BaseModel, Sequence[tuple[str, str]]]:
        """The request and its pairs; Refusal where it has another shape or is too large."""
        payload = parse_request(dialect, value)
        pairs = dialect.pairs(payload)
        if len(pairs) > self.limits.max_pairs:
            text = f"{len(pairs)} pairs are above {self.limits.max_pairs}; send them in several requests"
            raise Refusal(413, text)
        self.bounds.check_texts(distinct_texts(pairs))
        return payload, pairs

    async def _score(self, request: Request, model: Model, pairs: Sequence[tuple[str, str]], *, n: int) -> ScoredPairs:
        """Scores them, unless the client hangs up before; what is expected of each is that of the best of `n`."""
        score_task = asyncio.ensure_future(self.batcher.score(model.engine, pairs))
        disconnect_task = asyncio.ensure_future(_wait_for_disconnect(request))
        try:
            await asyncio.wait((score_task, disconnect_task), return_when=asyncio.FIRST_COMPLETED)
            if not score_task.done():
                raise Refusal(CLIENT_CLOSED_REQUEST, "the client hung up")
            computed, tokens, request.state.batch_wait_seconds, num_truncated = score_task.result()
        finally:
            score_task.cancel()
            disconnect_task.cancel()
        scores = [score for score, _ in computed]
        request.state.scores, request.state.tokens = scores, tokens
        if num_truncated:
            request.state.headers = {**model.headers(), TRUNCATED_HEADER: str(num_truncated)}
        return ScoredPairs(
            scores=scores,
            logits=[logit for _, logit in computed],
            expected=model.calibration.apply(scores, n=n) if model.calibration else None,
            tokens=tokens,
            model=model.name,
            version=model.version,
            sha256=model.sha256,
            request_id=getattr(request.state, "request_id", ""),
        )

    def _timeout_seconds(self, request: Request) -> float:
        """The time that a request has; `_admit` refuses what is not a number of seconds later."""
        value = request.headers.get(TIMEOUT_HEADER, "")
        try:
            seconds = float(value) if value else self.limits.timeout
        except ValueError:
            seconds = math.nan
        return min(seconds, self.limits.timeout) if 0 < seconds < math.inf else self.limits.timeout

    def _admit(self, request: Request) -> None:
        """Before a body is read: whether the client may ask, the model can answer and the queue has room."""
        if not self.keys.allow(request.headers):
            raise unknown_key_refusal()
        text = request.headers.get(TIMEOUT_HEADER)
        if text is not None and not _is_positive(text):
            raise Refusal(400, "X-Timeout-Seconds: must be a number of seconds above 0")
        if self.models.reason:
            raise Refusal(503, f"not ready: {self.models.reason}", retry_after=1)
        self.batcher.admit(1)

    async def _receive(self, request: Request, dialect: Dialect, reservation: Reservation) -> bytes:
        return await receive_body(
            request, self.limits.max_body_bytes, REMEDY, types=dialect.content_types, reservation=reservation
        )

    def _parse(self, body: bytes, headers: Mapping[str, str], dialect: Dialect) -> object:
        """The JSON of the body."""
        try:
            return dialect.parse(body, headers, self.bounds)
        except ValueError as error:
            raise Refusal(400, f"the body is not JSON ({error}); send {dialect.shape}") from error

    def _find_model(self, *names: str | None) -> Model:
        """The model that answers, current or former; Refusal 404 where another model or version is asked for."""
        model = self.models.find(*names)
        if model is None:
            versions = [model.version for model in (self.models.current, self.models.former) if model is not None]
            text = f"no model of that name is served; ask for {self.models.current.name}, or name none"
            raise Refusal(404, f"{text}; versions that are loaded: {', '.join(versions)}")
        return model


def choose_dialect(dialects: Sequence[Dialect], value: object) -> Dialect:
    """The first dialect of a path one of whose marks a body has; the path's first where it has none's."""
    names = value.keys() if isinstance(value, Mapping) else frozenset()
    return next((dialect for dialect in dialects if dialect.marker_fields & names), dialects[0])


def parse_request(dialect: Dialect, value: object) -> BaseModel:
    """The request; Refusal that names the field and the rule, and does not repeat what was sent."""
    try:
        return dialect.request.model_validate(value)
    except ValidationError as error:
        raise Refusal(dialect.invalid_status, f"{describe_error(error, value)}; send {dialect.shape}") from error


def write_response(dialect: Dialect, payload: BaseModel, result: ScoredPairs) -> Response:
    """What came of a request, in its dialect."""
    return JSONResponse(dialect.answer(payload, result).model_dump(exclude_none=dialect.exclude_none))


def write_refusal(dialects: Sequence[Dialect], refusal: Refusal) -> Response:
    """A refusal with the fields of every one of these dialects; where they give a field differently, of the first."""
    fields: dict[str, object] = {}
    for dialect in reversed(dialects):
        fields |= dialect.refuse(refusal.status, refusal.message)
    headers = {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(fields, status_code=refusal.status, headers=headers)


async def _wait_for_disconnect(request: Request) -> None:
    """Returns when the client has closed its connection; the body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False
