"""The gateway's HTTP application: OpenAI's chat completions API in front of an LLM and a scorer."""

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
from serving.bodies import (
    CLIENT_CLOSED_REQUEST,
    MAX_BODIES_IN_MEMORY,
    BodyBudget,
    Bounds,
    Refusal,
    Reservation,
    receive_body,
    run_in_thread_if_large,
    wait_for_disconnect,
)
from serving.engine import SHUTTING_DOWN
from serving.gateway.answering import Gateway, GatewayOutcome
from serving.gateway.completion import KEEP_ALIVE_SECONDS, chunks, completion, events, headers, summary
from serving.gateway.config import ChatLimits
from serving.gateway.errors import GatewayError
from serving.gateway.feedback import FeedbackLog, read_feedback
from serving.gateway.requests import REMEDY, ChatRequest, read_request, to_openai_error
from serving.guards import ANY_HOST, BrowserGuard, Hosts, KeyGuard, Keys
from serving.listener import ShutdownFlag
from serving.page import About, add_page

METRIC_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120)
CANDIDATES_HEADER = "x-cappy-candidates"
_UNREACHABLE_STATUSES = (502, 503, 504)
OPEN_PATHS = ("/", "/about", "/health", "/ready")
"""Paths that never need a key."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may send requests: valid keys (no key is needed if there are none), host names and origins of pages."""

    keys: Keys = field(default_factory=Keys)
    hosts: Hosts = ANY_HOST
    origins: Sequence[str] = ()


class Metrics:
    """Prometheus metrics, one registry per application; labels contain no texts and no model names."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests for completions by outcome", "outcome")
        self._stops = self._counter("stops", "Answered requests by the reason that stopped sampling", "reason")
        self._samples = self._counter("samples", "Sampled candidates")
        self._calls = self._counter("calls", "Calls to LLMs", "result")
        self._tokens = self._counter("tokens", "Tokens as reported by the LLMs' servers", "kind")
        self._cost = self._counter("cost", "Cost by the configured prices")
        self._seconds = Histogram(
            "cappy_gateway_seconds", "Seconds of answered requests", buckets=METRIC_SECONDS, registry=self._registry
        )

    def count_answer(self, outcome: GatewayOutcome) -> None:
        """Counts an answered request."""
        ledger = outcome.ledger
        self._requests.labels(outcome.kind).inc()
        self._stops.labels(outcome.limit or outcome.stop).inc()
        self._samples.inc(len(outcome.candidates))
        self._calls.labels("answered").inc(ledger.calls - ledger.failed)
        self._calls.labels("failed").inc(ledger.failed)
        self._tokens.labels("prompt").inc(ledger.prompt_tokens)
        self._tokens.labels("completion").inc(ledger.completion_tokens)
        self._cost.inc(ledger.cost)
        self._seconds.observe(outcome.seconds)

    def count_refusal(self, status: int) -> None:
        """Counts a failed request, including invalid ones, by its status."""
        self._requests.labels(str(status)).inc()

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"cappy_gateway_{name}", text, labels, registry=self._registry)


@dataclass(frozen=True, kw_only=True)
class _RouteContext:
    """Values that the routes share."""

    gateway: Gateway
    feedback: FeedbackLog | None
    metrics: Metrics
    max_body_bytes: int
    bounds: Bounds
    budget: BodyBudget
    keys: Keys
    keep_alive: float
    shutdown: ShutdownFlag

    def authorization(self, request: Request) -> str:
        """The Authorization header to pass on to the LLM; empty if this gateway has keys, because it then has one."""
        return "" if self.keys else request.headers.get("authorization", "")


def create_app(
    gateway: Gateway,
    *,
    feedback: FeedbackLog | None = None,
    limits: ChatLimits | None = None,
    access: Access | None = None,
    keep_alive: float = KEEP_ALIVE_SECONDS,
    shutdown: ShutdownFlag | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """Creates an application that answers with the gateway's best candidate and stores answers in the feedback log.

    While `shutdown` is set it still answers but is not ready. `tracing` is closed when the application ends.
    """
    access, limits = access or Access(), limits or ChatLimits()
    context = _RouteContext(
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
        budget=BodyBudget(MAX_BODIES_IN_MEMORY * limits.max_body_bytes),
        keys=access.keys,
        keep_alive=keep_alive,
        shutdown=shutdown or ShutdownFlag(),
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        flush_task = asyncio.create_task(feedback.flush_periodically()) if feedback else None
        yield
        if feedback and flush_task:
            flush_task.cancel()
            await asyncio.to_thread(feedback.close)
        await gateway.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title="Cappy gateway",
        summary="The best of several samples of an LLM, behind OpenAI's chat completions.",
        version=cappy.__version__,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's page loads its script from another site
        redoc_url=None,
    )
    # The middleware that is added last runs first.
    app.add_middleware(KeyGuard, keys=access.keys, open_paths=OPEN_PATHS, write_refusal=_write_refusal)
    if access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(access.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    app.add_middleware(BrowserGuard, hosts=access.hosts, origins=access.origins, write_refusal=_write_refusal)
    app.add_middleware(AccessLog, shutting_down=lambda: context.shutdown.shutting_down)
    app.add_exception_handler(GatewayError, _gateway_error)
    app.add_exception_handler(HTTPException, _not_found)
    app.add_exception_handler(Exception, _internal_error)
    _add_chat(app, context)
    _add_models(app, context)
    _add_feedback(app, context)
    _add_probes(app, context)
    add_page(app, lambda: _describe_gateway(gateway))
    if tracing is not None:
        tracing.instrument(app)
    return app


def _describe_gateway(gateway: Gateway) -> About:
    scoring = gateway.scoring
    return About(
        service="gateway",
        model=gateway.upstream.llm.model,
        version=scoring.version(),
        former=None,
        calibrated=scoring.calibration is not None,
    )


def _add_chat(app: FastAPI, context: _RouteContext) -> None:
    @app.post("/v1/chat/completions", tags=["chat"], response_class=Response)
    async def chat(request: Request) -> Response:
        """Answers with the best of the LLM's candidates by the scorer."""
        request.state.outcome = "error"
        with context.budget.reserve() as reservation:
            try:
                body = await _body(request, context, reservation)
                parse = partial(
                    read_request, body, max_choices=context.gateway.policy.candidates, bounds=context.bounds
                )
                chat_request = await run_in_thread_if_large(len(body), parse)
                details = _read_flag(request, CANDIDATES_HEADER)
            except GatewayError as problem:
                context.metrics.count_refusal(problem.status)
                raise
            completion_id = f"chatcmpl-{uuid.uuid4().hex}"
            task = asyncio.create_task(_answer(context, chat_request, context.authorization(request), completion_id))
            # The body stays in memory until the task is done, for a stream after this function has returned.
            task_reservation = reservation.transfer()
            task.add_done_callback(lambda _: task_reservation.release())
        write = partial(chunks, completion_id=completion_id, details=details)
        if not await _wait_until_done(task, request, context.keep_alive if chat_request.stream else None):
            request.state.outcome = "streaming"  # The span is written before the outcome is known.
            return _stream(events(task, write, keep_alive=context.keep_alive), {})
        outcome = task.result()
        for name in ("outcome", "sampled", "calls", "cost"):
            setattr(request.state, name, summary(outcome)[name])
        if chat_request.stream:
            return _stream(events(task, write, keep_alive=context.keep_alive), headers(outcome))
        return _Json(completion(outcome, completion_id, details=details), headers=headers(outcome))


def _add_models(app: FastAPI, context: _RouteContext) -> None:
    @app.get("/v1/models", tags=["chat"], response_class=Response)
    async def models(request: Request) -> Response:
        """The list of models, as the LLM's server returns it."""
        listed = await context.gateway.upstream.models(context.authorization(request))
        return Response(listed, media_type="application/json")


def _add_feedback(app: FastAPI, context: _RouteContext) -> None:
    @app.post("/v1/feedback", tags=["feedback"], response_class=Response)
    async def feedback(request: Request) -> Response:
        """Stores a user's feedback on an answer: {"id", "score"} or {"id", "reference"}."""
        with context.budget.reserve() as reservation:
            body = await _body(request, context, reservation)
            item = await run_in_thread_if_large(len(body), partial(read_feedback, body, context.bounds))
        if context.feedback is None:
            raise GatewayError(
                404, "feedback is not enabled; start the gateway with --feedback FOLDER", code="not_found"
            )
        await context.feedback.add(item)
        return _Json({"id": item.id, "kept": True})


def _add_probes(app: FastAPI, context: _RouteContext) -> None:
    @app.get("/health", tags=["probes"], response_class=Response)
    async def health() -> Response:
        """Liveness of the process."""
        return _Json({"status": "ok"})

    @app.get("/ready", tags=["probes"], response_class=Response)
    async def ready() -> Response:
        """Readiness: whether the LLM's server answers, even with an error such as 401; false after SIGTERM."""
        reason = SHUTTING_DOWN if context.shutdown.shutting_down else await _unreachable_reason(context.gateway)
        return _Json({"ready": not reason, "reason": reason}, status_code=503 if reason else 200)

    @app.get("/metrics", tags=["probes"], response_class=Response)
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(context.metrics.render(), media_type="text/plain; version=0.0.4")


async def _unreachable_reason(gateway: Gateway) -> str:
    """Why the LLM's server does not answer; empty if it does."""
    try:
        await gateway.upstream.models("")
    except GatewayError as problem:
        return str(problem) if problem.status in _UNREACHABLE_STATUSES else ""
    return ""


async def _answer(
    context: _RouteContext, chat_request: ChatRequest, authorization: str, completion_id: str
) -> GatewayOutcome:
    """Answers a request, counts it and stores the answer."""
    try:
        outcome = await context.gateway.answer(chat_request, authorization)
    except (GatewayError, asyncio.CancelledError) as error:
        # It is cancelled if the client disconnects.
        context.metrics.count_refusal(error.status if isinstance(error, GatewayError) else CLIENT_CLOSED_REQUEST)
        raise
    except Exception:
        # A bug: counted here, answered by `_internal_error`.
        context.metrics.count_refusal(500)
        raise
    context.metrics.count_answer(outcome)
    if context.feedback is not None:
        await context.feedback.store(outcome, completion_id)
    return outcome


async def _wait_until_done(task: "asyncio.Task[GatewayOutcome]", request: Request, timeout: float | None) -> bool:
    """Waits for the task; returns False if it is still running after `timeout` seconds.

    If the client disconnects first, cancels the task with its calls to the LLM and raises GatewayError.
    """
    disconnect_task = asyncio.create_task(wait_for_disconnect(request))
    try:
        await asyncio.wait({task, disconnect_task}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if disconnect_task.done() and not task.done():
            raise GatewayError(CLIENT_CLOSED_REQUEST, "the client closed the connection")
    except BaseException:
        task.cancel()
        raise
    finally:
        disconnect_task.cancel()
    return task.done()


async def _body(request: Request, context: _RouteContext, reservation: Reservation) -> bytes:
    """Receives the body; raises GatewayError 413 if it is too large, 408 if it is late, 415 if it is not JSON."""
    try:
        return await receive_body(request, context.max_body_bytes, REMEDY, reservation=reservation)
    except Refusal as refusal:
        raise to_openai_error(refusal) from None


def _read_flag(request: Request, name: str) -> bool:
    """Reads a header that is 1, 0, true or false; raises GatewayError 400 for another value."""
    value = request.headers.get(name, "0").strip().lower()
    if value not in ("0", "1", "true", "false"):
        raise GatewayError(400, f"the header {name} must be 1 or 0", param=name)
    return value in ("1", "true")


def _stream(content: AsyncIterator[str], extra_headers: Mapping[str, str]) -> StreamingResponse:
    all_headers = {"cache-control": "no-cache", "x-accel-buffering": "no", **extra_headers}
    return StreamingResponse(content, media_type="text/event-stream", headers=all_headers)


class _Json(JSONResponse):
    """JSON in ASCII, because texts of an LLM's server may contain lone surrogates."""

    def render(self, content: object) -> bytes:
        return json.dumps(content).encode()


def _write_refusal(path: str, refusal: Refusal) -> Response:
    """The response to a request that the middleware refuses."""
    problem = to_openai_error(refusal)
    headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
    return _Json(problem.body(), status_code=problem.status, headers={**problem.headers, **headers})


async def _gateway_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)  # noqa: S101 (the handler is only registered for this type)
    return _Json(error.body(), status_code=error.status, headers=error.headers)


async def _internal_error(request: Request, error: Exception) -> Response:
    """Answers an unexpected error; its traceback only goes to the log."""
    text = "internal error of the gateway; see its log"
    return _Json(GatewayError(500, text, kind="server_error").body(), status_code=500)


async def _not_found(request: Request, error: Exception) -> Response:
    """Answers an unknown path or method in OpenAI's shape."""
    assert isinstance(error, HTTPException)  # noqa: S101 (the handler is only registered for this type)
    text = f"{request.method} {request.url.path}: {error.detail}; use POST /v1/chat/completions"
    return _Json(GatewayError(error.status_code, text).body(), status_code=error.status_code, headers=error.headers)
