"""Bodies of others are read without trust: whatever stands in them is an answer that can be kept, or a fault."""

import json
from pathlib import Path
from typing import Any

import pytest

from cappy.sampling.endpoint.answers import Answer, BadAnswerError, Cache, read_answers
from cappy.sampling.generators import tokens_of

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
    cache = Cache(tmp_path)
    cache.put("abcd", answer)
    assert cache.get("abcd") == answer


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
    with pytest.raises(BadAnswerError) as error:
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
    told = answers(body(*choices, usage={"prompt_tokens": 9, "completion_tokens": 11}), 3)
    assert [(one.requests, one.input_tokens, one.output_tokens) for one in told] == [(1, 9, 4), (0, 0, 4), (0, 0, 3)]
    guessed = answers(body(*choices, usage={"prompt_tokens": -1, "completion_tokens": "many"}), 3)
    assert sum(one.input_tokens for one in guessed) == tokens_of("say it")
    assert sum(one.output_tokens for one in guessed) == 3 * tokens_of("response 0")
