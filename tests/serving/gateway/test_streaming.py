"""The chosen answer as a stream, read by OpenAI's own client and as it goes over the wire."""

import json
from typing import Any

import httpx
import openai
import pytest
from chat_server import Model, serving
from fault_proxy import Weather, proxying
from gateway_server import gateway, listening, sampled
from hypothesis import given
from hypothesis import strategies as st

from serving.gateway.completion import split_text

MESSAGES: list[Any] = [{"role": "user", "content": "hello  there\nyou"}]


def streamed(url: str, **more: object) -> httpx.Response:
    body = {"model": "m", "messages": MESSAGES, "stream": True, **more}
    return httpx.post(f"{url}/chat/completions", json=body, timeout=30)


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="x", max_retries=0)


def events(text: str) -> list[str]:
    return [part.removeprefix("data: ") for part in text.split("\n\n") if part.startswith("data: ")]


@given(st.text())
def test_pieces_add_up_to_the_text(text: str) -> None:
    assert "".join(split_text(text)) == text


def test_openais_client_reads_the_stream_of_the_best_candidate_and_the_usage_of_all() -> None:
    made: dict[str, Any] = {"policy": sampled(candidates=4, min_gain=0)}
    usage: Any = {"include_usage": True}
    with serving(Model()) as upstream, listening(gateway(upstream, **made)) as url, client_of(url) as client:
        stream = client.chat.completions.create(model="m", messages=MESSAGES, seed=0, stream=True, stream_options=usage)
        chunks = list(stream)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert [delta.role for delta in deltas[1:]] == [None] * (len(deltas) - 1)
    assert "".join(delta.content or "" for delta in deltas) == " HELLO  THERE\nYOU 0/3 "
    assert len([delta for delta in deltas if delta.content]) > 2
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20


def test_a_stream_is_events_that_end_with_done_and_tells_how_it_came_about() -> None:
    with serving(Model()) as upstream, listening(gateway(upstream)) as url:
        answer = streamed(url, n=2)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-cappy-outcome"] == "answered"
    result = events(answer.text)
    assert result[-1] == "[DONE]"
    chunks = [json.loads(part) for part in result[:-1]]
    assert "usage" not in chunks[0]
    ends = [chunk for chunk in chunks if chunk["choices"][0]["finish_reason"]]
    assert [end["choices"][0]["index"] for end in ends] == [0, 1]
    assert (ends[0]["cappy"]["outcome"], "cappy" in ends[1]) == ("answered", False)


def test_comments_keep_the_connection_while_candidates_are_sampled() -> None:
    with serving(Model(latency=0.4)) as upstream, listening(gateway(upstream), keep_alive=0.1) as url:
        answer = streamed(url)
        with client_of(url) as client:
            stream: Any = client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
            read = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    head, _, _ = answer.text.partition("data: ")
    assert head.count(": sampling\n\n") >= 2
    assert read.startswith(" HELLO")
    assert json.loads(events(answer.text)[-2])["cappy"]["stop"]


@pytest.mark.parametrize(
    ("fault", "latency", "kind", "words"),
    [
        ("503", 0.0, openai.InternalServerError, "LLM .*503"),
        ("no-choices", 0.5, openai.APIError, "no choices"),
    ],
)
def test_an_error_before_the_stream_has_its_status_and_one_within_it_is_an_event(
    fault: str, latency: float, kind: type[openai.APIError], words: str
) -> None:
    weather = Weather(faults=[fault], rate=1.0)
    with (
        serving(Model(latency=latency)) as server,
        proxying(server, weather) as upstream,
        listening(gateway(upstream), keep_alive=0.2) as url,
        client_of(url) as client,
        pytest.raises(kind, match=words) as error,
    ):
        list(client.chat.completions.create(model="m", messages=MESSAGES, stream=True))
    assert isinstance(error.value, openai.APIStatusError) == (latency == 0)


def test_logprobs_and_a_refusal_stream_too() -> None:
    with serving(Model()) as upstream:
        with listening(gateway(upstream)) as url:
            chunks = [json.loads(part) for part in events(streamed(url, logprobs=True).text)[:-1]]
        with listening(gateway(upstream, policy=sampled(floor=5.0))) as url:
            refused = [json.loads(part) for part in events(streamed(url).text)[:-1]]
    actual = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert [(len(one["logprobs"]["content"]), one["delta"]["content"][:6]) for one in actual] == [(2, " HELLO")]
    deltas = [chunk["choices"][0]["delta"] for chunk in refused]
    said = "".join(delta.get("content", "") for delta in deltas)
    assert said == "".join(delta.get("refusal", "") for delta in deltas) != ""
    assert refused[-1]["choices"][0]["finish_reason"] == "content_filter"
