"""What a platform asks of the scorer's service: whether it lives and can score, and numbers for Prometheus."""

from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, Field

from serving.batcher import Batcher
from serving.models import Model, Models

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
SCORES = tuple(tenth / 10 for tenth in range(11))


class Metrics:
    """Queue, batches, latency, scores and version of one application, for Prometheus; without a word of any text."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, batcher: Batcher, models: Models) -> None:
        self._registry = own = CollectorRegistry()
        self._models = models
        self._requests = Counter("cappy_requests", "Requests", ["dialect", "status"], registry=own)
        self._seconds = Histogram(
            "cappy_request_seconds", "From a request's head to its answer", ["dialect"], buckets=SECONDS, registry=own
        )
        self._pairs = Counter("cappy_pairs", "Pairs scored", registry=own)
        self._cut = Counter("cappy_pairs_cut", "Pairs that were longer than the scorer reads", registry=own)
        self._scores = Histogram("cappy_score", "Scores", buckets=SCORES, registry=own)
        self._tokens = Histogram("cappy_batch_tokens", "Tokens of a batch", buckets=TOKENS, registry=own)
        self._batches = Histogram("cappy_batch_seconds", "Time of a batch", buckets=SECONDS, registry=own)
        self._swaps = Counter("cappy_swap", "Changes of the model", registry=own)
        self._refused = Counter("cappy_swap_refused", "Versions that may not serve", registry=own)
        self._model = Gauge("cappy_model_info", "The model that answers", ["model", "version", "sha256"], registry=own)
        Gauge("cappy_queue_tokens", "Tokens that wait or are computed", registry=own).set_function(
            lambda: batcher.queued_tokens
        )
        Gauge("cappy_ready", "Whether new clients may come", registry=own).set_function(lambda: not models.unready)

    def batch(self, tokens: int, pairs: int, seconds: float, cut: int = 0) -> None:
        """Counts a batch and the pairs of it that were cut."""
        self._cut.inc(cut)
        self._tokens.observe(tokens)
        self._batches.observe(seconds)
        self._pairs.inc(pairs)

    def request(self, dialect: str, status: int, seconds: float, scores: Sequence[float]) -> None:
        """Counts a request of a dialect."""
        self._requests.labels(dialect, str(status)).inc()
        self._seconds.labels(dialect).observe(seconds)
        for score in scores:
            self._scores.observe(score)

    def move(self, what: Literal["swap", "refusal"]) -> None:
        """Counts a change of the model, or a version that was refused."""
        (self._swaps if what == "swap" else self._refused).inc()

    def text(self) -> bytes:
        """What Prometheus reads."""
        model: Model = self._models.current
        self._model.clear()
        self._model.labels(model.name, model.version, model.sha256).set(1)
        return generate_latest(self._registry)


class Health(BaseModel):
    """That the process lives."""

    status: Annotated[Literal["ok"], Field(description="Always ok")] = "ok"


class Readiness(BaseModel):
    """Whether scores can be had."""

    ready: Annotated[bool, Field(description="Whether the scorer has answered its probe and the service stays up")]
    version: Annotated[str, Field(description="Version of the scorer")]
    reason: Annotated[str, Field(description="Why not, if not")] = ""


def add_probes(app: FastAPI, models: Models, metrics: Metrics, ready_path: str = "") -> None:
    """GET /health, /startup, /ready, what else is to answer as /ready does, and /metrics; they need no key."""

    @app.get("/health", tags=["probes"])
    async def health() -> Health:
        """Whether the process lives; answers while scores are computed."""
        return Health()

    async def ready(response: Response) -> Readiness:
        """Whether scores can be had: false before the scorer has answered its probe, and after SIGTERM."""
        response.status_code = 503 if models.unready else 200
        return Readiness(ready=not models.unready, version=models.current.version, reason=models.unready)

    for path in {"/ready", "/startup", ready_path} - {"", "/health"}:
        app.get(path, responses={503: {"model": Readiness}}, tags=["probes"], name=path.strip("/"))(ready)

    @app.get("/metrics", tags=["probes"], response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def read_metrics() -> Response:
        """Numbers for Prometheus."""
        return Response(metrics.text(), media_type=metrics.content_type)
