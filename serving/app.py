"""The HTTP application that serves a scorer: routes of all dialects, probes for platforms, metrics for Prometheus."""

import asyncio
import contextlib
import gc
import logging
import operator
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import reduce
from itertools import groupby
from typing import Annotated, Literal

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

import cappy
from cappy.errors import CappyError
from serving.access import AccessLog, Tracing
from serving.admin import add_admin
from serving.bodies import Refusal
from serving.config import RequestLimits
from serving.dialects import DIALECTS, Dialect, ServedModels
from serving.dialects.native import SCORE, error_body
from serving.engine import PROBES, Batcher, Models, ProbePairs, probe
from serving.following import Follower
from serving.guards import ANY_HOST, BrowserGuard, Hosts, Keys, WriteRefusal
from serving.page import About, add_page
from serving.service import Service, write_refusal

LOGGER = logging.getLogger("serving")
ERROR_STATUSES = (400, 401, 403, 404, 408, 413, 415, 421, 429, 500, 503, 504)
QUEUED_BATCHES = 32
"""Default limit of the queue, in batches: at 2,048 tokens each, they take a RoBERTa-base about 13 s on two cores."""
SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKENS_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
SCORES_BUCKETS = tuple(tenths / 10 for tenths in range(11))


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the application; `max_queued_tokens` 0 means the tokens of 32 batches."""

    limits: RequestLimits = field(default_factory=RequestLimits)
    batch_tokens: int = 2048
    max_queued_tokens: int = 0
    keys: Keys = field(default_factory=Keys)
    origins: Sequence[str] = ()
    """Origins whose pages may send requests from a browser, in addition to the service's own."""
    hosts: Hosts = ANY_HOST
    """Host names that the service answers to."""
    probes: ProbePairs = PROBES
    """Probe pairs for the first model, if none are stored with it."""
    webhook_secret: str = ""
    """Secret of MLflow's webhooks; without it the webhook route does not exist."""
    routes: Mapping[str, str] = field(default_factory=dict)
    """Additional paths, such as Vertex AI's prediction route: path -> name of the dialect."""
    ready_path: str = ""
    """An additional path that answers like /ready."""


def create_app(
    models: Models,
    options: Options | None = None,
    *,
    on_failure: Callable[[CappyError], None] = lambda error: None,
    follower: Follower | None = None,
    executor: ThreadPoolExecutor | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """Creates an application that answers with `models.current`.

    The model is probed after start-up: /ready answers 503 until the probe has passed, and permanently if it fails, in
    which case `on_failure` is called. After the probe, `follower` changes the model while requests are answered.
    `executor` has the thread that loaded the model, see `Batcher`; `tracing` is closed when the application ends.
    """
    options = options or Options()
    batcher = Batcher(
        options.batch_tokens,
        options.max_queued_tokens or QUEUED_BATCHES * options.batch_tokens,
        executor=executor or ThreadPoolExecutor(1, "computing"),
    )
    metrics = _Metrics(batcher, models)
    batcher.on_batch = metrics.count_batch
    if follower is not None:
        follower.on_change = metrics.count_change

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        first_probe = _probe(models, batcher, options, on_failure)
        tasks = [
            asyncio.create_task(batcher.run()),
            asyncio.create_task(_follow_after_probe(first_probe, models, follower)),
        ]
        yield
        for task in tasks:
            task.cancel()
        batcher.close()
        if follower is not None:
            await follower.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title="Cappy",
        summary="Scores responses to instructions: how correct is this response?",
        version=cappy.__version__,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's page loads its script from another site
        redoc_url=None,
    )
    if options.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(options.origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    service = Service(models=models, batcher=batcher, limits=options.limits, keys=options.keys)
    paths = [(path, dialect) for dialect in DIALECTS for path in dialect.paths]
    extra_paths = ((path, _find_dialect(name)) for path, name in options.routes.items())
    paths += [entry for entry in extra_paths if entry not in paths]
    app.add_middleware(
        BrowserGuard, hosts=options.hosts, origins=options.origins, write_refusal=_make_refusal_writer(paths)
    )
    app.add_middleware(
        AccessLog,
        default_headers=lambda: models.current.headers(),
        observe=metrics.count_request,
        shutting_down=lambda: models.shutting_down,
    )
    app.add_exception_handler(HTTPException, _not_found)
    _add_routes(app, service, paths)
    _add_probes(app, models, metrics, options.ready_path)
    add_page(app, lambda: _describe_service(models))
    served_models = ServedModels(models=models, limits=options.limits, batch_tokens=options.batch_tokens)
    for dialect in DIALECTS:
        if dialect.add_routes is not None:
            dialect.add_routes(app, served_models)
    add_admin(app, models, follower, options.keys, options.webhook_secret)
    if tracing is not None:
        tracing.instrument(app)
    return app


async def _not_found(request: Request, error: Exception) -> Response:
    """Answers a request with an unknown path or method."""
    assert isinstance(error, HTTPException)  # noqa: S101 (the handler is only registered for this type)
    path, allowed = request.url.path, (error.headers or {}).get("Allow")
    text = f"{path}: no such path; GET /openapi.json lists them"
    if allowed:
        text = f"{request.method} {path}: this path only accepts {allowed}; see GET /openapi.json"
    return JSONResponse(error_body(error.status_code, text), status_code=error.status_code, headers=error.headers)


def _make_refusal_writer(paths: Sequence[tuple[str, Dialect]]) -> WriteRefusal:
    """Returns a function that writes a refusal in the shape of a path's dialects; for other paths, in our own."""
    patterns = [(compile_path(path)[0], dialect) for path, dialect in paths]

    def write_in_dialect(path: str, refusal: Refusal) -> Response:
        dialects = [dialect for pattern, dialect in patterns if pattern.match(path)]
        return write_refusal(dialects or [SCORE], refusal)

    return write_in_dialect


def _describe_service(models: Models) -> About:
    return About(
        service="scorer",
        model=models.current.name,
        version=models.current.version,
        former=models.former.version if models.former else None,
        calibrated=models.current.calibration is not None,
    )


def _add_routes(app: FastAPI, service: Service, paths: Sequence[tuple[str, Dialect]]) -> None:
    """Adds one POST route per path, even if dialects share it, and all request schemas to the OpenAPI document."""
    for path, path_entries in groupby(sorted(paths, key=lambda entry: entry[0]), key=lambda entry: entry[0]):
        _add_route(app, service, path, [dialect for _, dialect in path_entries])
    models = [(model, "validation") for _, dialect in paths for model in (dialect.request,)]
    default_openapi = app.openapi

    def openapi() -> dict[str, object]:
        document = default_openapi()
        _, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
        document["components"]["schemas"].update(definitions["$defs"])
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _add_route(app: FastAPI, service: Service, path: str, dialects: Sequence[Dialect]) -> None:
    async def answer(request: Request) -> Response:
        return await service.answer(request, dialects)

    schemas = [{"$ref": f"#/components/schemas/{dialect.request.__name__}"} for dialect in dialects]
    body = {"required": True, "content": {"application/json": {"schema": _any_of(schemas)}}}
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", path)
    ]
    error_response = {"model": _union([dialect.error_response for dialect in dialects])}
    app.add_api_route(
        path,
        answer,
        methods=["POST"],
        response_model=None,
        responses={
            200: {"model": _union([dialect.response for dialect in dialects])},
            **dict.fromkeys((*ERROR_STATUSES, *(dialect.invalid_status for dialect in dialects)), error_response),
        },
        openapi_extra={"requestBody": body, "parameters": parameters},
        operation_id="_".join([*(dialect.name for dialect in dialects), *re.findall(r"\w+", path)]),
        summary=f"Scores for clients of: {', '.join(dialect.name for dialect in dialects)}",
        tags=["scoring"],
    )


def _any_of(schemas: Sequence[Mapping[str, object]]) -> Mapping[str, object]:
    return schemas[0] if len(schemas) == 1 else {"anyOf": list(schemas)}


def _union(models: Sequence[type[BaseModel]]) -> object:
    """The union type of these models, for FastAPI's OpenAPI document."""
    return reduce(operator.or_, models)


def _find_dialect(name: str) -> Dialect:
    return next(dialect for dialect in DIALECTS if dialect.name == name)


async def _follow_after_probe(first_probe: Awaitable[None], models: Models, follower: Follower | None) -> None:
    """Runs the follower once the first model has passed its probe."""
    await first_probe
    if follower is not None and not models.not_loaded_reason:
        await follower.run()


def _collect_garbage() -> None:
    gc.collect()


async def _probe(models: Models, batcher: Batcher, options: Options, on_failure: Callable[[CappyError], None]) -> None:
    try:
        await batcher.run_between_batches(lambda: probe(models.current, models.current.probes or options.probes))
        # Reference cycles left by loading would keep the first model in memory after a swap.
        await batcher.run_between_batches(_collect_garbage)
        models.not_loaded_reason = ""
    except CappyError as error:
        models.not_loaded_reason = str(error)
        LOGGER.error("not ready: %s", error)
        on_failure(error)


class _Metrics:
    """Prometheus metrics of one application: queue, batches, latency, scores and version; no texts of clients."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, batcher: Batcher, models: Models) -> None:
        self._registry = registry = CollectorRegistry()
        self._models = models
        self._requests = Counter("cappy_requests", "Requests", ["dialect", "status"], registry=registry)
        self._seconds = Histogram(
            "cappy_request_seconds",
            "Seconds from the headers of a request to its response",
            ["dialect"],
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._pairs = Counter("cappy_pairs", "Pairs scored", registry=registry)
        self._truncated = Counter(
            "cappy_pairs_cut", "Pairs that were truncated to the scorer's length", registry=registry
        )
        self._scores = Histogram("cappy_score", "Scores", buckets=SCORES_BUCKETS, registry=registry)
        self._tokens = Histogram("cappy_batch_tokens", "Tokens in a batch", buckets=TOKENS_BUCKETS, registry=registry)
        self._batches = Histogram(
            "cappy_batch_seconds", "Seconds to compute a batch", buckets=SECONDS_BUCKETS, registry=registry
        )
        self._swaps = Counter("cappy_swap", "Changes of the model", registry=registry)
        self._refused = Counter("cappy_swap_refused", "Versions that were refused", registry=registry)
        self._model = Gauge("cappy_model_info", "The current model", ["model", "version", "sha256"], registry=registry)
        Gauge("cappy_queue_tokens", "Tokens that are queued or being computed", registry=registry).set_function(
            lambda: batcher.queued_tokens
        )
        Gauge("cappy_ready", "Whether the service is ready", registry=registry).set_function(
            lambda: not models.unready_reason
        )

    def count_batch(self, tokens: int, pairs: int, seconds: float, num_truncated: int = 0) -> None:
        """Counts a batch, its pairs and those that were truncated."""
        self._truncated.inc(num_truncated)
        self._tokens.observe(tokens)
        self._batches.observe(seconds)
        self._pairs.inc(pairs)

    def count_request(self, dialect: str, status: int, seconds: float, scores: Sequence[float]) -> None:
        """Counts a request and its scores."""
        self._requests.labels(dialect, str(status)).inc()
        self._seconds.labels(dialect).observe(seconds)
        for score in scores:
            self._scores.observe(score)

    def count_change(self, change: Literal["swap", "refusal"]) -> None:
        """Counts a change of the model or a refused version."""
        (self._swaps if change == "swap" else self._refused).inc()

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        model = self._models.current
        self._model.clear()
        self._model.labels(model.name, model.version, model.sha256).set(1)
        return generate_latest(self._registry)


class Health(BaseModel):
    """Liveness of the process."""

    status: Annotated[Literal["ok"], Field(description="Always ok")] = "ok"


class Readiness(BaseModel):
    """Readiness of the service."""

    ready: Annotated[
        bool, Field(description="Whether the scorer has passed its probe and the service is not shutting down")
    ]
    version: Annotated[str, Field(description="Version of the scorer")]
    reason: Annotated[str, Field(description="Why the service is not ready; empty if it is")] = ""


def _add_probes(app: FastAPI, models: Models, metrics: _Metrics, ready_path: str = "") -> None:
    """Adds GET /health, /startup, /ready, `ready_path` and /metrics, none of which needs a key."""

    @app.get("/health", tags=["probes"])
    async def health() -> Health:
        """Liveness of the process; answers while scores are computed."""
        return Health()

    async def ready(response: Response) -> Readiness:
        """Readiness: false until the scorer has passed its probe, and after SIGTERM."""
        response.status_code = 503 if models.unready_reason else 200
        return Readiness(ready=not models.unready_reason, version=models.current.version, reason=models.unready_reason)

    for path in {"/ready", "/startup", ready_path} - {"", "/health"}:
        app.get(path, responses={503: {"model": Readiness}}, tags=["probes"], name=path.strip("/"))(ready)

    @app.get("/metrics", tags=["probes"], response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def read_metrics() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(metrics.render(), media_type=metrics.content_type)
