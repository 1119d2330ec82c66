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
    BODIES_AT_ONCE,
    GONE,
    BodyBudget,
    Bounds,
    Refusal,
    Share,
    apart,
    describe_error,
    distinct,
    receive_body,
)
from serving.config import Limits
from serving.dialects import Dialect, ScoredPairs
from serving.engine import Batcher, Model, Models
from serving.guards import Keys, unknown_key

LOGGER = logging.getLogger("serving")
DEADLINE = "x-timeout-seconds"
CUT = "X-Cappy-Pairs-Cut"
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
        self.budget = BodyBudget(BODIES_AT_ONCE * limits.max_body_bytes)
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
            async with asyncio.timeout(self._seconds(request)):
                self._admit(request)
                with self.budget.share() as share:
                    body = await self._receive(request, dialects[0], share)
                    value = await apart(len(body), partial(self._parse, body, request.headers, dialects[0]))
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
        asked, pairs = await apart(size, partial(self._understand, dialect, value))
        model = self._model(dialect.named(asked), *request.path_params.values())
        if dialect.whole(asked) and not await self.batcher.fit(model.engine, pairs):
            raise Refusal(dialect.invalid, "a pair is longer than the scorer reads; shorten it or let it be cut")
        request.state.pairs, request.state.facts = len(pairs), model.facts()
        scored = await self._score(request, model, pairs, n=len(set(pairs)) if dialect.one_pool else 1)
        return await apart(size, partial(write_response, dialect, asked, scored))

    def _understand(self, dialect: Dialect, value: object) -> tuple[BaseModel, Sequence[tuple[str, str]]]:
        """The request and its pairs; Refusal where it has another shape or is too large."""
        asked = parse_request(dialect, value)
        pairs = dialect.pairs(asked)
        if len(pairs) > self.limits.max_pairs:
            text = f"{len(pairs)} pairs are above {self.limits.max_pairs}; send them in several requests"
            raise Refusal(413, text)
        self.bounds.check_texts(distinct(pairs))
        return asked, pairs

    async def _score(self, request: Request, model: Model, pairs: Sequence[tuple[str, str]], *, n: int) -> ScoredPairs:
        """Scores them, unless the client hangs up before; what is expected of each is that of the best of `n`."""
        work = asyncio.ensure_future(self.batcher.score(model.engine, pairs))
        gone = asyncio.ensure_future(_hung_up(request))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise Refusal(GONE, "the client hung up")
            computed, tokens, request.state.batch_wait_seconds, cut = work.result()
        finally:
            work.cancel()
            gone.cancel()
        scores = [score for score, _ in computed]
        request.state.scores, request.state.tokens = scores, tokens
        if cut:
            request.state.facts = {**model.facts(), CUT: str(cut)}
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

    def _seconds(self, request: Request) -> float:
        """The time that a request has; `_admit` refuses what is not a number of seconds later."""
        text = request.headers.get(DEADLINE, "")
        try:
            asked = float(text) if text else self.limits.timeout
        except ValueError:
            asked = math.nan
        return min(asked, self.limits.timeout) if 0 < asked < math.inf else self.limits.timeout

    def _admit(self, request: Request) -> None:
        """Before a body is read: whether the client may ask, the model can answer and the queue has room."""
        if not self.keys.allow(request.headers):
            raise unknown_key()
        text = request.headers.get(DEADLINE)
        if text is not None and not _positive(text):
            raise Refusal(400, "X-Timeout-Seconds: must be a number of seconds above 0")
        if self.models.reason:
            raise Refusal(503, f"not ready: {self.models.reason}", retry_after=1)
        self.batcher.admit(1)

    async def _receive(self, request: Request, dialect: Dialect, share: Share) -> bytes:
        return await receive_body(request, self.limits.max_body_bytes, REMEDY, types=dialect.types, share=share)

    def _parse(self, body: bytes, headers: Mapping[str, str], dialect: Dialect) -> object:
        """The JSON of the body."""
        try:
            return dialect.read(body, headers, self.bounds)
        except ValueError as error:
            raise Refusal(400, f"the body is not JSON ({error}); send {dialect.shape}") from error

    def _model(self, *names: str | None) -> Model:
        """The model that answers, current or former; Refusal 404 where another model or version is asked for."""
        model = self.models.find(*names)
        if model is None:
            loaded = [one.version for one in (self.models.current, self.models.former) if one is not None]
            text = f"no model of that name is served; ask for {self.models.current.name}, or name none"
            raise Refusal(404, f"{text}; versions that are loaded: {', '.join(loaded)}")
        return model


def choose_dialect(dialects: Sequence[Dialect], value: object) -> Dialect:
    """The first dialect of a path one of whose marks a body has; the path's first where it has none's."""
    names = value.keys() if isinstance(value, Mapping) else frozenset()
    return next((dialect for dialect in dialects if dialect.marks & names), dialects[0])


def parse_request(dialect: Dialect, value: object) -> BaseModel:
    """The request; Refusal that names the field and the rule, and does not repeat what was sent."""
    try:
        return dialect.request.model_validate(value)
    except ValidationError as error:
        raise Refusal(dialect.invalid, f"{describe_error(error, value)}; send {dialect.shape}") from error


def write_response(dialect: Dialect, asked: BaseModel, scored: ScoredPairs) -> Response:
    """What came of a request, in its dialect."""
    return JSONResponse(dialect.answer(asked, scored).model_dump(exclude_none=dialect.bare))


def write_refusal(dialects: Sequence[Dialect], refusal: Refusal) -> Response:
    """A refusal with the fields of every one of these dialects; where they give a field differently, of the first."""
    fields: dict[str, object] = {}
    for dialect in reversed(dialects):
        fields |= dialect.refuse(refusal.status, refusal.message)
    headers = {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(fields, status_code=refusal.status, headers=headers)


async def _hung_up(request: Request) -> None:
    """Returns when the client has closed its connection; the body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False
