"""Around every request: its id, the headers of every answer, and the access log, without a word of what was asked."""

import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.tracing import Traced, Tracing

LOGGER = logging.getLogger("serving.access")
GIVEN_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
PATH_SHOWN = 500
SAFE = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
"""Headers of an answer that says nothing else; the page brings a policy of its own."""


def _no_facts() -> Mapping[str, str]:
    return {}


def _untold(dialect: str, status: int, seconds: float, scores: Sequence[float]) -> None:
    pass


class AccessLog:
    """ASGI middleware: one JSON line per request with its id, method, path, status, seconds and number of pairs.

    `facts` gives headers for answers that bring none of their own; `told` is called with dialect, status, seconds and
    scores of requests of a dialect, of which `tracing` makes spans; while `closing` is true, clients are told to come
    back on another connection.
    """

    def __init__(
        self,
        app: ASGIApp,
        facts: Callable[[], Mapping[str, str]] = _no_facts,
        told: Callable[[str, int, float, Sequence[float]], None] = _untold,
        closing: Callable[[], bool] = lambda: False,
        tracing: Tracing | None = None,
    ) -> None:
        self._app = app
        self._facts = facts
        self._told = told
        self._closing = closing
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state: dict[str, Any] = scope.setdefault("state", {})
        given = Headers(scope=scope).get("x-request-id", "")
        state["request_id"] = given if GIVEN_ID.fullmatch(given) else uuid.uuid4().hex
        started, status = time.monotonic(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._mark(MutableHeaders(scope=message), state)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            self._log(scope, state, status, time.monotonic() - started)

    def _mark(self, headers: MutableHeaders, state: Mapping[str, Any]) -> None:
        facts = {"X-Request-Id": state["request_id"], **SAFE, **(state.get("facts") or self._facts())}
        for name, value in facts.items():
            headers.setdefault(name, value)
        if self._closing():
            headers["Connection"] = "close"

    def _log(self, scope: Scope, state: Mapping[str, Any], status: int, seconds: float) -> None:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request_id": state["request_id"],
            "method": scope["method"],
            "path": scope["path"][:PATH_SHOWN],
            "status": status,
            "seconds": round(seconds, 4),
            "pairs": state.get("pairs", 0),
        }
        if "dialect" in state:
            line["dialect"] = state["dialect"]
            self._told(state["dialect"], status, seconds, state.get("scores", ()))
            if self._tracing is not None:
                self._trace(self._tracing, scope, state, status, seconds)
        LOGGER.info(json.dumps(line))

    def _trace(self, tracing: Tracing, scope: Scope, state: Mapping[str, Any], status: int, seconds: float) -> None:
        ended = time.time_ns()
        facts = state.get("facts") or self._facts()
        traced = Traced(
            method=scope["method"],
            dialect=state["dialect"],
            status=status,
            began=ended - int(seconds * 1e9),
            ended=ended,
            pairs=state.get("pairs", 0),
            tokens=state.get("tokens", 0),
            wait_seconds=state.get("wait_seconds", 0.0),
            version=facts.get("X-Cappy-Version", ""),
            request_id=state["request_id"],
        )
        tracing.tell(traced, Headers(scope=scope))
