"""Cohere, Jina, vLLM and Text Embeddings Inference: the shapes of their requests and answers."""

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from scoring_function import FakeEngine
from wording import assert_names

from cappy.scoring.encoding import Pair
from serving.dialects.tei import PREDICT

Serve = Callable[..., TestClient]
QUERY, TEXTS = "abc", ["x", "xxxx", "", "yyyy"]
BEST = [(1, 3.004), (3, 3.004), (0, 3.001), (2, 3.0)]
TOKENS = sum(len(QUERY) + 1 + len(text) for text in TEXTS)


def ranks(results: list[dict[str, Any]], score: str = "relevance_score") -> list[tuple[int, float]]:
    return [(result["index"], result[score]) for result in results]


def test_coheres_second_version_gives_places_and_scores_best_first(serve: Serve) -> None:
    answer = serve().post("/v2/rerank", json={"model": "cappy", "query": QUERY, "documents": TEXTS})
    body = answer.json()
    assert answer.status_code == 200
    assert ranks(body["results"]) == BEST
    assert body["id"] == answer.headers["X-Request-Id"]
    assert body["meta"] == {
        "api_version": {"version": "2"},
        "billed_units": {"input_tokens": TOKENS},
        "tokens": {"input_tokens": TOKENS},
    }
    assert set(body["results"][0]) == {"index", "relevance_score"}


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_top_n_gives_the_best_alone_and_may_be_more_than_there_are(serve: Serve, path: str) -> None:
    client, body = serve(), {"query": QUERY, "documents": TEXTS}
    for top_n, count in ((1, 1), (3, 3), (9, 4), (None, 4)):
        assert ranks(client.post(path, json={**body, "top_n": top_n}).json()["results"]) == BEST[:count]


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank"])
def test_the_shared_rerank_answers_with_the_fields_of_cohere_jina_and_vllm(serve: Serve, path: str) -> None:
    answer = serve().post(path, json={"query": QUERY, "documents": TEXTS})
    body = answer.json()
    assert ranks(body["results"]) == BEST
    assert [result["document"]["text"] for result in body["results"]] == ["xxxx", "yyyy", "x", ""]
    assert body["id"] == answer.headers["X-Request-Id"]
    assert body["model"] == "cappy"
    assert body["usage"] == {"prompt_tokens": TOKENS, "total_tokens": TOKENS}
    assert body["meta"]["api_version"] == {"version": "1"}


def test_documents_may_be_objects_come_back_as_they_were_and_may_be_left_out(serve: Serve) -> None:
    body = {"query": QUERY, "documents": ["x", {"text": "xxxx", "title": "t"}], "rank_fields": ["text"]}
    results = serve().post("/v1/rerank", json={**body, "max_chunks_per_doc": 10}).json()["results"]
    assert [result["document"] for result in results] == [{"text": "xxxx", "title": "t"}, {"text": "x"}]
    plain = serve().post("/v1/rerank", json={**body, "return_documents": False}).json()["results"]
    assert [set(result) for result in plain] == [{"index", "relevance_score"}] * 2


def test_vllms_rerank_gives_logits_where_no_activation_is_wanted_and_everything_for_a_top_n_of_0(serve: Serve) -> None:
    body = {"query": QUERY, "documents": TEXTS, "use_activation": False, "top_n": 0}
    assert ranks(serve().post("/rerank", json=body).json()["results"]) == [
        (index, pytest.approx(10 * score)) for index, score in BEST
    ]


def test_tei_ranks_texts_in_a_list_of_their_own(serve: Serve) -> None:
    answer = serve().post("/rerank", json={"query": QUERY, "texts": TEXTS})
    assert answer.json() == [{"index": index, "score": score} for index, score in BEST]
    shown = serve().post("/rerank", json={"query": QUERY, "texts": TEXTS, "return_text": True}).json()
    assert [rank["text"] for rank in shown] == ["xxxx", "yyyy", "x", ""]


def test_teis_raw_scores_are_logits_and_ranked_as_such(serve: Serve) -> None:
    body = {"query": QUERY, "texts": TEXTS, "raw_scores": True}
    assert ranks(serve().post("/rerank", json=body).json(), "score") == [
        (index, pytest.approx(10 * score)) for index, score in BEST
    ]


def test_tei_predicts_a_pair_as_a_list_and_pairs_as_a_list_of_lists(serve: Serve) -> None:
    client = serve()
    one = client.post("/predict", json={"inputs": ["ab", "x"]}).json()
    assert one == [{"score": 2.001, "label": "LABEL_0"}]
    two = client.post("/predict", json={"inputs": [["ab", "x"], ["a", ""]]}).json()
    assert two == [one, [{"score": 1.0, "label": "LABEL_0"}]]
    raw = client.post("/predict", json={"inputs": [["ab", "x"]], "raw_scores": True}).json()
    assert raw == [[{"score": pytest.approx(20.01), "label": "LABEL_0"}]]


@pytest.mark.parametrize(
    ("path", "body"), [("/rerank", {"query": "ab", "texts": ["x", "x" * 9]}), ("/predict", {"inputs": ["ab", "x" * 9]})]
)
def test_tei_refuses_a_pair_that_is_too_long_where_it_may_not_be_cut(
    serve: Serve, path: str, body: dict[str, Any]
) -> None:
    short, long = serve(FakeEngine(longest=10)), serve(FakeEngine(longest=11))
    answer = short.post(path, json={**body, "truncate": False})
    assert (answer.status_code, answer.json()) == (
        422,
        {
            "error": "a pair is longer than the scorer's maximum; shorten it or allow truncation",
            "error_type": "validation",
        },
    )
    assert short.post(path, json={**body, "truncate": True}).status_code == 200
    assert short.post(path, json=body).status_code == 200
    assert long.post(path, json={**body, "truncate": False}).status_code == 200


def test_teis_error_types_are_reported_apart(serve: Serve) -> None:
    def fails(pair: Pair) -> float:
        if pair[1] == "bad":
            raise RuntimeError("no")
        return 0.0

    answer = serve(FakeEngine(score=fails)).post("/predict", json={"inputs": ["a", "bad"]})
    assert (answer.status_code, answer.json()["error_type"]) == (500, "backend")
    kinds = {status: PREDICT.error_body(status, "no")["error_type"] for status in (413, 422, 429, 503)}
    assert kinds == {413: "validation", 422: "validation", 429: "overloaded", 503: "unhealthy"}


NAMES = [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")]


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
@pytest.mark.parametrize("names", NAMES)
def test_vllm_scores_one_with_one_one_with_many_and_many_with_as_many(
    serve: Serve, path: str, names: tuple[str, str]
) -> None:
    client = serve()
    for first, second, scores in (
        ("ab", "x", [2.001]),
        ("ab", ["x", "xy"], [2.001, 2.002]),
        (["ab"], ["x", "xy"], [2.001, 2.002]),
        (["ab", "a"], ["x", "xy"], [2.001, 1.002]),
    ):
        answer = client.post(path, json=dict(zip(names, (first, second), strict=True)))
        body = answer.json()
        assert body["data"] == [
            {"index": index, "object": "score", "score": score} for index, score in enumerate(scores)
        ]
        assert (body["object"], body["model"]) == ("list", "cappy")
        assert body["id"] == f"score-{answer.headers['X-Request-Id']}"
    assert body["usage"] == {"prompt_tokens": 8, "total_tokens": 8, "completion_tokens": 0}


def test_vllm_gives_logits_without_activation_and_refuses_numbers_that_do_not_match(serve: Serve) -> None:
    client = serve()
    raw = client.post("/score", json={"text_1": "ab", "text_2": "x", "use_activation": False}).json()
    assert raw["data"][0]["score"] == pytest.approx(20.01)
    answer = client.post("/score", json={"text_1": ["a", "b"], "text_2": ["x", "y", "z"]})
    assert answer.status_code == 400
    assert_names(answer.json()["error"]["message"], "body: ", "2 instructions", "3 responses")


def test_on_a_shared_path_the_fields_of_a_body_decide(serve: Serve) -> None:
    client = serve()
    assert "scores" in client.post("/score", json={"pairs": [["a", "b"]]}).json()
    assert "data" in client.post("/score", json={"text_1": "a", "text_2": "b"}).json()
    assert "error" in client.post("/score", json={"text_1": "a"}).json()
    assert "detail" in client.post("/score", json={}).json()
    assert "results" in client.post("/rerank", json={"query": "a", "documents": ["b"]}).json()
    assert isinstance(client.post("/rerank", json={"query": "a", "texts": ["b"]}).json(), list)
