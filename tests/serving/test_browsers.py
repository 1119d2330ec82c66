"""What a page of a stranger may not have a browser ask: the service, and the gateway with its owner's money."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from chat_server import Model, serving
from fastapi.testclient import TestClient
from gateway_server import gateway
from scoring_function import FakeEngine
from starlette.responses import Response
from starlette.types import Message
from wording import assert_names, raises_naming

from cappy.errors import ConfigError
from serving.app import Options
from serving.config import ServeConfig, hosts_from_environment
from serving.dialects import DIALECTS
from serving.gateway.app import Access, create_app
from serving.guards import BrowserGuard, Hosts, hosts_of

Serve = Callable[..., TestClient]
PAIR = '{"pairs": [["a", "b"]]}'
CHAT = '{"model": "m", "messages": [{"role": "user", "content": "hello"}]}'
JSON_TYPE = {"content-type": "application/json"}
LOOPBACK = Hosts(loopback=True)


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def front(model: Model) -> Iterator[Callable[..., TestClient]]:
    """front(access) -> a client of a gateway."""
    with serving(model) as upstream, ExitStack() as stack:

        def start(access: Access | None = None) -> TestClient:
            return stack.enter_context(TestClient(create_app(gateway(upstream), access=access)))

        yield start


def sentence(body: Any) -> str:
    """What a refusal says, in whatever shape."""
    result = body.get("detail") or body.get("message") or body.get("error")
    return str(result["message"] if isinstance(result, dict) else result)


SIMPLE = [None, "text/plain", "text/plain; charset=application/json", "application/x-www-form-urlencoded", "text/json"]


@pytest.mark.parametrize("kind", SIMPLE)
def test_a_body_that_a_page_may_send_without_asking_is_415_in_every_dialects_shape(
    serve: Serve, kind: str | None
) -> None:
    engine = FakeEngine()
    client = serve(engine)
    probes = len(engine.batches)
    for dialect in DIALECTS:
        if kind is None and "" in dialect.content_types:
            continue
        path = dialect.paths[0].format(model="cappy")
        answer = client.post(path, content=PAIR, headers={} if kind is None else {"content-type": kind})
        assert answer.status_code == 415, dialect.name
        assert "Content-Type: application/json" in sentence(answer.json())
        assert set(dialect.error_body(415, "")) <= set(answer.json())
    assert len(engine.batches) == probes


@pytest.mark.parametrize("kind", SIMPLE)
def test_such_a_body_asks_no_llm_and_keeps_no_feedback(
    front: Callable[..., TestClient], model: Model, kind: str | None
) -> None:
    headers = {} if kind is None else {"content-type": kind}
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/feedback", '{"id": "x", "score": 1}')):
        answer = front().post(path, content=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_content_type")
    assert model.asked == []


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "application/problem+json"])
def test_json_is_taken_under_every_name_of_it(serve: Serve, kind: str) -> None:
    assert serve().post("/score", content=PAIR, headers={"content-type": kind}).status_code == 200


def test_open_inference_takes_the_types_that_its_clients_send(serve: Serve) -> None:
    for headers in ({}, {"content-type": "application/octet-stream"}):
        assert serve().post("/v2/models/cappy/infer", content="{}", headers=headers).status_code == 400
        assert serve().post("/score", content=PAIR, headers=headers).status_code == 415


STRANGERS = [
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "http://testserver:81"},
    {"origin": "http://testserver.evil.example"},
    {"origin": "http://other@testserver"},
    {"origin": "file://testserver"},
    {"origin": "http://[::1"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"},
    {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"},
]


@pytest.mark.parametrize("headers", STRANGERS, ids=str)
def test_pages_of_other_origins_are_403_before_anything_is_done(
    serve: Serve, front: Callable[..., TestClient], model: Model, headers: dict[str, str]
) -> None:
    engine = FakeEngine()
    client, chat = serve(engine), front()
    probes = len(engine.batches)
    asks = [client.post("/score", content=PAIR, headers={**headers, **JSON_TYPE})]
    asks += [client.post(path, headers=headers) for path in ("/admin/rollback", "/webhooks/mlflow", "/nowhere")]
    asks += [client.get(path, headers=headers) for path in ("/", "/ready", "/metrics", "/v1/models", "/openapi.json")]
    asks += [chat.post("/v1/chat/completions", content=CHAT, headers={**headers, **JSON_TYPE})]
    asks += [chat.post("/v1/feedback", content="{}", headers={**headers, **JSON_TYPE})]
    asks += [chat.get(path, headers=headers) for path in ("/", "/health", "/ready", "/metrics", "/v1/models")]
    for answer in asks:
        assert answer.status_code == 403, answer.request.url
        assert "--allow-origin" in sentence(answer.json())
        assert "access-control-allow-origin" not in answer.headers
    assert (len(engine.batches), model.asked) == (probes, [])


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("testserver", "http://testserver"),
        ("TestServer", "http://testserver"),
        ("testserver:80", "http://testserver"),
        ("testserver:8080", "http://testserver:8080"),
        ("testserver", "https://testserver"),
        ("testserver:443", "https://testserver"),
        ("[::1]:8080", "http://[::1]:8080"),
    ],
)
def test_the_services_own_page_asks_behind_a_proxy_that_ends_tls_too(serve: Serve, host: str, origin: str) -> None:
    headers = {"host": host, "origin": origin, "sec-fetch-site": "same-origin", **JSON_TYPE}
    assert serve().post("/score", content=PAIR, headers=headers).status_code == 200


def test_a_link_to_the_page_is_followed_and_clients_that_are_no_browsers_send_no_origin(serve: Serve) -> None:
    client = serve()
    opened = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert client.get("/", headers=opened).status_code == 200
    assert client.post("/score", content=PAIR, headers={**opened, **JSON_TYPE}).status_code == 403, "a form"
    assert client.get("/", headers={"sec-fetch-site": "none"}).status_code == 200
    assert client.post("/score", content=PAIR, headers=JSON_TYPE).status_code == 200


def test_a_page_is_let_in_by_name_alone_and_only_its_preflights_are_answered(
    serve: Serve, front: Callable[..., TestClient]
) -> None:
    ours, asks = "https://our.example", {"access-control-request-method": "POST"}
    clients = [
        (serve(options=Options(origins=[ours])), "/score", PAIR),
        (front(Access(origins=[ours])), "/v1/chat/completions", CHAT),
    ]
    for client, path, body in clients:
        answer = client.post(path, content=body, headers={"origin": ours, **JSON_TYPE})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, ours)
        assert client.options(path, headers={"origin": ours, **asks}).status_code == 200
        other = client.options(path, headers={"origin": "https://evil.example", **asks})
        assert (other.status_code, other.headers.get("access-control-allow-origin")) == (403, None)
    open_to_all = serve(options=Options(origins=["*"]))
    assert open_to_all.post("/score", content=PAIR, headers={"origin": "null", **JSON_TYPE}).status_code == 200


@pytest.mark.parametrize("name", ["evil.example", "127.0.0.1.evil.example", "10.0.0.7", "localhost.evil.example"])
def test_on_this_machine_alone_a_name_that_somebody_points_here_is_421_for_every_path(
    serve: Serve, front: Callable[..., TestClient], model: Model, name: str
) -> None:
    hosts = Hosts(loopback=True, allowed=["testserver"])
    clients = (serve(options=Options(hosts=hosts)), front(Access(hosts=hosts)))
    for client in clients:
        for path in ("/", "/health", "/ready", "/about", "/v1/models", "/nowhere"):
            answer = client.get(path, headers={"host": f"{name}:8080"})
            assert answer.status_code == 421, path
            assert_names(sentence(answer.json()), f"'{name}'", "--allowed-hosts")
        path = "/score" if client is clients[0] else "/v1/chat/completions"
        headers = {"host": name, **JSON_TYPE}
        assert client.post(path, content=PAIR, headers=headers).status_code == 421
    assert model.asked == []


@pytest.mark.parametrize(
    ("hosts", "allowed", "refused"),
    [
        (
            LOOPBACK,
            ["localhost", "LOCALHOST", "localhost.", "127.0.0.1", "127.9.9.9", "[::1]", "[::ffff:127.0.0.1]"],
            ["0.0.0.0", "127.1", "192.0.2.7", "scores.example", "cappy", "cappy.svc"],
        ),
        (Hosts(loopback=True, allowed=["scores.example"]), ["scores.example", "localhost"], ["a.scores.example"]),
        (
            Hosts(loopback=True, allowed=["*.scores.example"]),
            ["a.scores.example"],
            ["scores.example", "ascores.example"],
        ),
        (
            Hosts(),
            [
                "192.0.2.7",
                "[2001:db8::1]",
                "cappy",
                "cappy.ns.svc",
                "cappy.ns.svc.cluster.local",
                "box.local",
                "localhost",
            ],
            ["evil.example", "192.0.2.7.evil.example", "svc.example", "xlocal.example"],
        ),
        (Hosts(keys=True), ["anything.example"], []),
        (Hosts(allowed=["*"], loopback=True), ["anything.example"], []),
    ],
)
def test_which_names_are_a_services_own(hosts: Hosts, allowed: list[str], refused: list[str]) -> None:
    assert [name for name in allowed if not hosts.allow(name)] == []
    assert [name for name in refused if hosts.allow(name)] == []


def test_the_address_that_is_listened_on_decides() -> None:
    for address, loopback in (("127.0.0.1", True), ("0.0.0.0", False)):
        with socket.create_server((address, 0)) as listener:
            assert hosts_of(listener, (), keys=False).loopback is loopback


@pytest.mark.parametrize("host", ["", "a b", "user@testserver", "testserver:80:80", "testserver:x", "[::1", "a/b", "é"])
def test_a_host_header_that_is_none_is_400(serve: Serve, host: str) -> None:
    answer = serve().get("/health", headers=[(b"host", host.encode("latin-1"))])
    assert (answer.status_code, "Host header" in answer.text) == (400, True)


@pytest.mark.parametrize(
    ("version", "headers", "status"),
    [
        ("1.0", [], 200),
        ("1.1", [], 400),
        ("1.0", [(b"host", b"evil.example")], 421),
        ("1.0", [(b"host", b"")], 400),
        ("1.0", [(b"origin", b"http://evil.example")], 400),
        ("1.0", [(b"sec-fetch-site", b"cross-site")], 400),
    ],
)
def test_a_balancer_of_http_1_0_needs_no_host_and_a_browser_does(
    version: str, headers: list[tuple[bytes, bytes]], status: int
) -> None:
    guard = BrowserGuard(Response("ok"), LOOPBACK, (), lambda path, refusal: Response(status_code=refusal.status))
    statuses = []

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        statuses.append(message.get("status"))

    scope = {"type": "http", "http_version": version, "method": "GET", "path": "/health", "headers": headers}
    asyncio.run(guard({**scope, "scheme": "http"}, receive, send))
    assert statuses[0] == status


def test_two_host_headers_are_400(serve: Serve) -> None:
    assert serve().get("/health", headers=[("host", "testserver"), ("host", "evil.example")]).status_code == 400


def test_names_come_from_the_flag_or_the_environment_and_what_is_no_name_is_one_line() -> None:
    assert hosts_from_environment({"CAPPY_ALLOWED_HOSTS": "a.example, *.b.example"}) == ("a.example", "*.b.example")
    assert ServeConfig(allowed_hosts=("c.example, d.example",)).hosts == ["c.example", "d.example"]
    for name in ("https://a.example", "a.example:80", "a*.example", "a b"):
        with raises_naming(ConfigError, f"--allowed-hosts '{name}'", "*.example"):
            ServeConfig(allowed_hosts=(name,))
    with pytest.raises(ConfigError, match="^CAPPY_ALLOWED_HOSTS"):
        hosts_from_environment({"CAPPY_ALLOWED_HOSTS": "a/b"})
