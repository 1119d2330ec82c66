"""An OpenAI-compatible endpoint, here a real HTTP server on this machine that answers like one."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest

from cappy.errors import ConfigError, GeneratorError
from cappy.sampling.endpoint import Endpoint
from cappy.sampling.strategies import BEAM4, Decoding
from cappy.specs import parse_spec


class Handler(BaseHTTPRequestHandler):
    """Answers with the prompt in capitals; fails the first time a prompt says so."""

    requests: list[dict[str, Any]] = []  # noqa: RUF012
    failed: set[str] = set()  # noqa: RUF012

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Handler.requests.append(body)
        prompt = body["messages"][0]["content"]
        if prompt.startswith("flaky") and prompt not in Handler.failed:
            Handler.failed.add(prompt)
            return self._send(429, {"error": {"message": "slow down"}})
        if prompt.startswith("forbidden"):
            return self._send(401, {"error": {"message": "who are you"}})
        message = {"role": "assistant", "content": f" {prompt.upper()} "}
        tokens = [{"token": "X", "logprob": -0.5, "bytes": None, "top_logprobs": []}] * 2
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": "stop",
            "logprobs": {"content": tokens, "refusal": None},
        }
        return self._send(
            200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m-2026", "choices": [choice]}
        )

    def _send(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Silence."""


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    Handler.requests.clear()
    Handler.failed.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    client = openai.OpenAI(base_url=url, api_key="secret", max_retries=2)
    yield Endpoint(parse_spec(f"openai:m@{url}"), client)
    client.close()
    server.shutdown()
    server.server_close()
    thread.join()


def test_candidates_come_back_in_order_with_likelihood_and_model(endpoint: Endpoint) -> None:
    drawn = endpoint.sample(["one", "two"], Decoding(name="sampling", num_samples=2), seed=5)
    assert [[c.response for c in group] for group in drawn] == [["ONE", "ONE"], ["TWO", "TWO"]]
    assert drawn[0][0].logprob_sum == -1.0
    assert drawn[0][0].logprob_mean == -0.5
    assert drawn[0][0].revision == "m-2026"


def test_every_candidate_is_its_own_request_with_its_own_seed(endpoint: Endpoint) -> None:
    endpoint.sample(["one"], Decoding(name="sampling", num_samples=3, top_p=0.5), seed=5)
    assert sorted(request["seed"] for request in Handler.requests) == [5, 6, 7]
    assert {(request["temperature"], request["top_p"]) for request in Handler.requests} == {(1.0, 0.5)}


def test_what_passes_is_retried(endpoint: Endpoint) -> None:
    assert endpoint.sample(["flaky"], Decoding(name="sampling"), seed=0)[0][0].response == "FLAKY"


def test_what_does_not_pass_is_one_line_without_the_key(endpoint: Endpoint) -> None:
    with pytest.raises(GeneratorError, match="AuthenticationError.*check the endpoint and OPENAI_API_KEY") as error:
        endpoint.sample(["forbidden"], Decoding(name="sampling"), seed=0)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_decoding_that_no_endpoint_can_do_is_refused_at_once(endpoint: Endpoint) -> None:
    with pytest.raises(ConfigError, match="an endpoint cannot do beam4; choose --strategy endpoint8"):
        endpoint.sample(["one"], BEAM4, seed=0)
    assert Handler.requests == []
