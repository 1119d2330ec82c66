"""The guard of bodies: what one costs is bounded, whatever it holds, and what is refused is refused before it costs."""

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_function import FakeEngine
from wording import assert_names, raises_naming
from worst_bodies import CHAT_PLACES, MEGABYTES, PLACES, Watched, bodies, service, tensors

from serving.app import Options
from serving.bodies import _BLOCK, BodyBudget, Bounds, Refusal, measure
from serving.config import RequestLimits

Serve = Callable[..., TestClient]
JSON_TYPE = {"content-type": "application/json"}
SECONDS, MOST_MEGABYTES = 15.0, 200.0
"""Measured in benchmarks/results/bodies.json: below 0.5 s and 80 MB. The time is generous, for busy machines."""
HARD = (
    "numbers, as many bytes",
    "numbers, as many values",
    "long numbers, as many values",
    "empty objects, as many bytes",
    "escapes, as many bytes",
    "keys, as many bytes",
    "keys, as many values",
    "lists in lists",
    "a long text",
    "a long key",
    "1024 texts",
)


def affordable(watched: Watched, name: str, path: str, body: bytes, headers: dict[str, str] | None = None) -> None:
    cost = watched.cost(name, path, body, headers)
    assert cost.status != 500, cost
    assert cost.seconds < SECONDS, cost
    assert cost.health_seconds < SECONDS, cost
    assert cost.megabytes < MOST_MEGABYTES, cost


def test_the_worst_bodies_cost_the_service_little_and_health_answers_meanwhile() -> None:
    places = {name: PLACES[name] for name in ("rerank", "vertex", "open_inference")}
    with service() as watched:
        for name, path, body in bodies(places, MEGABYTES, 32_768):
            if name.partition(": ")[2].startswith(HARD):
                affordable(watched, name, path, body)
        for name, path, body, headers in tensors(MEGABYTES):
            affordable(watched, name, path, body, dict(headers))


def test_the_worst_bodies_cost_the_gateway_little_and_health_answers_meanwhile() -> None:
    places = {name: CHAT_PLACES[name] for name in ("modalities", "messages", "unread field", "feedback")}
    with service("--max-seconds", "20") as watched:
        for name, path, body in bodies(places, MEGABYTES, 10_000):
            if name.partition(": ")[2].startswith(HARD):
                affordable(watched, name, path, body)


def count(value: Any) -> int:
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return isinstance(value, (list, dict)) + max(0, len(inner) - 1) + sum(map(count, inner))


def depth(value: Any) -> int:
    if not isinstance(value, (list, dict)):
        return 0
    return 1 + max(map(depth, value.values() if isinstance(value, dict) else value), default=0)


awkward = st.text(alphabet='"\\[]{},:a\u4e2d', max_size=6)
nested = st.recursive(
    st.none() | st.integers() | awkward,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(awkward, inner, max_size=4),
)


@given(nested, st.booleans())
@settings(deadline=None)
def test_values_and_depth_are_counted_exactly_without_reading_the_json(value: Any, ascii_only: bool) -> None:
    assert measure(json.dumps(value, ensure_ascii=ascii_only).encode()) == (count(value), depth(value))


@pytest.mark.parametrize("shift", range(-3, 4))
def test_a_text_that_crosses_a_block_is_a_text_in_both(shift: int) -> None:
    value = ["x" * (_BLOCK + shift), '[{,\\"', [["y"]]]
    assert measure(json.dumps(value).encode()) == (count(value), depth(value))


def test_a_body_that_is_too_deep_is_400_and_one_of_too_many_values_413_before_it_is_read(serve: Serve) -> None:
    client = serve()
    deep = client.post("/score", content=b"[" * 65 + b"]" * 65, headers=JSON_TYPE)
    assert (deep.status_code, "64" in deep.json()["detail"]) == (400, True)
    many = client.post("/score", content=b"[" + b"1," * 40_000, headers=JSON_TYPE)
    assert (many.status_code, "32832 values" in many.json()["detail"]) == (413, True), "it is not JSON either"


def test_all_texts_together_have_a_limit_and_equal_ones_count_once(serve: Serve) -> None:
    client = serve(options=Options(limits=RequestLimits(max_text_mb=0.001)))
    same = {"pairs": [["a" * 400, "b"]] * 20}
    assert client.post("/score", json=same).status_code == 200
    wide = {"instruction": "a", "responses": ["\u4e2d" * 200, "\u4e2d" * 201]}
    answer = client.post("/select", json=wide)
    assert answer.status_code == 413
    assert_names(answer.json()["detail"], "1204 bytes", "1000", "fewer pairs")


def test_elements_of_binary_tensors_count_as_values(serve: Serve) -> None:
    client, path = serve(options=Options(limits=RequestLimits(max_pairs=10))), "/v2/models/cappy/infer"
    for elements, status in ((100, 400), (384, 400), (385, 413), (100_000, 413)):
        head = json.dumps({"inputs": [{"parameters": {"binary_data_size": 4 * elements}}]}).encode()
        headers = {"inference-header-content-length": str(len(head))}
        assert client.post(path, content=head + bytes(4 * elements), headers=headers).status_code == status, elements
    strange = client.post(path, content=b'{"inputs": 5}', headers={"inference-header-content-length": "13"})
    assert strange.status_code == 400


def test_bodies_that_are_held_at_once_have_a_limit_and_leave_it_when_they_are_answered() -> None:
    budget = BodyBudget(100)
    with budget.reserve() as first:
        first.extend(60)
        with budget.reserve() as second:
            second.extend(40)
            with pytest.raises(Refusal) as refused:
                second.extend(1)
        assert (refused.value.status, refused.value.retry_after) == (503, 1)
        kept = first.transfer()
    assert budget.used_bytes == 60
    kept.release()
    assert budget.used_bytes == 0


def test_more_bodies_than_the_budget_holds_are_503_and_the_others_are_answered(serve: Serve) -> None:
    client = serve(FakeEngine(delay=0.5), Options(limits=RequestLimits(max_body_mb=0.001)))
    answers: list[int] = []

    def ask(number: int) -> None:
        answers.append(client.post("/score", json={"pairs": [[str(number), "x" * 600]]}).status_code)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert set(answers) == {200, 503}
    assert client.post("/score", json={"pairs": [["a", "b"]]}).status_code == 200


def test_a_name_that_a_client_chose_is_not_repeated_whole(serve: Serve) -> None:
    answer = serve().post("/score", json={"pairs": [["a", "b"]], "k" * 100_000: 1})
    assert answer.status_code == 422
    assert len(answer.text) < 500


def test_texts_are_checked_where_they_are_short_for_sure_without_being_encoded() -> None:
    bounds = Bounds(max_characters=10, max_text_bytes=40)
    bounds.check_texts(["\U0001f600" * 10])
    with raises_naming(Refusal, "11 characters", "10"):
        bounds.check_texts(["a" * 11])
    with raises_naming(Refusal, "44 bytes", "40"):
        bounds.check_texts(["\U0001f600" * 10, "\U0001f600"])
