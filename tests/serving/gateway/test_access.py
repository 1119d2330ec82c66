"""The gateway's own keys: who has none gets nothing, and none of them ever reaches an LLM."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from chat_server import Model, serving
from fastapi.testclient import TestClient
from gateway_server import gateway
from wording import assert_names

from serving.gateway.app import Access, create_app
from serving.guards import Keys

OURS, LLMS = "our-own-canary-key", "sk-llm-canary"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
WITH_KEY = {"Authorization": f"Bearer {OURS}"}
Front = Callable[..., TestClient]


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def front(model: Model) -> Iterator[Front]:
    """front(keys, key of the LLM) -> a client of a gateway."""
    with serving(model) as upstream, ExitStack() as stack:

        def start(*keys: str, key: str = "") -> TestClient:
            app = create_app(gateway(upstream, key=key), access=Access(keys=Keys(keys)))
            return stack.enter_context(TestClient(app))

        yield start


def test_without_a_known_key_there_is_nothing_but_the_page_and_the_probes(front: Front, model: Model) -> None:
    client = front(OURS)
    asks = [("POST", "/v1/chat/completions"), ("POST", "/v1/feedback")]
    asks += [("GET", path) for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere")]
    for method, path in asks:
        for given in ({}, {"Authorization": "Bearer another-key"}, {"Authorization": OURS}):
            answer = client.request(method, path, json=BODY if method == "POST" else None, headers=given)
            assert answer.status_code == 401, path
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert (set(answer.json()), answer.json()["error"]["code"]) == ({"error"}, "invalid_api_key")
    for path in ("/", "/about", "/health"):
        assert client.get(path).status_code == 200
    assert client.get("/ready").status_code in (200, 503)
    assert model.asked == []
    assert client.post("/v1/chat/completions", json=BODY, headers=WITH_KEY).status_code == 200


@pytest.mark.parametrize(("key", "sent"), [("", ""), (LLMS, LLMS)])
def test_a_key_of_the_gateway_is_never_sent_to_the_llm(front: Front, model: Model, key: str, sent: str) -> None:
    client = front(OURS, key=key)
    client.post("/v1/chat/completions", json=BODY, headers=WITH_KEY)
    client.get("/v1/models", headers=WITH_KEY)
    assert model.keys == {sent}


def test_without_keys_a_clients_own_key_is_passed_on_as_ever(front: Front, model: Model) -> None:
    assert front().post("/v1/chat/completions", json=BODY, headers=WITH_KEY).status_code == 200
    assert model.keys == {OURS}


def test_the_keys_come_from_the_variable_for_the_gateway_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cappy.cli import main

    monkeypatch.setenv("CAPPY_API_KEYS", "short")
    with pytest.raises(SystemExit):
        main(["gateway", "--upstream", "http://127.0.0.1:9/v1", "--scorer", "builtin:tiny", "--port", "0"])
    assert_names(capsys.readouterr().err, "CAPPY_API_KEYS", " 8 ")
