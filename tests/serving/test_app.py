"""The HTTP application, with functions in place of a scorer."""

import json
import logging
import threading
import time
from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from cappy.errors import FolderError
from serving import create_app

SHAPE = 'send {"pairs": [["instruction", "response"], ...]}'


def lengths(pairs: list[tuple[str, str]]) -> list[float]:
    """A scorer that tells both members and their order apart."""
    return [len(instruction) + len(response) / 1000 for instruction, response in pairs]


def until_ready(client: TestClient) -> None:
    deadline = time.monotonic() + 10
    while client.get("/ready").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(create_app(lengths, version="abc", max_body_bytes=2000, max_pairs=5)) as client:
        yield client


def test_scores_come_in_the_order_of_the_pairs_and_each_pair_keeps_its_members(client: TestClient) -> None:
    pairs = [["a", "xyz"], ["abc", ""], ["", "x"], ["a", "xyz"]]
    answer = client.post("/score", json={"pairs": pairs})
    assert answer.status_code == 200
    assert answer.json() == {"scores": [1.003, 3.0, 0.001, 1.003], "version": "abc"}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ('{"pairs": []}', "pairs: "),
        ('{"pairs": [["a"]]}', "pairs.0.1: "),
        ('{"pairs": [["a", "b", "c"]]}', "pairs.0: "),
        ('{"pairs": [["a", 1]]}', "pairs.0.1: "),
        ('{"pairs": [["a", null]]}', "pairs.0.1: "),
        ('{"pairs": [["a", "\\ud800"]]}', "pairs.0.1: "),
        ('{"pair": [["a", "b"]]}', "pairs: "),
        ('{"pairs": [["a", "b"]], "model": "x"}', "model: "),
        ("[]", "body: "),
        ("", "body: "),
        ('{"pairs"', ""),
    ],
)
def test_a_body_of_another_shape_is_refused_with_its_field_and_the_right_shape(
    client: TestClient, body: str, field: str
) -> None:
    answer = client.post("/score", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    detail = answer.json()["detail"]
    assert detail.startswith(field)
    assert detail.endswith(SHAPE)
    assert "\n" not in detail


def test_a_refusal_does_not_repeat_what_was_sent(client: TestClient) -> None:
    assert "secret" not in client.post("/score", json={"pairs": [["secret", 1]]}).text


def test_more_pairs_than_allowed_are_413(client: TestClient) -> None:
    assert client.post("/score", json={"pairs": [["a", "b"]] * 5}).status_code == 200
    answer = client.post("/score", json={"pairs": [["a", "b"]] * 6})
    assert answer.status_code == 413
    assert answer.json() == {"detail": "6 pairs are above 5; send them in several requests"}


def test_a_body_above_the_limit_is_413_announced_or_not(client: TestClient) -> None:
    body = json.dumps({"pairs": [["a", "b" * 2000]]}).encode()
    announced = client.post("/score", content=body)
    streamed = client.post("/score", content=iter([body[:1000], body[1000:]]))
    for answer in (announced, streamed):
        assert answer.status_code == 413
        assert answer.json()["detail"] == "the body is above 2000 bytes; send fewer pairs per request"


def test_health_answers_during_a_slow_score_and_scores_are_computed_one_request_at_a_time() -> None:
    running, most, entered, release = 0, 0, threading.Event(), threading.Event()

    def slow(pairs: list[tuple[str, str]]) -> list[float]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        entered.set()
        assert release.wait(10)
        running -= 1
        return [0.0] * len(pairs)

    with TestClient(create_app(slow, version="abc")) as client:
        until_ready(client)
        requests = [
            threading.Thread(target=client.post, args=("/score",), kwargs={"json": {"pairs": [["a", "b"]]}})
            for _ in range(3)
        ]
        for request in requests:
            request.start()
        assert entered.wait(10)
        assert client.get("/health").json() == {"status": "ok"}
        release.set()
        for request in requests:
            request.join(10)
    assert (running, most) == (0, 1)


def test_ready_turns_from_503_to_200_when_the_probe_has_answered() -> None:
    release = threading.Event()

    def verify() -> None:
        assert release.wait(10)

    with TestClient(create_app(lengths, version="abc", verify=verify)) as client:
        before = client.get("/ready")
        assert before.status_code == 503
        assert before.json() == {"ready": False, "version": "abc", "reason": "the probe is running; ask again"}
        assert client.get("/health").status_code == 200
        release.set()
        until_ready(client)
        assert client.get("/ready").json() == {"ready": True, "version": "abc", "reason": ""}


def test_a_failed_probe_keeps_the_service_unready_and_says_why() -> None:
    failed = threading.Event()

    def verify() -> None:
        failed.set()
        raise FolderError("weights.safetensors: is damaged; fetch it again")

    with TestClient(create_app(lengths, version="abc", verify=verify)) as client:
        assert failed.wait(10)
        deadline = time.monotonic() + 10
        while "damaged" not in client.get("/ready").json()["reason"]:
            assert time.monotonic() < deadline
        assert client.get("/ready").status_code == 503


def test_the_access_log_is_one_json_object_per_request_without_its_texts(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="serving.access"):
        client.post("/score?prompt=secret", json={"pairs": [["secret", "secret"], ["secret", "secret"]]})
        client.get("/nowhere")
    records = [json.loads(record.message) for record in caplog.records if record.name == "serving.access"]
    assert [(r["method"], r["path"], r["status"], r["pairs"]) for r in records] == [
        ("POST", "/score", 200, 2),
        ("GET", "/nowhere", 404, 0),
    ]
    assert "secret" not in "".join(record.message for record in caplog.records if record.name.startswith("serving"))


def test_openapi_names_every_route_with_every_status_it_answers() -> None:
    app: FastAPI = create_app(lengths, version="abc")
    routes = {
        (method, path): sorted(operation["responses"])
        for path, methods in app.openapi()["paths"].items()
        for method, operation in methods.items()
    }
    assert routes == {
        ("post", "/score"): ["200", "413", "422"],
        ("get", "/health"): ["200"],
        ("get", "/ready"): ["200", "503"],
    }
