"""Whatever an LLM's server answers, the gateway's client gets an answer or a failed attempt, never a defect."""

import asyncio
import json
import logging
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

import httpx
import pytest
from foreign_server import BODIES, COMPRESSED, RESPONSES, Foreign, answering, completion, mutated, response, usage
from gateway_server import gateway as plain_gateway
from gateway_server import listening, sampled, scoring
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from local_server import handled_by
from wording import raises_naming

from cappy.errors import ConfigError
from cappy.sampling.endpoint import client as http_client
from serving.config import EVALUATION_HEADER
from serving.gateway import upstream
from serving.gateway.answering import MAX_SCORED_CHARACTERS, Gateway
from serving.gateway.config import SpendingLimits
from serving.gateway.errors import GatewayError
from serving.gateway.scoring import Scoring, load
from serving.gateway.upstream import LLM, Upstream

POLICY = sampled(candidates=2, round_size=2)
FAILED = {400, 422, 429, 502, 503}
"""What a client may get for a server that answers nonsense; 500 is a defect of ours."""


def gateway(server: str, **more: Any) -> Gateway:
    """A gateway whose scorer takes any text."""
    return plain_gateway(server, **{"scoring": scoring(lambda text: len(text) / 1e6), **more})


def strictly(text: str) -> Any:
    """The value of a JSON text that any parser reads."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def ask(url: str, **more: Any) -> httpx.Response:
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "n": 2, "max_tokens": 4096, **more}
    headers = {"Authorization": "Bearer sk-of-the-client", "x-cappy-candidates": "1"}
    return httpx.post(f"{url}/chat/completions", json=body, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def foreign() -> Foreign:
    return Foreign()


@pytest.fixture(scope="module")
def url(foreign: Foreign) -> Iterator[str]:
    with (
        answering(foreign) as server,
        listening(gateway(server, policy=POLICY, limits=SpendingLimits(max_seconds=30))) as result,
    ):
        yield result


def check(answer: httpx.Response, streamed: bool) -> None:
    if answer.status_code != 200:
        assert answer.status_code in FAILED, answer.text
        assert set(strictly(answer.text)["error"]) == {"message", "type", "param", "code"}
        return
    if not streamed:
        strictly(answer.text)
        return
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events, answer.text
    assert all(event == "[DONE]" or strictly(event) for event in events)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", BODIES)
def test_no_body_of_a_server_is_a_defect_of_the_gateway(
    foreign: Foreign, url: str, name: str, streamed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    foreign.parts = [response(BODIES[name]())]
    check(ask(url, stream=streamed), streamed)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("name", RESPONSES)
def test_no_response_of_a_server_is_a_defect_of_the_gateway(
    foreign: Foreign, url: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    foreign.parts = [RESPONSES[name]()]
    answer = ask(url)
    check(answer, False)
    assert answer.status_code != 200
    assert answer.headers.get("retry-after") is None
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=mutated(), streamed=st.booleans(), likelihoods=st.booleans())
def test_no_mutation_of_a_completion_is_a_defect_of_the_gateway(
    foreign: Foreign, url: str, body: bytes, streamed: bool, likelihoods: bool
) -> None:
    foreign.parts = [response(body)]
    check(ask(url, stream=streamed, logprobs=likelihoods), streamed)


def test_a_bomb_costs_no_more_memory_than_an_answer_may_have(foreign: Foreign, url: str) -> None:
    foreign.parts = [response(completion())]
    assert ask(url).status_code == 200
    foreign.parts = [response(bomb_of(1000), "Content-Encoding: gzip")]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert ask(url).status_code == 502
    assert httpx.get(f"{url}/models", timeout=60).status_code == 502
    assert httpx.get(f"{url.removesuffix('/v1')}/ready", timeout=60).status_code == 503
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
    assert grown < 100, f"{grown:.0f} MB"


def bomb_of(megabytes: int) -> bytes:
    """Members of gzip side by side would be cut off; one member is made from pieces of one piece."""
    import zlib

    packer = zlib.compressobj(1, wbits=31)
    return b"".join([*(packer.compress(bytes(1_000_000)) for _ in range(megabytes)), packer.flush()])


def test_a_server_that_sends_a_byte_now_and_then_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "CONNECT_SECONDS", 1.0)
    drip = Foreign(parts=[b"HTTP/1.1 200 X\r\n", *[b"x"] * 300], pause=0.1)
    with answering(drip) as server, listening(gateway(server, limits=SpendingLimits(max_seconds=2))) as result:
        began = time.monotonic()
        assert ask(result).status_code == 504
        assert httpx.get(f"{result.removesuffix('/v1')}/ready", timeout=60).json()["ready"] is False
        assert time.monotonic() - began < 20


def test_usage_beyond_any_count_is_unmetered(foreign: Foreign, url: str) -> None:
    for odd in (10**400, 2**53 + 1, True, -1, 1.5, "10", None, [10]):
        foreign.parts = [response(usage(prompt_tokens=odd))]
        answer = ask(url)
        assert answer.status_code == 200
        assert answer.headers["x-cappy-unmetered-calls"] == answer.headers["x-cappy-calls"]
        assert answer.json()["usage"]["prompt_tokens"] == 0


def test_of_a_refusals_headers_only_plausible_ones_are_passed_on(foreign: Foreign, url: str) -> None:
    for text in ("7", "7.5", "Wed, 21 Oct 2026 07:28:00 GMT"):
        foreign.parts = [response(b"{}", f"Retry-After: {text}", "Set-Cookie: a=b", "X-Other: c", status=429)]
        answer = ask(url)
        assert (answer.status_code, answer.headers.get("retry-after")) == (429, text), answer.text
        assert "set-cookie" not in answer.headers
        assert "x-other" not in answer.headers


def test_no_cookie_of_a_server_comes_back_to_it_and_no_redirect_takes_the_key_elsewhere(
    foreign: Foreign, url: str
) -> None:
    foreign.parts = [response(completion(), "Set-Cookie: session=of-the-first; Path=/")]
    ask(url)
    foreign.seen.clear()
    other = Foreign()
    with answering(other) as elsewhere:
        foreign.parts = [response(b"", f"Location: {elsewhere}/x", status=307)]
        assert ask(url).status_code == 502
    assert not other.seen
    assert foreign.seen
    assert not [seen for seen in foreign.seen if "cookie" in seen]
    assert {seen["accept-encoding"] for seen in foreign.seen} == {"gzip"}


def test_of_a_long_response_only_the_beginning_is_scored() -> None:
    lengths: list[int] = []

    def score(response: str) -> float:
        lengths.append(len(response))
        return 0.5

    foreign = Foreign(parts=[response(BODIES["a long text"]())])
    with answering(foreign) as server, listening(gateway(server, scoring=scoring(score), policy=POLICY)) as result:
        answer = ask(result)
    assert len(answer.json()["choices"][0]["message"]["content"]) == 960_000
    assert set(lengths) == {MAX_SCORED_CHARACTERS}


def test_where_all_connections_are_busy_a_request_is_refused_with_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "CONNECT_SECONDS", 0.5)
    slow = Foreign(parts=[response(completion())], pause=4.0)
    with answering(slow) as server:
        first = Upstream(LLM(url=server), connections=1)
        with listening(gateway(server, upstream=first, policy=POLICY)) as result:
            statuses: list[int] = []
            threads = [threading.Thread(target=lambda: statuses.append(ask(result).status_code)) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert sorted(statuses) == [200, 503, 503]


def test_connections_stay_below_the_files_that_may_be_open() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert 16 <= http_client.max_connections() <= max(16, soft // 3)


@pytest.mark.parametrize(
    "body",
    [
        b'{"scores": ["a"], "version": "v"}',
        b'{"scores": "1", "version": "v"}',
        b'{"scores": [NaN], "version": "v"}',
        b'{"scores": [1e999], "version": "v"}',
        b'{"scores": [' + b"1" * 400 + b'], "version": "v"}',
        b'{"scores": [1], "version": "v\\r\\nx-evil: 1"}',
        b'{"scores": [1], "version": {}}',
        b"[]",
        COMPRESSED,
    ],
)
def test_a_scoring_service_that_answers_nonsense_is_no_scorer(body: bytes) -> None:
    more = ["Content-Encoding: gzip"] if body is COMPRESSED else []
    with answering(Foreign(parts=[response(body, *more)])) as server:
        with raises_naming(ConfigError, server, "no scorer", "cappy serve") as error:
            load(server)
        assert "\n" not in str(error.value)


def test_a_scoring_service_that_turns_to_nonsense_is_unreachable() -> None:
    foreign = Foreign(parts=[response(b'{"scores": [1.0], "version": "v", "selector": {}, "calibration": null}')])
    with answering(Foreign(parts=[response(completion())])) as llm, answering(foreign) as server:
        result = load(server)
        with listening(gateway(llm, scoring=result)) as front:
            foreign.parts = [response(COMPRESSED, "Content-Encoding: gzip")]
            answer = ask(front)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "scorer_unreachable")


@contextmanager
def replicas(former_answers: int) -> Iterator[tuple[str, list[str]]]:
    """A service whose scores have the later selector, while its first answers about it are a former replica's."""
    served: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def send(self, values: object, evaluation: str) -> None:
            body = json.dumps(values).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header(EVALUATION_HEADER, evaluation)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            name = "former" if len(served) < former_answers else "later"
            served.append(name)
            selector = {"rules": [{"features": ["score"], "weights": [1.0]}], "metric": name}
            self.send({"version": "v", "evaluation": name, "selector": selector, "calibration": None}, name)

        def do_POST(self) -> None:
            pairs = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["pairs"]
            self.send({"scores": [0.5] * len(pairs), "version": "v"}, "later")

    with handled_by(Handler) as url:
        yield url, served


@pytest.mark.parametrize(("former_answers", "metric"), [(0, "later"), (3, "later"), (5, "later"), (100, "")])
def test_while_replicas_change_the_selector_is_that_of_the_scores_or_the_score_alone(
    former_answers: int, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.gateway.scoring.SELECTOR_WAIT_SECONDS", 0.001)

    async def scores(result: Scoring) -> list[float]:
        try:
            return await result([("a", "b")])
        finally:
            await result.close()

    with replicas(former_answers) as (url, served):
        result = load(url)
        assert asyncio.run(scores(result)) == [0.5]
        assert result.selector.metric == metric
        assert len(served) <= 10


def test_a_refusal_is_shown_without_the_key_wherever_padding_puts_it(foreign: Foreign, url: str) -> None:
    key = "sk-of-the-client"
    for padding in range(440, 520):
        for body in (b"<p>%s%s</p>", b'{"error": {"message": "%s%s"}}', b'["%s%s"]', b'{"error": {"code": "%s%s"}}'):
            foreign.parts = [response(body % (b"x" * padding, key.encode()), status=400)]
            shown = ask(url).text
            assert not [end for end in range(4, len(key) + 1) if key[:end] in shown], shown


@pytest.mark.parametrize(
    "sent",
    [b"HTTP/9 %s\r\n", b"%s\r\n", b"HTTP/1.1 200 X\r\nBad Header %s\r\n\r\n", b"HTTP/1.1 200 X\r\n\r\n%s" + b"x" * 60],
)
def test_a_broken_response_is_shown_without_the_key(foreign: Foreign, url: str, sent: bytes) -> None:
    for padding in range(0, 60, 3):
        foreign.parts = [sent % (b"x" * padding + b"sk-of-the-client")]
        answer = ask(url)
        assert answer.status_code == 502
        assert "sk-of" not in answer.text


def test_a_key_that_a_completion_or_a_list_repeats_reaches_no_client(foreign: Foreign) -> None:
    with answering(foreign) as server, listening(gateway(server, key="sk-of-the-gateway", policy=POLICY)) as result:
        foreign.parts = [response(completion().replace(b"text 0", b"Bearer sk-of-the-gateway"))]
        assert "Bearer ***" in ask(result).text
        foreign.parts = [response(b'{"data": "sk-of-the-gateway"}')]
        assert httpx.get(f"{result}/models").text == '{"data": "***"}'


def test_an_address_that_is_none_is_refused_at_the_start() -> None:
    from serving.gateway.policy import Prices
    from serving.gateway.server import make_llm

    with raises_naming(ConfigError, "http://[::1/v1", "http://host:port/v1"):
        make_llm("http://[::1/v1", prices=Prices())


def test_a_gateway_error_holds_no_secret_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token-of-mlflow\n")
    assert "token-of" not in str(GatewayError(502, "it says token-of-mlflow").body())
