"""The HTTP application, with functions in place of a scorer."""

import json
import logging
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from calibrations import straight
from fastapi.testclient import TestClient
from scoring_function import FakeEngine, model, until_ready
from waiting import wait_until
from wording import assert_names

from cappy.scoring.encoding import Pair
from cappy.selection.linear import Rule, Selector, parse_selector
from serving.app import Options, create_app
from serving.config import RequestLimits
from serving.engine import Models
from serving.guards import Keys

Serve = Callable[..., TestClient]
SHAPE = 'send {"pairs": [["instruction", "response"], ...]}'


def test_scores_come_in_the_order_of_the_pairs_and_each_pair_keeps_its_members(serve: Serve) -> None:
    pairs = [["a", "xyz"], ["abc", ""], ["", "x"], ["a", "xyz"]]
    answer = serve().post("/score", json={"pairs": pairs})
    assert answer.status_code == 200
    expected = {"scores": [1.003, 3.0, 0.001, 1.003], "logits": [10.03, 30.0, 0.01, 10.03]}
    assert answer.json() == {**expected, "expected": None, "version": "abc"}


def test_a_calibrated_scorer_says_what_to_expect(serve: Serve) -> None:
    client = serve(calibration=straight({1: 1.0, 4: 0.5}, score=10.0))
    answer = client.post("/score", json={"pairs": [["a", ""], ["abc", ""]]}).json()
    assert answer["scores"] == [1.0, 3.0]
    assert answer["expected"] == pytest.approx([0.1, 0.3]), "pairs are scored one by one, however many are sent"


def test_what_is_expected_of_a_pick_depends_on_how_many_distinct_responses_it_is_the_best_of(serve: Serve) -> None:
    client = serve(FakeEngine(score=lambda pair: float(pair[1])), calibration=straight({1: 1.0, 4: 0.5}, score=10.0))

    def of(*responses: str) -> tuple[int, list[float]]:
        answer = client.post("/select", json={"instruction": "i", "responses": responses}).json()
        return answer["index"], answer["expected"]

    assert of("8")[1] == pytest.approx([0.8])
    assert of("8", "8", "8")[1] == pytest.approx([0.8] * 3), "the same text again is no other candidate"
    index, expected = of("1", "2", "8", "3")
    assert (index, expected) == (2, pytest.approx([0.05, 0.1, 0.4, 0.15]))
    assert of("1", "2", "8", "3", "4", "5")[1][2] == pytest.approx(0.4), "beyond the largest n its map holds"
    assert of("2", "8")[1] == pytest.approx([0.15, 0.6]), "between two n it is interpolated"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"likelihoods": [-1.0]}, "there are 1 for 2 responses"),
        ({"likelihoods": [-1.0, None]}, "likelihoods"),
        ({"greedy": 2}, "0 to 1, got 2"),
        ({"greedy": "0"}, "greedy"),
        ({"closed_choices": 1}, "closed_choices"),
    ],
)
def test_what_does_not_fit_the_responses_is_refused(serve: Serve, fields: dict[str, Any], problem: str) -> None:
    answer = serve().post("/select", json={"instruction": "i", "responses": ["a", "b"], **fields})
    assert answer.status_code == 422
    assert problem in answer.json()["detail"]


def test_select_picks_by_the_rule_for_what_is_known_and_says_by_what(serve: Serve) -> None:
    rules = (
        Rule(features=("score",), weights=(1.0,)),
        Rule(features=("score", "mbr", "greedy"), weights=(0.0, 0.0, 1.0)),
        Rule(features=("score", "likelihood"), weights=(0.0, 1.0)),
    )
    client = serve(selector=Selector(rules=rules))
    pool = {"instruction": "i", "responses": ["a", "bbb", "cc"]}
    for fields, picked, by in (
        ({}, 1, "score"),
        ({"greedy": 0}, 0, "greedy"),
        ({"likelihoods": [-3.0, -2.0, -1.0]}, 2, "likelihood"),
        ({"greedy": 0, "closed_choices": True}, 1, "score"),
    ):
        answer = client.post("/select", json={**pool, **fields}).json()
        assert (answer["index"], answer["picked_by"]) == (picked, by), fields
        assert max(range(3), key=answer["values"].__getitem__) == picked
    served = client.get("/selector").json()
    assert parse_selector(served["selector"]).rules == rules
    assert served["calibration"] is None


def test_select_gives_the_first_of_the_best(serve: Serve) -> None:
    answer = serve().post("/select", json={"instruction": "i", "responses": ["a", "bbb", "ccc", ""]}).json()
    assert (answer["index"], answer["response"]) == (1, "bbb")
    assert answer["scores"] == [1.001, 1.003, 1.003, 1.0]


def test_every_answer_says_who_gave_it(serve: Serve) -> None:
    client = serve()
    answers = [
        client.post("/score", json={"pairs": [["a", "b"]]}, headers={"X-Request-Id": "mine-1"}),
        client.post("/score", json={}),
        client.get("/ready"),
        client.get("/nowhere"),
    ]
    for answer in answers:
        assert answer.headers["X-Cappy-Version"] == "abc"
        assert answer.headers["X-Cappy-Manifest-Sha256"] == "f" * 64
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answers[0].headers["X-Request-Id"] == "mine-1"
    assert len({answer.headers["X-Request-Id"] for answer in answers}) == 4
    forged = client.get("/ready", headers={"X-Request-Id": 'a"b c'})
    assert re.fullmatch("[0-9a-f]{32}", forged.headers["X-Request-Id"])


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ('{"pairs": []}', 422, "pairs: "),
        ('{"pairs": [["a"]]}', 422, "pairs.0.1: "),
        ('{"pairs": [["a", "b", "c"]]}', 422, "pairs.0: "),
        ('{"pairs": [["a", 1]]}', 422, "pairs.0.1: "),
        ('{"pairs": [["a", null]]}', 422, "pairs.0.1: "),
        ('{"pairs": [["a", NaN]]}', 422, "pairs.0.1: "),
        ('{"pairs": [["a", "\\ud800"]]}', 400, "the body is not JSON"),
        ('{"pair": [["a", "b"]]}', 422, "pairs: "),
        ('{"pairs": [["a", "b"]], "model": "x"}', 422, "model: "),
        ("[]", 422, "body: "),
        ("", 400, "the body is not JSON"),
        ('{"pairs"', 400, "the body is not JSON"),
        ("[" * 100_000, 400, "the JSON is nested deeper than 64 levels"),
        ('{"pairs": ' + "9" * 10_000 + "}", 400, "the body is not JSON"),
    ],
)
def test_a_body_of_another_shape_is_refused_with_its_field_and_the_right_shape(
    serve: Serve, body: str, status: int, field: str
) -> None:
    answer = serve().post("/score", content=body, headers={"content-type": "application/json"})
    detail = answer.json()["detail"]
    assert answer.status_code == status, detail
    assert detail.startswith(field)
    assert status == 400 or detail.endswith(SHAPE)
    assert "\n" not in detail


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/score", {}, r"pairs: .*missing"),
        ("/score", [], r"body: .*object"),
        ("/score", {"pairs": []}, r"pairs: .*at least 1"),
        ("/score", {"pairs": [["a", "b"]], "mood": 1}, r"mood: .*leave it out"),
        ("/rerank", {"query": "", "documents": ["a"]}, r"query: .*empty"),
        ("/rerank", {"query": "a", "documents": [{"txt": "a"}]}, r"documents\.0: .*string \(and 1 more\)"),
        ("/v1/score", {"text_1": "", "text_2": ["a"]}, r"text_1: .*empty"),
        ("/predict", {"inputs": "a"}, r"inputs: .*list"),
        ("/v2/rerank", {"query": "a", "documents": ["a"], "top_n": 0}, r"top_n: .*1"),
    ],
)
def test_a_wrong_field_is_reported_in_words_of_json_not_of_our_types(
    serve: Serve, path: str, body: object, said: str
) -> None:
    result = serve().post(path, json=body).json()
    actual = result.get("detail") or result.get("message") or result["error"]
    assert re.match(f"{said}[^{{]*; send {{", actual if isinstance(actual, str) else actual["message"])


def test_a_path_a_method_or_a_version_that_is_not_here_is_reported_with_what_is(serve: Serve) -> None:
    client = serve()
    assert_names(client.get("/nowhere").json()["detail"], "/nowhere: ", "GET /openapi.json")
    wrong = client.get("/score")
    assert_names(wrong.json()["detail"], "GET /score: ", "POST", "GET /openapi.json")
    assert (wrong.status_code, wrong.headers["Allow"]) == (405, "POST")
    other = client.post("/score", json={"pairs": [["a", "b"]], "version": "0123456789ab"})
    assert (other.status_code, other.json()["detail"].endswith(": abc")) == (404, True)


def test_a_refusal_does_not_repeat_what_was_sent(serve: Serve) -> None:
    assert "secret" not in serve().post("/score", json={"pairs": [["secret", 1]]}).text


def test_what_is_too_large_is_413(serve: Serve) -> None:
    client = serve(options=Options(limits=RequestLimits(max_pairs=5, max_characters=9)))
    assert client.post("/score", json={"pairs": [["a", "b" * 9]] * 5}).status_code == 200
    for pairs, named in (([["a", "b"]] * 6, ("6 pairs", "5")), ([["a", "b" * 10]], ("10 characters", "9", "shorter"))):
        answer = client.post("/score", json={"pairs": pairs})
        assert (answer.status_code, set(answer.json())) == (413, {"detail"})
        assert_names(answer.json()["detail"], *named)


def test_a_body_above_the_limit_is_413_announced_or_not(serve: Serve) -> None:
    client = serve(options=Options(limits=RequestLimits(max_body_mb=0.002)))
    body = json.dumps({"pairs": [["a", "b" * 2000]]}).encode()
    for content in (body, iter([body[:1000], body[1000:]])):
        answer = client.post("/score", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert_names(answer.json()["detail"], "2000 bytes", "fewer pairs")


def test_a_request_that_takes_too_long_is_504_and_leaves_the_queue(serve: Serve) -> None:
    engine = FakeEngine(delay=0.3)
    client = serve(engine, Options(batch_tokens=3, limits=RequestLimits(timeout=60)))
    body = {"pairs": [["a", str(number)] for number in range(9)]}
    answer = client.post("/score", json=body, headers={"X-Timeout-Seconds": "0.4"})
    assert answer.status_code == 504
    assert_names(answer.json()["detail"], "time", "fewer pairs")
    assert client.post("/score", json={"pairs": [["b", "b"]]}).status_code == 200
    assert sum(pair[0] == "a" for batch in engine.batches for pair in batch) < 5


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "0", "soon"])
def test_a_deadline_that_is_no_time_is_400(serve: Serve, text: str) -> None:
    answer = serve().post("/score", json={"pairs": [["a", "b"]]}, headers={"X-Timeout-Seconds": text})
    assert answer.status_code == 400
    assert_names(answer.json()["detail"], "X-Timeout-Seconds: ", "above 0")


def test_overload_is_429_with_the_seconds_to_wait_and_never_a_score(serve: Serve) -> None:
    client = serve(FakeEngine(delay=0.2), Options(batch_tokens=3, max_queued_tokens=30))
    answers = []

    def ask(number: int) -> None:
        answers.append(client.post("/score", json={"pairs": [[str(number), str(n)] for n in range(5)]}))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join(30)
    assert sorted({answer.status_code for answer in answers}) == [200, 429]
    for answer in answers:
        if answer.status_code == 200:
            assert answer.json()["scores"] == [1.001] * 5
        else:
            assert 1 <= int(answer.headers["Retry-After"]) <= 60
            assert "scores" not in answer.json()


def test_a_scorer_that_fails_is_500_in_one_sentence(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    def fails(pair: Pair) -> float:
        if pair[1] == "bad":
            raise RuntimeError("secret weights")
        return 0.5

    client = serve(FakeEngine(score=fails))
    answer = client.post("/score", json={"pairs": [["a", "bad"]]})
    assert answer.status_code == 500
    assert set(answer.json()) == {"detail"}
    assert_names(answer.json()["detail"], "scorer", "log")
    assert "secret" not in answer.text
    assert "secret weights" in caplog.text
    assert client.post("/score", json={"pairs": [["a", "good"]]}).json()["scores"] == [0.5]


def test_only_known_keys_get_scores_and_probes_need_none(serve: Serve) -> None:
    client = serve(options=Options(keys=Keys(["first-key", "second-key"])))
    body = {"pairs": [["a", "b"]]}
    for key in ("Bearer first-key", "bearer second-key"):
        assert client.post("/score", json=body, headers={"Authorization": key}).status_code == 200
    for headers in (
        {},
        {"Authorization": "Bearer first"},
        {"Authorization": "first-key"},
        {"Authorization": "Bearer "},
    ):
        answer = client.post("/score", json=body, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    for path in ("/health", "/ready", "/startup", "/metrics"):
        assert client.get(path).status_code == 200


def test_browsers_of_other_sites_are_let_in_by_name_alone(serve: Serve) -> None:
    named = serve(options=Options(origins=["https://our.example"]))
    ask = {"Access-Control-Request-Method": "POST"}
    ours = named.options("/score", headers={"Origin": "https://our.example", **ask})
    assert ours.headers["Access-Control-Allow-Origin"] == "https://our.example"
    for client, origin in ((named, "https://other.example"), (serve(), "https://our.example")):
        assert "Access-Control-Allow-Origin" not in client.options("/score", headers={"Origin": origin, **ask}).headers


def test_health_answers_during_a_slow_score() -> None:
    entered, release = threading.Event(), threading.Event()

    def slow(pair: Pair) -> float:
        if pair[0] == "slow":
            entered.set()
            assert release.wait(10)
        return 0.0

    with TestClient(create_app(Models(model(FakeEngine(score=slow))))) as client:
        until_ready(client)
        request = threading.Thread(target=client.post, args=("/score",), kwargs={"json": {"pairs": [["slow", "b"]]}})
        request.start()
        assert entered.wait(10)
        assert client.get("/health").json() == {"status": "ok"}
        release.set()
        request.join(10)


def test_ready_turns_from_503_to_200_when_the_probe_has_answered() -> None:
    release = threading.Event()

    def waits(pair: Pair) -> float:
        assert release.wait(10)
        return 0.5

    with TestClient(create_app(Models(model(FakeEngine(score=waits))))) as client:
        for path in ("/ready", "/startup"):
            before = client.get(path)
            assert before.status_code == 503
            assert before.json() == {"ready": False, "version": "abc", "reason": before.json()["reason"]}
            assert "probe" in before.json()["reason"]
        early = client.post("/score", json={"pairs": [["a", "b"]]})
        assert (early.status_code, early.headers["Retry-After"]) == (503, "1")
        assert client.get("/health").status_code == 200
        release.set()
        until_ready(client)
        assert client.get("/ready").json() == {"ready": True, "version": "abc", "reason": ""}


@pytest.mark.parametrize("answer", [float("nan"), float("inf"), 0.9])
def test_a_failed_probe_keeps_the_service_unready_and_says_why(answer: float) -> None:
    options = Options(probes=[(("What is 1 + 1?", "2"), 0.5)])
    with TestClient(create_app(Models(model(FakeEngine(score=lambda pair: answer))), options)) as client:
        wait_until(lambda: "scorer gives" in client.get("/ready").json()["reason"], "the probe's end", seconds=10)
        assert client.get("/ready").status_code == 503
        assert client.post("/score", json={"pairs": [["a", "b"]]}).status_code == 503


def test_the_access_log_is_one_json_object_per_request_without_its_texts(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    client = serve()
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="serving.access"):
        client.post("/score?prompt=secret", json={"pairs": [["secret", "secret"], ["secret", "secret"]]})
        client.get("/nowhere")
    records = [json.loads(record.message) for record in caplog.records if record.name == "serving.access"]
    assert [(r["method"], r["path"], r["status"], r["pairs"], r.get("dialect")) for r in records] == [
        ("POST", "/score", 200, 2, "score"),
        ("GET", "/nowhere", 404, 0, None),
    ]
    assert "secret" not in "".join(record.message for record in caplog.records if record.name.startswith("serving"))


def test_prometheus_reads_requests_batches_scores_queue_and_version(serve: Serve) -> None:
    client = serve(FakeEngine(score=lambda pair: 0.35))
    client.post("/score", json={"pairs": [["a", "b"], ["a", "c"]]})
    client.post("/score", json={})
    text = client.get("/metrics").text
    for line in (
        'cappy_requests_total{dialect="score",status="200"} 1.0',
        'cappy_requests_total{dialect="score",status="422"} 1.0',
        'cappy_request_seconds_count{dialect="score"} 2.0',
        "cappy_pairs_total 2.0",
        'cappy_score_bucket{le="0.3"} 0.0',
        'cappy_score_bucket{le="0.4"} 2.0',
        "cappy_batch_tokens_sum 6.0",
        "cappy_queue_tokens 0.0",
        "cappy_ready 1.0",
        f'cappy_model_info{{model="cappy",sha256="{"f" * 64}",version="abc"}} 1.0',
    ):
        assert line in text.splitlines()


def test_openapi_names_every_route_with_every_status_it_answers(serve: Serve) -> None:
    document = serve().get("/openapi.json").json()
    score = document["paths"]["/score"]["post"]
    shapes = score["requestBody"]["content"]["application/json"]["schema"]["anyOf"]
    assert {"$ref": "#/components/schemas/ScoreRequest"} in shapes
    assert "pairs" in document["components"]["schemas"]["ScoreRequest"]["properties"]
    statuses = "200 400 401 403 404 408 413 415 421 422 429 500 503 504"
    assert set(score["responses"]) == set(statuses.split())
    assert set(document["paths"]["/ready"]["get"]["responses"]) == {"200", "503"}
    refs = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert refs <= set(document["components"]["schemas"])
