"""Spans, as a collector on this machine gets them by OTLP over HTTP."""

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from chat_server import Model, serving
from fastapi.testclient import TestClient
from gateway_server import gateway, scoring
from local_server import handled_by
from scoring_function import FakeEngine, model, until_ready
from wording import assert_names

from serving.access import Tracing, start_tracing
from serving.app import create_app
from serving.engine import Models
from serving.gateway.app import create_app as create_gateway_app

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def installed() -> bool:
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


needs_exporter = pytest.mark.skipif(not installed(), reason="no exporter here; pip install -e '.[otel]'")


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every span that a collector got, with its resource; the environment names the collector."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
        ExportTraceServiceRequest,
        ExportTraceServiceResponse,
    )

    spans: list[Any] = []

    class Collector(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            body = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
            for result in body.resource_spans:
                own = {one.key: one.value.string_value for one in result.resource.attributes}
                spans.extend((self.path, own, span) for part in result.scope_spans for span in part.spans)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    with handled_by(Collector) as address:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        yield spans


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


@needs_exporter
def test_each_request_of_a_dialect_is_a_span_that_continues_its_clients_trace(received: list[Any]) -> None:
    def score(pair: tuple[str, str]) -> float:
        if pair[0] == "bad":
            raise RuntimeError
        return 0.5

    result = start_tracing()
    assert result is not None
    started = time.time_ns()
    with TestClient(create_app(Models(model(FakeEngine(score=score, delay=0.05))), tracing=result)) as client:
        until_ready(client)
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine-1"}
        client.post("/score", json={"pairs": [["secret", "b"], ["secret", "bc"]]}, headers=headers)
        client.post("/v2/rerank", json={"query": "secret"})
        client.post("/score?secret=secret", json={"pairs": [["bad", "b"]]}, headers={"User-Agent": "secret"})
        client.post("/v1/models/secret:predict", json={"instances": [["secret", "b"]]})
    assert {(path, own["service.name"]) for path, own, _ in received} == {("/v1/traces", "cappy")}
    spans = [span for _, _, span in received]
    names = [span.name for span in spans]
    routes = ["/score", "/v2/rerank", "/score", "/v1/models/{model}:predict"]
    assert names == [f"POST {route}" for route in routes], "probes and pages have none"
    first = spans[0]
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (TRACE, PARENT)
    assert spans[1].trace_id.hex() != TRACE
    assert started < first.start_time_unix_nano < first.end_time_unix_nano < time.time_ns()
    assert first.end_time_unix_nano - first.start_time_unix_nano > 5e7
    actual = attributes(first)
    assert 0 < actual.pop("cappy.batch_wait_seconds") < 5
    assert actual == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/score",
        "cappy.dialect": "score",
        "cappy.pairs": 2,
        "cappy.tokens": 17,
        "cappy.version": "abc",
        "cappy.request_id": "mine-1",
    }
    assert [attributes(span)["http.response.status_code"] for span in spans] == [200, 400, 500, 404]
    assert [span.status.code for span in spans] == [0, 0, 2, 0]
    assert b"secret" not in b"".join(span.SerializeToString() for span in spans)


@needs_exporter
@pytest.mark.parametrize("stream", [False, True])
def test_each_chat_of_the_gateway_is_a_span_whatever_becomes_of_it(received: list[Any], stream: bool) -> None:
    def score(response: str) -> float:
        if broken:
            raise RuntimeError(f"no score for {response} secret")
        return 0.5

    broken, result = False, start_tracing()
    body = {"model": "m", "messages": [{"role": "user", "content": "secret"}], "stream": stream}
    with serving(Model()) as upstream:
        made = create_gateway_app(gateway(upstream, scoring=scoring(score)), tracing=result)
        with TestClient(made, raise_server_exceptions=False) as client:
            headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine-1"}
            client.post("/v1/chat/completions", json=body, headers=headers)
            client.get("/health")
            client.post("/v1/chat/completions", json={})
            broken = True
            client.post("/v1/chat/completions", json={**body, "stream": False})
    spans = [span for _, _, span in received]
    assert [span.name for span in spans] == ["POST /v1/chat/completions"] * 3
    assert (spans[0].trace_id.hex(), spans[0].parent_span_id.hex()) == (TRACE, PARENT)
    known = [attributes(span) for span in spans]
    assert [one["cappy.outcome"] for one in known] == ["answered", "error", "error"]
    assert (known[0]["cappy.request_id"], known[0]["cappy.sampled"], known[0]["cappy.calls"]) == ("mine-1", 4, 1)
    assert [one["http.response.status_code"] for one in known] == [200, 400, 500]
    assert [span.status.code for span in spans] == [0, 0, 2]
    assert b"secret" not in b"".join(span.SerializeToString() for span in spans)


@needs_exporter
def test_a_collector_that_is_away_keeps_no_answer_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    with TestClient(create_app(Models(model()), tracing=Tracing())) as client:
        until_ready(client)
        assert client.post("/score", json={"pairs": [["a", "b"]]}).status_code == 200


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "true"},
    ],
)
def test_where_nobody_takes_spans_there_are_none(variables: dict[str, str]) -> None:
    assert start_tracing(variables) is None


def test_without_the_extra_a_line_says_how_to_install_it_and_the_service_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert start_tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}) is None
    (line,) = [record.getMessage() for record in caplog.records if record.name == "serving"]
    assert_names(line, "opentelemetry.exporter", "pip install -e '.[otel]'")


def test_unless_it_is_asked_for_nothing_of_opentelemetry_is_loaded() -> None:
    program = (
        "import json, sys, serving.server; from serving.access import start_tracing; assert start_tracing({}) is None;"
        "found = [name for name in sys.modules if name.startswith('opentelemetry')];"
        "print(json.dumps([name for name in found if 'exporter' in name or 'instrumentation' in name]))"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert json.loads(done.stdout) == []
