"""Answers a request of any dialect: reads the pairs, scores them and writes the response or a refusal."""

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
    LARGE_BYTES,
    MAX_BODIES_IN_MEMORY,
    BodyBudget,
    Bounds,
    Refusal,
    Reservation,
    describe_error,
    distinct_texts,
    receive_body,
    run_in_thread_if_large,
    wait_for_disconnect,
)
from serving.config import RequestLimits
from serving.dialects import Dialect, ScoredPairs
from serving.engine import Batcher, Model, Models
from serving.guards import Keys, unknown_key_refusal

LOGGER = logging.getLogger("serving")
TIMEOUT_HEADER = "x-timeout-seconds"
TRUNCATED_HEADER = "X-Cappy-Pairs-Cut"
"""Response header with the number of distinct pairs that were truncated, if any were."""
REMEDY = "send fewer pairs per request"
MAX_POOL_IN_LOOP = 64
"""Responses of a pool up to which MBR takes about a millisecond, so that it may run in the event loop."""
VALUES_PER_PAIR = 32
"""Maximum JSON values in a body per allowed pair; tables may have additional columns."""


@dataclass(kw_only=True)
class Service:
    """Answers requests of all dialects with one batcher; `models` may change between requests."""

    models: Models
    batcher: Batcher
    limits: RequestLimits
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
        """Answers a request at a path that these dialects share, with scores or a refusal in the dialect's shape.

        Until the body shows which dialect it is, a refusal has the fields of all of them.
        """
        request.state.dialect = dialects[0].name
        try:
            async with asyncio.timeout(self._timeout_seconds(request)):
                self._admit(request)
                with self.budget.reserve() as reservation:
                    body = await self._receive(request, dialects[0], reservation)
                    value = await run_in_thread_if_large(
                        len(body), partial(self._parse, body, request.headers, dialects[0])
                    )
                    dialects = [choose_dialect(dialects, value)]
                    request.state.dialect = dialects[0].name
                    return await self._answer(request, dialects[0], value, len(body))
        except Refusal as refusal:
            return write_refusal(dialects, refusal)
        except TimeoutError:
            return write_refusal(
                dialects,
                Refusal(504, "the time limit of this request is exceeded; send fewer pairs or try again later"),
            )
        except Exception:
            # Any error of the scorer is logged with its traceback; the client gets an error in its dialect.
            LOGGER.exception("a request failed")
            return write_refusal(dialects, Refusal(500, "the scorer failed; see the log of the service"))

    async def _answer(self, request: Request, dialect: Dialect, value: object, size: int) -> Response:
        """Answers a body of `size` bytes."""
        payload, pairs = await run_in_thread_if_large(size, partial(self._read_pairs, dialect, value))
        model = self._find_model(dialect.requested_model(payload), *request.path_params.values())
        if dialect.forbids_truncation(payload) and not await self.batcher.fits(model.engine, pairs):
            raise Refusal(
                dialect.invalid_status, "a pair is longer than the scorer's maximum; shorten it or allow truncation"
            )
        request.state.pairs, request.state.headers = len(pairs), model.headers()
        result = await self._score(request, model, pairs, n=len(set(pairs)) if dialect.one_pool else 1)
        # MBR compares every response of a pool with every other one.
        work_size = LARGE_BYTES if dialect.one_pool and len(pairs) > MAX_POOL_IN_LOOP else size
        return await run_in_thread_if_large(work_size, partial(write_response, dialect, payload, result))

    def _read_pairs(self, dialect: Dialect, value: object) -> tuple[BaseModel, Sequence[tuple[str, str]]]:
        """Parses a request and its pairs; raises Refusal if it has the wrong shape or is too large."""
        payload = parse_request(dialect, value)
        pairs = dialect.pairs(payload)
        if len(pairs) > self.limits.max_pairs:
            limit = f"at most {self.limits.max_pairs} are accepted"
            text = f"the request has {len(pairs)} pairs, {limit}; send them in several requests"
            raise Refusal(413, text)
        self.bounds.check_texts(distinct_texts(pairs))
        return payload, pairs

    async def _score(self, request: Request, model: Model, pairs: Sequence[tuple[str, str]], *, n: int) -> ScoredPairs:
        """Scores pairs, unless the client disconnects.

        `expected` is each score's calibrated label, assuming the pair was picked as the best of `n` candidates.
        """
        score_task = asyncio.ensure_future(self.batcher.score(model.engine, pairs))
        disconnect_task = asyncio.ensure_future(wait_for_disconnect(request))
        try:
            await asyncio.wait((score_task, disconnect_task), return_when=asyncio.FIRST_COMPLETED)
            if not score_task.done():
                raise Refusal(CLIENT_CLOSED_REQUEST, "the client closed the connection")
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
            selector=model.selector,
            expected=model.calibration.apply(scores, n=n) if model.calibration else None,
            tokens=tokens,
            model=model.name,
            version=model.version,
            sha256=model.sha256,
            request_id=getattr(request.state, "request_id", ""),
        )

    def _timeout_seconds(self, request: Request) -> float:
        """The time limit of a request in seconds; an invalid header is ignored here and refused by `_admit`."""
        value = request.headers.get(TIMEOUT_HEADER, "")
        try:
            seconds = float(value) if value else self.limits.timeout
        except ValueError:
            seconds = math.nan
        return min(seconds, self.limits.timeout) if 0 < seconds < math.inf else self.limits.timeout

    def _admit(self, request: Request) -> None:
        """Checks the key, the timeout header, readiness and the queue before the body is read."""
        if not self.keys.allow(request.headers):
            raise unknown_key_refusal()
        text = request.headers.get(TIMEOUT_HEADER)
        if text is not None and not _is_positive(text):
            raise Refusal(400, "X-Timeout-Seconds: must be a number of seconds above 0")
        if self.models.not_loaded_reason:
            raise Refusal(503, f"not ready: {self.models.not_loaded_reason}", retry_after=1)
        self.batcher.admit(1)

    async def _receive(self, request: Request, dialect: Dialect, reservation: Reservation) -> bytes:
        return await receive_body(
            request, self.limits.max_body_bytes, REMEDY, types=dialect.content_types, reservation=reservation
        )

    def _parse(self, body: bytes, headers: Mapping[str, str], dialect: Dialect) -> object:
        """Parses the JSON of the body."""
        try:
            return dialect.parse(body, headers, self.bounds)
        except ValueError as error:
            raise Refusal(400, f"the body is not JSON ({error}); send {dialect.example_body}") from error

    def _find_model(self, *names: str | None) -> Model:
        """Finds the current or the former model by name or version; raises Refusal 404 if neither matches."""
        model = self.models.find(*names)
        if model is None:
            versions = [model.version for model in (self.models.current, self.models.former) if model is not None]
            text = f"no model or version of this name is served; use {self.models.current.name}, or leave the name out"
            raise Refusal(404, f"{text}; loaded versions: {', '.join(versions)}")
        return model


def choose_dialect(dialects: Sequence[Dialect], value: object) -> Dialect:
    """Returns the first dialect with a marker field in the body; if there is none, the path's first dialect."""
    names = value.keys() if isinstance(value, Mapping) else frozenset()
    return next((dialect for dialect in dialects if dialect.marker_fields & names), dialects[0])


def parse_request(dialect: Dialect, value: object) -> BaseModel:
    """Validates a request; the Refusal names field and rule and does not repeat the client's texts."""
    try:
        return dialect.request.model_validate(value)
    except ValidationError as error:
        raise Refusal(dialect.invalid_status, f"{describe_error(error, value)}; send {dialect.example_body}") from error


def write_response(dialect: Dialect, payload: BaseModel, result: ScoredPairs) -> Response:
    """Writes the result of a request in its dialect."""
    return JSONResponse(dialect.answer(payload, result).model_dump(exclude_none=dialect.exclude_none))


def write_refusal(dialects: Sequence[Dialect], refusal: Refusal) -> Response:
    """Writes a refusal with the fields of all these dialects; the first dialect's value wins."""
    fields: dict[str, object] = {}
    for dialect in reversed(dialects):
        fields |= dialect.error_body(refusal.status, refusal.message)
    headers = {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(fields, status_code=refusal.status, headers=headers)


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False
