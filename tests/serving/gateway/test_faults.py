"""What the LLM's server does wrong, and what of it a client hears; no key in any of it."""

import contextlib
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from chat_server import Model, serving
from fault_proxy import Weather, proxying
from gateway_server import gateway, listening, sampled
from local_server import handled_by
from waiting import wait_until
from wording import assert_names

from serving.gateway.config import SpendingLimits

CANARY = "sk-canary-4f1d9a"
ONE_BY_ONE: dict[str, Any] = {"refused": ("n",)}


@contextlib.contextmanager
def behind(weather: Weather, model: Model, **made: Any) -> Iterator[str]:
    """The base URL of a gateway whose server stands behind this weather."""
    with serving(model) as server, proxying(server, weather) as upstream, listening(gateway(upstream, **made)) as url:
        yield url


def ask(url: str, text: str = "hello", key: str = CANARY, **more: object) -> httpx.Response:
    body = {"model": "m", "messages": [{"role": "user", "content": text}], **more}
    return httpx.post(f"{url}/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=30)


@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        ("429", 429, "the LLM answered 429: try again"),
        ("429-later", 429, "the LLM answered 429: try again"),
        ("500", 500, "the LLM answered 500: try again"),
        ("503", 503, "the LLM answered 503: try again"),
        ("hang-up", 502, "the LLM ended its response early"),
        ("mid-body", 502, "the LLM ended its response early"),
        ("malformed", 502, "the LLM .*JSON"),
        ("html", 502, "the LLM .*JSON"),
        ("no-choices", 502, "the LLM .*no choices"),
        ("stall", 504, "the LLM .*0.9 s.*--max-seconds"),
    ],
)
def test_a_fault_of_the_server_is_reported_under_its_status_in_openais_shape(
    fault: str, status: int, words: str
) -> None:
    weather = Weather(faults=[fault], rate=1.0, stall=2.0, later=7.0)
    limits = SpendingLimits(max_seconds=1.0 if fault == "stall" else 30.0)
    with behind(weather, Model(), limits=limits) as url:
        answer = ask(url)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert re.match(words, error["message"])
    assert answer.headers.get("retry-after") == ("7.0" if fault == "429-later" else None)


def test_openais_client_outlasts_a_storm_of_429s() -> None:
    weather = Weather(plan=["429-later", "429-later"], later=0.05)
    with behind(weather, Model()) as url, openai.OpenAI(base_url=url, api_key="x", max_retries=3) as client:
        answer = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hello"}])
    assert (answer.choices[0].message.content or "").startswith(" HELLO")
    assert weather.blown == {"429-later": 2}


def test_candidates_that_came_are_used_where_others_of_the_round_failed() -> None:
    weather = Weather()
    policy = sampled(candidates=4, min_gain=0)
    with behind(weather, Model(**ONE_BY_ONE), policy=policy) as url:
        ask(url)
        weather.plan = ["500", "", "429", ""]
        answer = ask(url)
        weather.plan = ["500"] * 4
        none = ask(url)
    assert answer.status_code == 200
    assert (answer.headers["x-cappy-sampled"], answer.headers["x-cappy-failed-calls"]) == ("2", "2")
    assert answer.json()["usage"]["completion_tokens"] == 10
    assert none.status_code == 500


def test_a_later_round_that_fails_leaves_the_best_of_the_earlier_ones() -> None:
    weather = Weather(plan=["", "500"])
    with behind(weather, Model(), policy=sampled(candidates=8, min_gain=0)) as url:
        answer = ask(url)
    assert (answer.status_code, answer.headers["x-cappy-stop"]) == (200, "upstream")
    assert answer.headers["x-cappy-sampled"] == "4"


@pytest.mark.parametrize(
    ("word", "status", "code"),
    [
        ("unauthorized", 401, "invalid_api_key"),
        ("forbidden", 403, "forbidden"),
        ("absent", 404, "model_not_found"),
        ("endless", 400, "context_length_exceeded"),
        ("broke", 429, "insufficient_quota"),
    ],
)
def test_a_refusal_keeps_its_status_and_code(word: str, status: int, code: str) -> None:
    with serving(Model()) as upstream, listening(gateway(upstream)) as url:
        answer = ask(url, word)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert_names(answer.json()["error"]["message"], "the LLM", str(status))
    assert ("not this gateway" in answer.text) == (status == 401)


def test_a_parameter_that_the_client_asked_for_and_the_model_refuses_is_not_dropped() -> None:
    model = Model(refused=("temperature", "max_tokens"))
    with serving(model) as upstream, listening(gateway(upstream, limits=SpendingLimits(max_tokens=100))) as url:
        own = ask(url)
        before = len(model.asked)
        refused = ask(url, temperature=0.5)
    assert len(model.asked) == before + 1
    assert own.status_code == 200
    assert "max_completion_tokens" in model.asked[1]
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "temperature")


@pytest.mark.parametrize("whose", ["environment", "client"])
@pytest.mark.parametrize("word", ["unauthorized", "hello"])
def test_the_key_is_sent_and_stands_nowhere_else(word: str, whose: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    made = {"key": CANARY} if whose == "environment" else {}
    with caplog.at_level(logging.DEBUG), serving(model) as upstream:
        made_gateway = gateway(upstream, **made)
        with listening(made_gateway) as url:
            answer = ask(url, word, key="their own" if whose == "environment" else CANARY)
            metrics = httpx.get(f"{url.removesuffix('/v1')}/metrics").text
    assert model.keys == {CANARY}
    actual = f"{answer.text} {answer.headers} {metrics} {caplog.text} {made_gateway.upstream.llm}"
    assert CANARY not in actual


def test_a_client_that_goes_away_cancels_the_calls_of_the_llm() -> None:
    asked, left = threading.Event(), threading.Event()

    class Slow(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.set()
            self.connection.settimeout(10)
            if self.connection.recv(1) == b"":
                left.set()

    for stream in (False, True):
        asked.clear()
        left.clear()
        with handled_by(Slow) as upstream, listening(gateway(f"{upstream}/v1"), keep_alive=0.05) as url:
            body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": stream}
            client = httpx.Client()
            if stream:
                with client.stream("POST", f"{url}/chat/completions", json=body) as answer:
                    assert next(answer.iter_text()).startswith(": sampling")
                    assert asked.wait(5)
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(f"{url}/chat/completions", json=body, timeout=0.5)
            client.close()
            assert asked.is_set()
            assert left.wait(5), f"stream={stream}"


def test_a_client_that_goes_away_while_it_sends_is_no_defect(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), listening(gateway("http://127.0.0.1:9/v1")) as url:
        address = urlsplit(url)
        with socket.create_connection((address.hostname, address.port)) as client:
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            client.sendall(head + b"Content-Length: 100\r\n\r\n{")
            time.sleep(0.1)
        wait_until(lambda: '"status": 499' in caplog.text, "a line with status 499", seconds=5, pause=0.01)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_server_that_is_not_there_is_502_and_one_that_hangs_is_504() -> None:
    with listening(gateway("http://127.0.0.1:9/v1")) as url:
        started = time.monotonic()
        absent = ask(url)
        assert time.monotonic() - started < 5
    assert (absent.status_code, absent.json()["error"]["code"]) == (502, "upstream_unreachable")
    assert "reached" in absent.json()["error"]["message"]
