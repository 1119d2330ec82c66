"""What a request may hold: everything else is a 4xx in OpenAI's shape, in one sentence."""

import contextlib
import json
from collections.abc import Iterator

import httpx
import pytest
from chat_server import Model, serving
from gateway_server import gateway, listening
from hypothesis import given
from hypothesis import strategies as st
from wording import assert_names

from serving.gateway.config import ChatLimits
from serving.gateway.errors import GatewayError
from serving.gateway.requests import instruction_of, read_request

JSON_TYPE = {"content-type": "application/json"}
USER = {"role": "user", "content": "hello"}
GOOD = {"model": "m", "messages": [USER]}


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


@pytest.fixture(scope="module")
def url(model: Model) -> Iterator[str]:
    with serving(model) as upstream, listening(gateway(upstream), limits=ChatLimits(max_body_mb=0.1)) as url:
        yield url


def text(**changes: object) -> str:
    return json.dumps({**GOOD, **changes})


PART = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ("", None),
        ("{", None),
        ("[]", None),
        ("null", None),
        (b"\xff\xfe", None),
        ("[" * 5000, None),
        (text().replace('"hello"', '"\\ud800"'), None),
        (text(temperature=float("nan")), None),
        (text(x=1).replace(": 1", ": 1e999"), None),
        (text(x=1).replace(": 1", ": " + "9" * 5000), None),
        (text(model=None), "model"),
        (text(model=""), "model"),
        (text(messages=None), "messages"),
        (text(messages=[]), "messages"),
        (text(messages={"role": "user"}), "messages"),
        (text(messages=["hello"]), "messages.0"),
        (text(messages=[{"role": "user"}]), "messages[0].content"),
        (text(messages=[{"role": "user", "content": 3}]), "messages[0].content"),
        (text(messages=[{"role": "user", "content": ""}]), "messages"),
        (text(messages=[USER, {"role": "tool", "content": "x"}]), "messages[1].role"),
        (text(messages=[{"content": "x"}]), "messages[0].role"),
        (text(messages=[{"role": "user", "content": [PART]}]), "messages[0].content[0]"),
        (text(messages=[{"role": "user", "content": [{"type": "text", "text": 1}]}]), "messages[0].content[0].text"),
        (text(n=0), "n"),
        (text(n=True), "n"),
        (text(n=9), "n"),
        (text(n="2"), "n"),
        (text(n=1.5), "n"),
        (text(stream="yes"), "stream"),
        (text(stream_options={"include_usage": True}), "stream_options"),
        (text(stream=True, stream_options={"other": 1}), "stream_options.other"),
        (text(temperature="hot"), "temperature"),
        (text(max_tokens=0), "max_tokens"),
        (text(max_completion_tokens=-1), "max_completion_tokens"),
        (text(seed=2**80), "seed"),
        (text(tools=[{"type": "function"}]), "tools"),
        (text(functions=[{"name": "f"}]), "functions"),
        (text(modalities=["text", "audio"]), "modalities.1"),
        (text(audio={"voice": "x"}), "audio"),
    ],
)
def test_what_is_no_request_is_400_in_one_sentence_and_asks_nothing(
    url: str, model: Model, body: str | bytes, param: str | None
) -> None:
    before = len(model.asked)
    answer = httpx.post(f"{url}/chat/completions", content=body, headers=JSON_TYPE)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert "\n" not in error["message"]
    assert "Traceback" not in answer.text
    assert len(model.asked) == before


def test_half_a_character_is_reported_as_such(url: str) -> None:
    answer = httpx.post(f"{url}/chat/completions", content=text().replace('"hello"', '"\\ud800"'), headers=JSON_TYPE)
    assert "surrogate" in answer.json()["error"]["message"]


def test_a_body_of_10_mb_is_413_announced_or_not(url: str) -> None:
    body = text(messages=[{"role": "user", "content": "x" * 10_000_000}]).encode()
    for content in (body, iter([body[:50_000], body[50_000:200_000]])):
        answer = httpx.post(f"{url}/chat/completions", content=content, headers=JSON_TYPE)
        assert answer.status_code == 413
        assert_names(answer.json()["error"]["message"], "100000 bytes", "shorter conversation")


def test_a_path_that_is_not_here_is_404_in_the_same_shape(url: str) -> None:
    answer = httpx.post(f"{url}/embeddings", json={})
    assert (answer.status_code, set(answer.json())) == (404, {"error"})
    assert httpx.get(f"{url}/chat/completions").status_code == 405


NAMES = st.sampled_from([*GOOD, "n", "stream", "temperature", "seed", "role", "content", "tools"])
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner)
)


@given(JSON)
def test_no_body_breaks_the_reader(values: object) -> None:
    data = json.dumps({**GOOD, **values} if isinstance(values, dict) else values).encode()
    with contextlib.suppress(GatewayError):
        read_request(data, max_choices=8)


def test_a_conversation_is_one_text() -> None:
    assert instruction_of([USER]) == "hello"
    turns: list[dict[str, object]] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Sort:"}, {"type": "text", "text": "b a"}]},
        {"role": "assistant", "content": "a b"},
        {"role": "user", "content": "Again."},
    ]
    assert instruction_of(turns) == "System: Be brief.\n\nUser: Sort:\nb a\n\nAssistant: a b\n\nUser: Again."
    assert instruction_of([{"role": "system", "content": "x"}]) == "System: x"
