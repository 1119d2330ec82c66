"""What a platform asks: whether the process lives, has started and can score; and what is served."""

from typing import Annotated, Literal

from fastapi import FastAPI, Response
from pydantic import BaseModel, Field

from serving.metrics import Metrics
from serving.models import Models


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
