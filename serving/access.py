"""Request ids, response headers, the access log and OpenTelemetry spans; none of them contains a client's text.

OpenTelemetry's instrumentation of FastAPI creates the spans, which are exported by OTLP over HTTP. OpenTelemetry is
imported only if an environment variable names a collector.
"""

import json
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

LOGGER = logging.getLogger("serving")
ACCESS_LOGGER = logging.getLogger("serving.access")
VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
MAX_PATH_CHARACTERS = 500
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
"""Defaults, for responses that do not set these headers.

The HTML page (`serving.page`) sets its own Content-Security-Policy.
"""
COLLECTOR_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""Address of the collector; OpenTelemetry's library reads the other variables of its specification."""
SHUTDOWN_SECONDS = 3.0
"""How long exporting the queued spans may delay the end of the process, in seconds."""
EXPORTED_ATTRIBUTES = frozenset({"http.request.method", "http.response.status_code", "http.route"})
"""The instrumentation's attributes that are exported; the others contain text from clients (paths, queries)."""
ATTRIBUTE_PREFIX = "cappy."
STATE_ATTRIBUTES = (
    "request_id",
    "dialect",
    "pairs",
    "tokens",
    "batch_wait_seconds",
    "outcome",
    "sampled",
    "calls",
    "cost",
)
"""Entries of the request's state that become attributes of its span."""

State = dict[str, Any]
"""Starlette's state of a request: its handlers and middleware store values in it."""


class Span(Protocol):
    """The part of OpenTelemetry's span that is used here."""

    def set_attributes(self, attributes: Mapping[str, str | int | float]) -> None:
        """Adds attributes to the span."""


class AccessLog:
    """ASGI middleware: one JSON line per request with its id, method, path, status, seconds and number of pairs.

    `default_headers` returns headers for responses whose request state has no `headers`. `observe` is called with
    dialect, status, seconds and scores after each request for scores. While `shutting_down` returns true, responses ask
    the client to close the connection.
    """

    def __init__(
        self,
        app: ASGIApp,
        default_headers: Callable[[], Mapping[str, str]] = dict,
        observe: Callable[[str, int, float, Sequence[float]], None] | None = None,
        shutting_down: Callable[[], bool] = lambda: False,
    ) -> None:
        self._app = app
        self._default_headers = default_headers
        self._observe = observe
        self._shutting_down = shutting_down

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state: State = scope.setdefault("state", {})
        header = Headers(scope=scope).get("x-request-id", "")
        state["request_id"] = header if VALID_REQUEST_ID.fullmatch(header) else uuid.uuid4().hex
        start, status = time.monotonic(), 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._add_headers(MutableHeaders(scope=message), state)
                self._set_span_attributes(state)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            # The handler that answers is outside this middleware, so `send_with_headers` was not called.
            self._set_span_attributes(state)
            raise
        finally:
            self._log(scope, state, status, time.monotonic() - start)

    def _add_headers(self, headers: MutableHeaders, state: State) -> None:
        for name, value in {
            "X-Request-Id": state["request_id"],
            **SECURITY_HEADERS,
            **self._headers_for(state),
        }.items():
            headers.setdefault(name, value)
        if self._shutting_down():
            headers["Connection"] = "close"

    def _headers_for(self, state: State) -> Mapping[str, str]:
        return state.get("headers") or self._default_headers()

    def _set_span_attributes(self, state: State) -> None:
        """Sets our attributes on the request's span, if it has one and is a request for scores or completions.

        A span ends with the last part of the response, so this must be called before.
        """
        span: Span | None = state.get("span")
        if span is None or not {"dialect", "outcome"} & state.keys():
            return
        version = self._headers_for(state).get("X-Cappy-Version")
        attributes = {
            **{name: state[name] for name in STATE_ATTRIBUTES if name in state},
            **({"version": version} if version else {}),
        }
        span.set_attributes({f"{ATTRIBUTE_PREFIX}{name}": value for name, value in attributes.items()})

    def _log(self, scope: Scope, state: State, status: int, seconds: float) -> None:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request_id": state["request_id"],
            "method": scope["method"],
            "path": scope["path"][:MAX_PATH_CHARACTERS],
            "status": status,
            "seconds": round(seconds, 4),
            "pairs": state.get("pairs", 0),
        }
        if "dialect" in state:
            line["dialect"] = state["dialect"]
            if self._observe is not None:
                self._observe(state["dialect"], status, seconds, state.get("scores", ()))
        ACCESS_LOGGER.info(json.dumps(line))


class Tracing:
    """Creates a span for each request of an application and exports spans in batches from a background thread."""

    def __init__(self) -> None:
        """Raises ModuleNotFoundError if the otel extra is not installed."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        # The stable names of the semantic conventions; the library still defaults to the old ones.
        os.environ.setdefault("OTEL_SEMCONV_STABILITY_OPT_IN", "http")
        service_name = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "cappy"}
        # Not the global provider: that belongs to the program that imports us, or to MLflow.
        self._provider = TracerProvider(resource=Resource.create(service_name), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(_make_clean_exporter(OTLPSpanExporter())))
        self._instrument = FastAPIInstrumentor.instrument_app

    def instrument(self, app: FastAPI) -> None:
        """Gives every request a span, a child of the one named in the W3C `traceparent` header."""

        def store_span(span: Span, scope: Scope) -> None:
            scope.setdefault("state", {})["span"] = span

        self._instrument(
            app,
            server_request_hook=store_span,
            tracer_provider=self._provider,
            exclude_spans=["receive", "send"],
        )

    def close(self) -> None:
        """Exports the queued spans; blocks for at most `SHUTDOWN_SECONDS`."""
        thread = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        thread.start()
        thread.join(SHUTDOWN_SECONDS)


def start_tracing(variables: Mapping[str, str] = os.environ) -> Tracing | None:
    """Starts tracing; returns None if no collector is configured, or, with a warning, if the extra is not installed."""
    disabled = variables.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if disabled or not any(variables.get(name) for name in COLLECTOR_VARIABLES):
        return None
    try:
        return Tracing()
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        warning = "requests are not traced: %s is not installed; install the otel extra: pip install -e '.[otel]'"
        LOGGER.warning(warning, error.name)
        return None


def _make_clean_exporter(exporter: "SpanExporter") -> "SpanExporter":
    """Wraps an exporter so that it exports only spans that have our attributes.

    The wrapper drops their events, and any attribute that may contain text from clients.
    """
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
    from opentelemetry.trace import Status

    def clean_span(span: ReadableSpan) -> ReadableSpan:
        attributes = {
            name: value
            for name, value in (span.attributes or {}).items()
            if name in EXPORTED_ATTRIBUTES or name.startswith(ATTRIBUTE_PREFIX)
        }
        return ReadableSpan(
            name=span.name,
            context=span.context,
            parent=span.parent,
            resource=span.resource,
            attributes=attributes,
            kind=span.kind,
            instrumentation_scope=span.instrumentation_scope,
            status=Status(span.status.status_code),
            start_time=span.start_time,
            end_time=span.end_time,
        )

    class CleanSpanExporter(SpanExporter):  # type: ignore[misc] # the library has no types
        def export(self, spans: "Sequence[ReadableSpan]") -> "SpanExportResult":
            own_spans = [
                clean_span(span)
                for span in spans
                if any(name.startswith(ATTRIBUTE_PREFIX) for name in span.attributes or ())
            ]
            return exporter.export(own_spans) if own_spans else SpanExportResult.SUCCESS

        def shutdown(self) -> None:
            exporter.shutdown()

    return CleanSpanExporter()
