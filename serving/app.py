"""The HTTP application around one function that scores pairs; it knows no model and no environment."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

import cappy
from cappy.errors import CappyError
from serving.access import AccessLog
from serving.limits import BodyLimit
from serving.schemas import Health, Problem, Readiness, ScoreRequest, ScoreResponse

Score = Callable[[list[tuple[str, str]]], list[float]]

MAX_BODY_BYTES = 8_000_000
MAX_PAIRS = 1024
LOGGER = logging.getLogger("serving")


@dataclass
class _State:
    reason: str = "the probe is running; ask again"


def create_app(
    score: Score,
    *,
    version: str,
    verify: Callable[[], None] | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_pairs: int = MAX_PAIRS,
) -> FastAPI:
    """An application that answers with `score`, one request at a time in a thread of its own.

    `verify` runs once in that thread after start-up; /ready answers 503 until it returns, and for good if it raises a
    CappyError.
    """
    state = _State()
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scoring")

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        probe = asyncio.create_task(_verified(state, worker, verify))
        yield
        probe.cancel()
        worker.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="Cappy",
        summary="Scores responses to instructions: how correct is this response?",
        version=cappy.__version__,
        lifespan=lifespan,
        docs_url=None,  # the page would load its script from another site
        redoc_url=None,
    )
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    app.add_middleware(AccessLog)
    app.add_exception_handler(RequestValidationError, _refused)
    _add_score(app, score, version, worker, max_pairs)
    _add_probes(app, version, state)
    return app


def _add_score(app: FastAPI, score: Score, version: str, worker: ThreadPoolExecutor, max_pairs: int) -> None:
    @app.post("/score", responses={413: {"model": Problem}, 422: {"model": Problem}}, tags=["scoring"])
    async def score_pairs(body: ScoreRequest, request: Request) -> ScoreResponse:
        """Scores of the pairs, in their order."""
        request.state.pairs = len(body.pairs)
        if len(body.pairs) > max_pairs:
            raise HTTPException(413, f"{len(body.pairs)} pairs are above {max_pairs}; send them in several requests")
        scores = await asyncio.get_running_loop().run_in_executor(worker, score, body.pairs)
        return ScoreResponse(scores=scores, version=version)


def _add_probes(app: FastAPI, version: str, state: _State) -> None:
    @app.get("/health", tags=["probes"])
    async def health() -> Health:
        """Whether the process lives; answers while scores are computed."""
        return Health()

    @app.get("/ready", responses={503: {"model": Readiness}}, tags=["probes"])
    async def ready(response: Response) -> Readiness:
        """Whether the scorer is loaded and has answered its probe."""
        response.status_code = 503 if state.reason else 200
        return Readiness(ready=not state.reason, version=version, reason=state.reason)


async def _verified(state: _State, worker: ThreadPoolExecutor, verify: Callable[[], None] | None) -> None:
    try:
        if verify is not None:
            await asyncio.get_running_loop().run_in_executor(worker, verify)
        state.reason = ""
    except CappyError as error:
        state.reason = str(error)
        LOGGER.error("not ready: %s", error)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    """One line that names the field and the rule, and does not repeat what was sent."""
    assert isinstance(error, RequestValidationError)  # noqa: S101 (what the handler is registered for)
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
    more = f" (and {len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
    shape = 'send {"pairs": [["instruction", "response"], ...]}'
    rule = first["msg"].removeprefix("Value error, ")
    return JSONResponse({"detail": f"{field}: {rule}{more}; {shape}"}, status_code=422)
