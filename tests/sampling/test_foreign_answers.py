"""Whatever an endpoint answers, sampling gets a candidate, a failed attempt or one line that ends the run."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from foreign_server import BODIES, RESPONSES, Foreign, answering, completion, mutated, response, usage
from hypothesis import HealthCheck, given, settings

from cappy.errors import GeneratorError
from cappy.records import Candidate
from cappy.sampling.endpoint import Endpoint
from cappy.sampling.endpoint.answers import Answer, AnswerCache, NotACompletionError, read_answers
from cappy.sampling.endpoint.client import Connection, Deadlines
from cappy.sampling.endpoint.faults import read_error_body, retry_after
from cappy.sampling.generators import EndpointConfig, estimate_tokens
from cappy.sampling.strategies import Decoding
from cappy.specs import parse_spec
from cappy.untrusted import MAX_DEPTH, read_json

TWO = Decoding(name="two", num_samples=2, do_sample=True, max_new_tokens=64)
KEY = "sk-of-the-endpoint"


@pytest.fixture(scope="module")
def foreign() -> Foreign:
    return Foreign()


@pytest.fixture(scope="module")
def url(foreign: Foreign) -> Iterator[str]:
    with answering(foreign) as result:
        yield result


def sample(url: str, folder: Path | None = None, **terms: float) -> list[Candidate]:
    """What the endpoint gives for one instruction; GeneratorError where it gives none."""
    made = EndpointConfig(folder=folder, max_retries=1, first_wait=0.001, **{"timeout": 20.0, **terms})  # type: ignore[arg-type]
    endpoint = Endpoint(parse_spec(f"openai:m@{url}"), made)
    try:
        (result,) = endpoint.sample(["say it"], [TWO], seed=1)
        return result
    finally:
        endpoint.close()


def ends_well(url: str) -> list[Candidate]:
    """The candidates; none where the run ends with one line."""
    try:
        return sample(url)
    except GeneratorError as error:
        shown = str(error)
    assert "\n" not in shown
    assert len(shown) < 500
    return []


@pytest.mark.parametrize("name", BODIES)
def test_no_body_of_an_endpoint_is_a_traceback(foreign: Foreign, url: str, name: str) -> None:
    foreign.parts = [response(BODIES[name]())]
    for candidate in ends_well(url):
        assert candidate.response.encode() is not None
        assert len(candidate.revision or "") <= 200


@pytest.mark.parametrize("name", sorted(set(RESPONSES) - {"Retry-After of NaN"}))
def test_no_response_of_an_endpoint_is_a_traceback(foreign: Foreign, url: str, name: str) -> None:
    foreign.parts = [RESPONSES[name]()]
    result = ends_well(url)
    assert not [candidate for candidate in result if candidate.status != "failed"]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=mutated())
def test_no_mutation_of_a_completion_is_a_traceback(foreign: Foreign, url: str, body: bytes) -> None:
    foreign.parts = [response(body)]
    ends_well(url)


def test_tokens_beyond_any_count_stop_no_run(foreign: Foreign, url: str, tmp_path: Path) -> None:
    for odd in (10**400, 2**60, True):
        foreign.parts = [response(usage(completion_tokens=odd))]
        assert len(sample(url, tmp_path / str(odd)[:9], tokens_per_minute=1_000_000)) == 2


def test_a_server_that_says_it_used_a_lifetime_of_tokens_holds_the_next_up_for_minutes_at_most() -> None:
    from cappy.sampling.endpoint.limits import MAX_CORRECTION_SECONDS, RateLimiter

    pace = RateLimiter(1)
    pace.correct(2**53)
    assert pace.reserve(1) <= MAX_CORRECTION_SECONDS + 60


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 X\r\n", b"HTTP/1.1 200 X\r\n\r\n"])
def test_an_attempt_ends_in_time_though_a_byte_comes_now_and_then(start: bytes) -> None:
    drip = Foreign(parts=[start, *[b"x"] * 600], pause=0.1)
    with answering(drip) as server:
        began = time.monotonic()
        with pytest.raises(GeneratorError, match="within 1 s.* 2 attempts"):
            sample(server, timeout=1.0)
        assert time.monotonic() - began < 20


def test_a_connection_that_is_in_time_is_left_alone() -> None:
    one, other = socket.socketpair()
    connection, deadlines = Connection(), Deadlines()

    class Stream:
        def get_extra_info(self, name: str) -> socket.socket:
            return one

    connection._stream = Stream()
    with deadlines.within(30.0, connection):
        time.sleep(0.6)
        other.send(b"x")
        assert one.recv(1) == b"x"
    assert not connection.timed_out
    with deadlines.within(0.1, connection):
        assert one.recv(1) == b""
    assert connection.timed_out
    deadlines.close()
    one.close()
    other.close()


def test_no_redirect_is_followed_and_no_cookie_kept(foreign: Foreign, url: str) -> None:
    foreign.parts = [response(completion(), "Set-Cookie: a=b; Path=/")]
    sample(url)
    other = Foreign(parts=[response(completion())])
    with answering(other) as elsewhere:
        foreign.parts = [response(b"", f"Location: {elsewhere}/chat/completions", status=307)]
        foreign.seen.clear()
        with pytest.raises(GeneratorError, match="307 .*address"):
            sample(url)
    assert not other.seen
    assert not [seen for seen in foreign.seen if "cookie" in seen]


def test_the_key_is_taken_out_before_a_text_is_cut(foreign: Foreign, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for padding in range(20, 200, 9):
        for status, body in ((400, b"<p>%s%s</p>"), (401, b'{"error": {"message": "%s%s"}}'), (200, b'{"a": "%s%s"}')):
            foreign.parts = [response(body % (b"x" * padding, KEY.encode()), status=status)]
            endpoint = Endpoint(parse_spec(f"openai:m@{url}"), EndpointConfig(max_retries=1, first_wait=0.001))
            try:
                endpoint.sample(["say it"], [TWO], seed=1)
                actual = " ".join(endpoint.take_counts())
                assert "400 " in actual
            except GeneratorError as error:
                actual = str(error)
            endpoint.close()
            assert not [end for end in range(5, len(KEY) + 1) if KEY[:end] in actual], actual


def test_a_key_that_an_answer_repeats_is_in_no_candidate(
    foreign: Foreign, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    foreign.parts = [response(completion().replace(b"text 0", KEY.encode()))]
    assert [candidate.response for candidate in sample(url)] == ["***", "text 1"]


@pytest.mark.parametrize(
    "date",
    ["Mon, 01 Jan 99999999999999999999 00:00:00 GMT", "x" * 100_000, "Mon, 01 Jan 0001 00:00:00 +2359", "1e999", "-1"],
)
def test_a_date_of_no_calendar_asks_for_no_wait(date: str) -> None:
    assert retry_after({"retry-after": date}) in (None, 0.0)


def test_json_is_refused_before_it_is_built() -> None:
    assert read_json(b'{"a": "[[[[,,,,\\\\\\"]]]", "b": [1.5, NaN, 1e999]}', max_values=9, max_depth=2) == {
        "a": '[[[[,,,,\\"]]]',
        "b": [1.5, None, None],
    }
    with pytest.raises(ValueError, match="8 values"):
        read_json(b"[" + b"1," * 9 + b"1]", max_values=8)
    with pytest.raises(ValueError, match=f"nested.* {MAX_DEPTH} "):
        read_json(b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1))
    began = time.monotonic()
    with pytest.raises(ValueError, match="values"):
        read_json(b"[" + b"{}," * 8_000_000 + b"{}]")
    assert time.monotonic() - began < 10


def test_a_refusal_is_read_in_every_shape_and_types_of_others_are_texts() -> None:
    result = read_error_body(b'{"error": {"message": [1, "\\u001b[2Jx"], "type": {}, "param": 5, "code": null}}')
    assert (result.message, result.kind, result.param, result.code) == ("[1, '\\x1b[2Jx']", "{}", "5", "")
    assert read_error_body(b'{"detail": "no"}').message == "no"
    assert read_error_body(b"<b>\x1b[31mno\n</b>").message == "<b> [31mno </b>"
    assert read_error_body(b'"no"').message == "no"


HALF = "\ud83d"
"""The first half of a character of UTF-16: JSON can say it, UTF-8 cannot."""


def body(*choices: dict[str, Any], **more: Any) -> str:
    plain = {"finish_reason": "stop", "message": {"content": "hi"}}
    return json.dumps({"choices": [{**plain, **choice} for choice in choices or ({},)], **more})


def answers(text: str, count: int = 1) -> list[Answer]:
    return read_answers(text.encode(), "say it", count=count, seed=1, left_out=())[0]


@pytest.mark.parametrize(
    "text",
    [
        body({"message": {"content": f"cut {HALF}"}}, model=HALF),
        body({"message": {"content": [{"text": "cut "}, {"text": HALF}]}}),
        body({"message": {"content": None, "refusal": f"cut {HALF}"}}),
    ],
)
def test_half_a_character_becomes_the_replacement_character_and_is_kept(tmp_path: Path, text: str) -> None:
    (answer,) = answers(text)
    assert answer.text == "cut �"
    cache = AnswerCache(tmp_path)
    cache.put("abcd", answer)
    assert cache.get("abcd") == answer
    cache.close()


def test_two_halves_are_one_character() -> None:
    assert answers(body({"message": {"content": "\ud83d\ude00"}}))[0].text == "😀"


@pytest.mark.parametrize(
    "logprobs",
    [
        7,
        {"token_logprobs": 5},
        {"token_logprobs": {"a": 1}},
        {"token_logprobs": [None, -1.0]},
        {"content": [{"logprob": -1.0}, {"logprob": float("nan")}]},
        {"content": [{"logprob": -1.0}, {"logprob": float("-inf")}]},
        {"content": [{"logprob": -1.0}, {"logprob": 10**400}]},
        {"content": [{"logprob": -1.0}, {"logprob": -1.5e308}]},
        {"content": [{"logprob": -1.0}, {}]},
        {"content": [{"logprob": -1.0}, None]},
        {"content": []},
    ],
)
def test_a_likelihood_with_a_gap_is_none(logprobs: object) -> None:
    (answer,) = answers(body({"logprobs": logprobs}))
    assert (answer.text, answer.status, answer.logprob_sum, answer.num_tokens) == ("hi", "ok", None, None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 200_000,
        "[]",
        '{"choices": []}',
        '{"choices": [5]}',
        '{"choices": {"0": {}}}',
        '{"choices": [{"index": 0}]}',
        body({"message": {"content": 5}}),
    ],
)
def test_what_is_no_completion_is_a_fault_in_one_line(text: str) -> None:
    with pytest.raises(NotACompletionError) as error:
        answers(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 120


@pytest.mark.parametrize("index", [[], {}, [0], "0", None])
def test_an_odd_index_is_only_a_name(index: object) -> None:
    assert [answer.text for answer in answers(body({"index": index}), 4)] == ["hi"]


def test_a_filter_that_left_nothing_is_a_filter() -> None:
    assert answers(body({"finish_reason": "content_filter", "message": {"content": None}}))[0].status == "filtered"


def test_answers_share_out_what_their_request_took() -> None:
    choices = [{"index": number, "message": {"content": f"response {number}"}} for number in range(3)]
    actual = answers(body(*choices, usage={"prompt_tokens": 9, "completion_tokens": 11}), 3)
    assert [(one.requests, one.input_tokens, one.output_tokens) for one in actual] == [(1, 9, 4), (0, 0, 4), (0, 0, 3)]
    guessed = answers(body(*choices, usage={"prompt_tokens": -1, "completion_tokens": "many"}), 3)
    assert sum(one.input_tokens for one in guessed) == estimate_tokens("say it")
    assert sum(one.output_tokens for one in guessed) == 3 * estimate_tokens("response 0")
