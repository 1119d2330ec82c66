"""The gateway as an HTTP application: OpenAI's chat completions in front of an LLM and a scorer."""

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from starlette.exceptions import HTTPException

import cappy
from serving.access import AccessLog, Tracing
from serving.bodies import BODIES_AT_ONCE, GONE, BodyBudget, Bounds, Refusal, Share, apart, receive_body
from serving.engine import SHUTTING_DOWN
from serving.gateway.answering import Gateway, Outcome
from serving.gateway.completion import KEEP_ALIVE_SECONDS, chunks, completion, events, facts, headers
from serving.gateway.config import ChatLimits
from serving.gateway.errors import GatewayError
from serving.gateway.feedback import FeedbackLog, read_feedback
from serving.gateway.requests import REMEDY, ChatRequest, read_request, to_openai_error
from serving.guards import ANY_HOST, BrowserGuard, Hosts, KeyGuard, Keys
from serving.listener import Shutdown
from serving.page import About, add_page

METRIC_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120)
CANDIDATES_HEADER = "x-cappy-candidates"
_UNREACHED = (502, 503, 504)
OPEN_PATHS = ("/", "/about", "/health", "/ready")
"""What needs no key where there are keys."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may ask: by key where there are `keys`, under which names, and from pages of which other `origins`."""

    keys: Keys = field(default_factory=Keys)
    hosts: Hosts = ANY_HOST
    origins: Sequence[str] = ()


class Metrics:
    """Prometheus metrics, one registry per application; nothing of a request's text and no model's name in a label."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests for completions, by how they ended", "outcome")
        self._stops = self._counter("stops", "Answered requests by what stopped sampling", "reason")
        self._samples = self._counter("samples", "Candidates sampled")
        self._calls = self._counter("calls", "Calls of LLMs", "result")
        self._tokens = self._counter("tokens", "Tokens as the LLMs' servers counted them", "kind")
        self._cost = self._counter("cost", "Money, by the prices given")
        self._seconds = Histogram(
            "cappy_gateway_seconds", "Seconds of answered requests", buckets=METRIC_SECONDS, registry=self._registry
        )

    def count_answer(self, outcome: Outcome) -> None:
        """Counts an answer."""
        ledger = outcome.ledger
        self._requests.labels(outcome.how).inc()
        self._stops.labels(outcome.limit or outcome.stop).inc()
        self._samples.inc(len(outcome.draws))
        self._calls.labels("answered").inc(ledger.calls - ledger.failed)
        self._calls.labels("failed").inc(ledger.failed)
        self._tokens.labels("prompt").inc(ledger.prompt_tokens)
        self._tokens.labels("completion").inc(ledger.completion_tokens)
        self._cost.inc(ledger.cost)
        self._seconds.observe(outcome.seconds)

    def count_refusal(self, status: int) -> None:
        """Counts a request without an answer, one that could not be read included, by its status."""
        self._requests.labels(str(status)).inc()

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"cappy_gateway_{name}", text, labels, registry=self._registry)


@dataclass(frozen=True, kw_only=True)
class _Front:
    """What the routes share."""

    gateway: Gateway
    feedback: FeedbackLog | None
    metrics: Metrics
    max_body_bytes: int
    bounds: Bounds
    budget: BodyBudget
    keys: Keys
    keep_alive: float
    shutdown: Shutdown

    def authorization(self, request: Request) -> str:
        """What an LLM without a key of its own is sent: the client's, unless that is a key of this gateway."""
        return "" if self.keys else request.headers.get("authorization", "")


def create_app(
    gateway: Gateway,
    *,
    feedback: FeedbackLog | None = None,
    limits: ChatLimits | None = None,
    access: Access | None = None,
    keep_alive: float = KEEP_ALIVE_SECONDS,
    shutdown: Shutdown | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """An application that answers with the gateway's best candidate and keeps what it answered in the feedback log.

    While `shutdown` is closing it answers, but is not ready. `tracing` makes spans of requests until the end.
    """
    access, limits = access or Access(), limits or ChatLimits()
    front = _Front(
        gateway=gateway,
        feedback=feedback,
        metrics=Metrics(),
        max_body_bytes=limits.max_body_bytes,
        bounds=Bounds(
            max_values=limits.max_values,
            max_characters=limits.max_characters,
            max_text_bytes=limits.max_text_bytes,
            remedy=REMEDY,
        ),
        budget=BodyBudget(BODIES_AT_ONCE * limits.max_body_bytes),
        keys=access.keys,
        keep_alive=keep_alive,
        shutdown=shutdown or Shutdown(),
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        writing = asyncio.create_task(feedback.flush_for_ever()) if feedback else None
        yield
        if feedback and writing:
            writing.cancel()
            await asyncio.to_thread(feedback.close)
        await gateway.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title="Cappy gateway",
        summary="The best of several samples of an LLM, behind OpenAI's chat completions.",
        version=cappy.__version__,
        lifespan=lifespan,
        docs_url=None,  # the page would load its script from another site
        redoc_url=None,
    )
    # The last that is added is the first that is asked.
    app.add_middleware(KeyGuard, keys=access.keys, open_paths=OPEN_PATHS, refuse=_refuse)
    if access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(access.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    app.add_middleware(BrowserGuard, hosts=access.hosts, origins=access.origins, refuse=_refuse)
    app.add_middleware(AccessLog, closing=lambda: front.shutdown.closing)
    app.add_exception_handler(GatewayError, _gateway_error)
    app.add_exception_handler(HTTPException, _not_found)
    app.add_exception_handler(Exception, _defect)
    _add_chat(app, front)
    _add_models(app, front)
    _add_feedback(app, front)
    _add_probes(app, front)
    add_page(app, lambda: _about(gateway))
    if tracing is not None:
        tracing.instrument(app)
    return app


def _about(gateway: Gateway) -> About:
    scoring = gateway.scoring
    calibrated = scoring.calibration is not None
    return About(
        service="gateway", model=gateway.first.llm.model, version=scoring.version(), former=None, calibrated=calibrated
    )


def _add_chat(app: FastAPI, front: _Front) -> None:
    @app.post("/v1/chat/completions", tags=["chat"], response_class=Response)
    async def chat(request: Request) -> Response:
        """The best of the candidates that the LLM gives, by the scorer."""
        request.state.outcome = "error"
        with front.budget.share() as share:
            try:
                data = await _body(request, front, share)
                read = partial(read_request, data, most_choices=front.gateway.policy.candidates, bounds=front.bounds)
                wanted = await apart(len(data), read)
                details = _flag(request, CANDIDATES_HEADER)
            except GatewayError as problem:
                front.metrics.count_refusal(problem.status)
                raise
            identity = f"chatcmpl-{uuid.uuid4().hex}"
            work = asyncio.create_task(_answer(front, wanted, front.authorization(request), identity))
            # The body is held until the work is over, which for a stream is after this function.
            kept = share.hand_over()
            work.add_done_callback(lambda _: kept.release())
        write = partial(chunks, identity=identity, details=details)
        if not await _has_ended(work, request, front.keep_alive if wanted.stream else None):
            request.state.outcome = "streaming"  # Its span is written before the answer is known.
            return _stream(events(work, write, keep_alive=front.keep_alive), {})
        outcome = work.result()
        for name in ("outcome", "sampled", "calls", "cost"):
            setattr(request.state, name, facts(outcome)[name])
        if wanted.stream:
            return _stream(events(work, write, keep_alive=front.keep_alive), headers(outcome))
        return _Json(completion(outcome, identity, details=details), headers=headers(outcome))


def _add_models(app: FastAPI, front: _Front) -> None:
    @app.get("/v1/models", tags=["chat"], response_class=Response)
    async def models(request: Request) -> Response:
        """The LLM's models, as its server answers."""
        listed = await front.gateway.first.models(front.authorization(request))
        return Response(listed, media_type="application/json")


def _add_feedback(app: FastAPI, front: _Front) -> None:
    @app.post("/v1/feedback", tags=["feedback"], response_class=Response)
    async def feedback(request: Request) -> Response:
        """Takes {"id", "score"} or {"id", "reference"}: what a user thought of an answer."""
        with front.budget.share() as share:
            data = await _body(request, front, share)
            given = await apart(len(data), partial(read_feedback, data, front.bounds))
        if front.feedback is None:
            raise GatewayError(
                404, "feedback is not kept here; start the gateway with --feedback FOLDER", code="not_found"
            )
        await front.feedback.add(given)
        return _Json({"id": given.id, "kept": True})


def _add_probes(app: FastAPI, front: _Front) -> None:
    @app.get("/health", tags=["probes"], response_class=Response)
    async def health() -> Response:
        """Whether the process lives."""
        return _Json({"status": "ok"})

    @app.get("/ready", tags=["probes"], response_class=Response)
    async def ready() -> Response:
        """Whether the LLM's server answers: one that wants a key, or has no list of models, does. No, after SIGTERM."""
        reason = SHUTTING_DOWN if front.shutdown.closing else await _unreachable_reason(front.gateway)
        return _Json({"ready": not reason, "reason": reason}, status_code=503 if reason else 200)

    @app.get("/metrics", tags=["probes"], response_class=Response)
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(front.metrics.text(), media_type="text/plain; version=0.0.4")


async def _unreachable_reason(gateway: Gateway) -> str:
    """Why the LLM's server does not answer; empty where it does."""
    try:
        await gateway.first.models("")
    except GatewayError as problem:
        return str(problem) if problem.status in _UNREACHED else ""
    return ""


async def _answer(front: _Front, wanted: ChatRequest, authorization: str, identity: str) -> Outcome:
    """The outcome, counted and kept."""
    try:
        outcome = await front.gateway.answer(wanted, authorization)
    except (GatewayError, asyncio.CancelledError) as ended:
        # It is cancelled where the client hangs up.
        front.metrics.count_refusal(ended.status if isinstance(ended, GatewayError) else GONE)
        raise
    except Exception:
        # A defect: counted here, answered by the handler of all defects, which gets it next.
        front.metrics.count_refusal(500)
        raise
    front.metrics.count_answer(outcome)
    if front.feedback is not None:
        await front.feedback.keep(outcome, identity)
    return outcome


async def _has_ended(work: "asyncio.Task[Outcome]", request: Request, timeout: float | None) -> bool:
    """Waits for the work; False if it is still under way after `timeout` seconds.

    Where the client goes away first the work is cancelled, and with it every call of the LLM: GatewayError, for nobody.
    """
    gone = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({work, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if gone.done() and not work.done():
            raise GatewayError(GONE, "the client hung up")
    except BaseException:
        work.cancel()
        raise
    finally:
        gone.cancel()
    return work.done()


async def _wait_for_disconnect(request: Request) -> None:
    """Returns when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, front: _Front, share: Share) -> bytes:
    """The body; GatewayError 413 above the most bytes, 408 where it is late, 415 where it is not sent as JSON."""
    try:
        return await receive_body(request, front.max_body_bytes, REMEDY, share=share)
    except Refusal as refusal:
        raise to_openai_error(refusal) from None


def _flag(request: Request, name: str) -> bool:
    """A header that is 1 or 0, or true or false; GatewayError 400 for another value."""
    value = request.headers.get(name, "0").strip().lower()
    if value not in ("0", "1", "true", "false"):
        raise GatewayError(400, f"the header {name} must be 1 or 0", param=name)
    return value in ("1", "true")


def _stream(content: AsyncIterator[str], more: Mapping[str, str]) -> StreamingResponse:
    kept = {"cache-control": "no-cache", "x-accel-buffering": "no", **more}
    return StreamingResponse(content, media_type="text/event-stream", headers=kept)


class _Json(JSONResponse):
    """JSON in ASCII, because the texts of others may hold half a character."""

    def render(self, content: object) -> bytes:
        return json.dumps(content).encode()


def _refuse(path: str, refusal: Refusal) -> Response:
    """A refusal of what stands before the routes."""
    problem = to_openai_error(refusal)
    asked = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
    return _Json(problem.body(), status_code=problem.status, headers={**problem.headers, **asked})


async def _gateway_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)  # noqa: S101 (what the handler is registered for)
    return _Json(error.body(), status_code=error.status, headers=error.headers)


async def _defect(request: Request, error: Exception) -> Response:
    """What nobody foresaw; its traceback goes to the log alone."""
    text = "the gateway met a defect of its own; its log says where"
    return _Json(GatewayError(500, text, kind="server_error").body(), status_code=500)


async def _not_found(request: Request, error: Exception) -> Response:
    """A path or a method that is not here, in OpenAI's shape too."""
    assert isinstance(error, HTTPException)  # noqa: S101 (what the handler is registered for)
    text = f"{request.method} {request.url.path}: {error.detail}; POST /v1/chat/completions is what is here"
    return _Json(GatewayError(error.status_code, text).body(), status_code=error.status_code, headers=error.headers)
