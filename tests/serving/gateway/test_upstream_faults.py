"""Lines D1, D6, D9 and C10 of the field faults, in the gateway: what servers answer, and what a client gets of it."""

import json
import logging
from typing import Any

import httpx
import pytest
from gateway_server import PRICES, gateway, listening, sampled, scoring
from scripted_server import Reply, Script, refusing, saying, scripted

from serving.gateway.config import GatewayConfig, Policy
from serving.gateway.server import assemble, make_llm
from serving.gateway.upstream import LLM, Upstream

ROUND = sampled(candidates=4, round_size=4, min_gain=0)
BY_LENGTH = scoring(lambda text: len(text) / 1000)
"""A scorer that likes long texts, and so half of a long one better than a whole short one."""


def ask(url: str, **more: Any) -> httpx.Response:
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], **more}
    headers = {"X-Cappy-Candidates": "1", "Authorization": "Bearer client-key"}
    return httpx.post(f"{url}/chat/completions", json=body, headers=headers, timeout=30)


def choices(*result: tuple[str, object]) -> dict[str, Any]:
    """A completion with these texts and finish_reasons."""
    made = [
        {"index": n, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        for n, (text, finish) in enumerate(result)
    ]
    return {**saying(""), "choices": made}


def answer_of(reply: Reply, *, strip: bool = False, policy: Policy = ROUND, **more: Any) -> httpx.Response:
    with scripted(Script(lambda body: reply)) as server:
        first = Upstream(LLM(url=f"{server}/v1", prices=PRICES), strip_reasoning=strip)
        with listening(gateway(server, upstream=first, scoring=BY_LENGTH, policy=policy)) as url:
            return ask(url, **more)


@pytest.mark.parametrize("finish", ["error", "abort", {"type": "abort"}, "a_word_of_tomorrow"])
@pytest.mark.parametrize("stream", [False, True])
def test_d1_a_response_that_its_server_gave_up_is_no_candidate(finish: object, stream: bool) -> None:
    result = (("half of a very long respo", finish), ("short", "stop"), ("tiny", "stop"), ("half", finish))
    answer = answer_of((200, choices(*result)), stream=stream)
    assert "half of" not in answer.text
    assert "short" in answer.text
    assert answer.headers["x-cappy-sampled"] == "2"
    # It was answered, so it is neither asked for again nor taken for a server that does not know n.
    assert answer.headers["x-cappy-calls"] == "1"


def test_d1_where_every_response_was_given_up_the_client_gets_an_error() -> None:
    answer = answer_of((200, choices(*[("half", "error")] * 4)))
    assert answer.status_code == 502
    assert "finish_reason: 'error'" in answer.json()["error"]["message"]
    for code, status in ((429, 429), ("503", 503), ("odd", 502)):
        answer = answer_of((200, refusing("slow down", code=code)))
        assert (answer.status_code, "slow down" in answer.text) == (status, True)


def test_d1_a_whole_response_goes_before_one_that_was_cut_and_a_cut_one_before_none() -> None:
    answer = answer_of(
        (200, choices(("a very long response that is cu", "length"), ("short", "stop"), ("", "stop"), ("", "stop")))
    )
    body = answer.json()
    assert [one["status"] for one in body["cappy"]["candidates"][:3]] == ["ok", "truncated", "empty"]
    assert body["choices"][0]["message"]["content"] == "short"
    cut = answer_of(
        (200, choices(("a long response that is cu", "length"), ("cut too", "length"))),
        policy=sampled(candidates=2),
    )
    assert cut.json()["choices"][0]["message"]["content"].startswith("a long")


def test_d1_a_cut_response_does_not_stop_sampling_where_a_whole_one_is_not_good_enough() -> None:
    policy = sampled(candidates=4, round_size=2, threshold=0.02, min_gain=0)
    answer = answer_of((200, choices(("a very long response that is cu", "length"), ("short", "stop"))), policy=policy)
    assert (answer.headers["x-cappy-stop"], answer.headers["x-cappy-sampled"]) == ("candidates", "4")


@pytest.mark.parametrize(
    "given", ["/openai/deployments/d?api-version=2024-06-01", "/openai/deployments/d/?api-version=2024-06-01"]
)
def test_d6_a_query_stays_behind_the_path_and_azures_key_goes_into_its_header(given: str) -> None:
    script = Script(lambda body: (200, choices(("short", "stop")) if body else {"data": []}))
    with scripted(script) as server:
        for key, sent in (("gateway-key", "gateway-key"), ("", "client-key")):
            first = Upstream(LLM(url=server + given, key=key, prices=PRICES))
            with listening(gateway(server, upstream=first, scoring=BY_LENGTH, policy=sampled(candidates=1))) as url:
                assert ask(url).status_code == 200
                headers = {"Authorization": "Bearer client-key"}
                assert httpx.get(f"{url}/models", headers=headers).status_code == 200
            assert {one["api-key"] for one in script.headers} == {sent}
            assert not [one for one in script.headers if "authorization" in one]
            script.headers.clear()
    base = "/openai/deployments/d"
    assert set(script.paths) == {f"{base}{path}?api-version=2024-06-01" for path in ("/chat/completions", "/models")}


@pytest.mark.parametrize("given", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_d6_an_address_is_taken_with_or_without_its_version(given: str) -> None:
    script = Script(lambda body: (200, choices(("short", "stop"))))
    with scripted(script) as server:
        first = Upstream(LLM(url=server + given, prices=PRICES))
        with listening(gateway(server, upstream=first, scoring=BY_LENGTH, policy=sampled(candidates=1))) as url:
            assert ask(url).status_code == 200
    assert script.paths == ["/v1/chat/completions"]
    assert script.headers[0]["authorization"] == "Bearer client-key"


def test_d6_the_address_of_a_flag_keeps_its_query() -> None:
    for given in ("http://h/v1?api-version=1", "http://h/v1/?api-version=1", "http://h?api-version=1"):
        assert make_llm(given, prices=PRICES).url == "http://h/v1?api-version=1"


@pytest.mark.parametrize("charset", ["iso-8859-1", "utf-16", "windows-1252"])
def test_d9_json_is_utf_8_whatever_its_header_says(charset: str) -> None:
    for sign in (b"", b"\xef\xbb\xbf"):
        data = sign + json.dumps(choices(("café 日本", "stop")), ensure_ascii=False).encode()
        answer = answer_of((200, data, {"Content-Type": f"application/json; charset={charset}"}))
        assert answer.json()["choices"][0]["message"]["content"] == "café 日本"


@pytest.mark.parametrize(
    ("charset", "codec"), [("iso-8859-1", "latin-1"), ("windows-1252", "cp1252"), ("utf-16", "utf-16")]
)
def test_d9_a_body_that_is_not_utf_8_is_read_in_the_charset_that_its_server_names(charset: str, codec: str) -> None:
    data = json.dumps(choices(("café", "stop")), ensure_ascii=False).encode(codec)
    answer = answer_of((200, data, {"Content-Type": f"application/json; charset={charset}"}))
    assert answer.json()["choices"][0]["message"]["content"] == "café"


@pytest.mark.parametrize("kind", ["json", "json; charset=utf-8", "json; charset=us-ascii", "json; charset=nonsense"])
def test_d9_a_body_that_cannot_be_read_is_an_error_and_no_other_text(kind: str) -> None:
    data = json.dumps(choices(("café", "stop")), ensure_ascii=False).encode("latin-1")
    answer = answer_of((200, data, {"Content-Type": f"application/{kind}"}))
    assert answer.status_code == 502
    assert "UTF-8" in answer.json()["error"]["message"]


def test_d9_a_list_of_models_is_passed_on_in_utf_8_or_not_at_all() -> None:
    data = json.dumps({"data": [{"id": "café"}]}, ensure_ascii=False).encode("latin-1")
    for kind, status in (("json; charset=latin1", 200), ("json", 502)):
        reply = (200, data, {"Content-Type": f"application/{kind}"})
        script = Script(lambda body, reply=reply: reply)  # type: ignore[misc]
        with scripted(script) as server, listening(gateway(server, scoring=BY_LENGTH)) as url:
            result = httpx.get(f"{url}/models", timeout=30)
        assert result.status_code == status
        assert ("café" in result.text, "UTF-8" in result.text) == (status == 200, status == 502)


THINKING = "<think>It could be Rome, or Athens, or Paris, or any other place.</think>Paris"


def test_c10_with_strip_reasoning_the_answer_alone_is_scored_and_given() -> None:
    result = ((THINKING, "stop"), ("It is Paris.", "stop"), ("<think>It could be Rome, or", "length"))
    answer = answer_of((200, choices(*result)), strip=True, n=3, policy=sampled(candidates=3))
    assert [one["content"] for one in answer.json()["cappy"]["candidates"]][:2] == ["It is Paris.", "Paris"]
    assert [one["message"]["content"] for one in answer.json()["choices"]][:2] == ["It is Paris.", "Paris"]
    last = answer.json()["cappy"]["candidates"][2]
    assert (last["status"], last["score"]) == ("empty", None)


def test_c10_the_setting_of_the_gateway_is_that_of_both_llms() -> None:
    script = Script(lambda body: (200, choices((THINKING, "stop"))))
    with scripted(script) as server:
        first, second = (LLM(url=f"{server}/v1", model=name, prices=PRICES) for name in ("first", "second"))
        config = GatewayConfig(upstream=server, candidates=1, floor=0.9, escalate_to=server, strip_reasoning=True)
        with listening(assemble(config, first, second, BY_LENGTH)) as url:
            answer = ask(url)
    assert answer.headers["x-cappy-outcome"] == "escalated"
    assert [one["content"] for one in answer.json()["cappy"]["candidates"]] == ["Paris", "Paris"]


def test_c10_where_reasoning_never_ended_the_servers_own_answer_is_given() -> None:
    answer = answer_of((200, choices(("<think>It could be Rome", "length"))), strip=True, policy=sampled(candidates=1))
    assert answer.headers["x-cappy-outcome"] == "unscored"
    assert answer.json()["choices"][0]["message"]["content"] == "<think>It could be Rome"


def test_c10_without_it_reasoning_is_scored_passed_on_and_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    answer = answer_of((200, choices((THINKING, "stop"), (THINKING, "stop"))))
    assert answer.json()["choices"][0]["message"]["content"] == THINKING
    warnings = [record for record in caplog.records if "--strip-reasoning" in record.getMessage()]
    assert [record.levelno for record in warnings] == [logging.WARNING]


def test_c10_reasoning_beside_the_content_passes_through() -> None:
    message = {"role": "assistant", "content": "Paris", "reasoning_content": "It could be Rome."}
    answer = answer_of((200, saying("", message=message)), strip=True, policy=sampled(candidates=1))
    assert answer.json()["choices"][0]["message"] == message
