"""Spans for OpenTelemetry: one per request of a dialect, sent by OTLP over HTTP, without a word of any text.

Nothing of OpenTelemetry is imported, and nothing is measured, where no environment variable says who takes them.
"""

import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LOGGER = logging.getLogger("serving")
VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""Where a collector listens; the other variables of OpenTelemetry's specification are read by its library."""
CLOSING_SECONDS = 3.0
"""How long spans that wait may hold up the end of the process."""
DISABLED = "OTEL_SDK_DISABLED"
SERVICE = "cappy"
"""The service's name, where OTEL_SERVICE_NAME gives no other."""


@dataclass(frozen=True, kw_only=True)
class Traced:
    """What a span says of a request; times in nanoseconds since 1970."""

    method: str
    dialect: str
    status: int
    began: int
    ended: int
    pairs: int
    tokens: int
    wait_seconds: float
    """From the queue to the first batch."""
    version: str
    request_id: str


class Tracing:
    """Makes spans and sends them in batches, from a thread of their own."""

    def __init__(self) -> None:
        """ModuleNotFoundError without the extra."""
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": SERVICE}
        # A provider of our own: the global one belongs to whoever runs us in his process, MLflow among them.
        self._provider: Any = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("serving")
        self._context = TraceContextTextMapPropagator()
        self._server = trace.SpanKind.SERVER
        self._error = trace.Status(trace.StatusCode.ERROR)

    def tell(self, traced: Traced, headers: Mapping[str, str]) -> None:
        """Sends a span, a child of the one that W3C's `traceparent` names."""
        span = self._tracer.start_span(
            f"{traced.method} {traced.dialect}",
            context=self._context.extract(headers),
            kind=self._server,
            start_time=traced.began,
            attributes={
                "http.request.method": traced.method,
                "http.response.status_code": traced.status,
                "cappy.dialect": traced.dialect,
                "cappy.pairs": traced.pairs,
                "cappy.tokens": traced.tokens,
                "cappy.batch_wait_seconds": traced.wait_seconds,
                "cappy.version": traced.version,
                "cappy.request_id": traced.request_id,
            },
        )
        if traced.status >= 500:
            span.set_status(self._error)
        span.end(traced.ended)

    def close(self) -> None:
        """Sends what waits; blocks, but not for long where the collector is away."""
        closing = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        closing.start()
        closing.join(CLOSING_SECONDS)


def tracing(variables: Mapping[str, str] = os.environ) -> Tracing | None:
    """What sends spans; None where nobody is named to take them, and, with a line in the log, without the extra."""
    if not any(variables.get(name) for name in VARIABLES) or variables.get(DISABLED, "").lower() == "true":
        return None
    try:
        return Tracing()
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        text = "requests are not traced: %s is not installed; install the otel extra: pip install -e '.[otel]'"
        LOGGER.warning(text, error.name)
        return None
