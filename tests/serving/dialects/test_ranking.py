"""A5: every dialect that ranks does so by logits, where the scores are 1.0 for several; A4: cuts are counted."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from fastapi.testclient import TestClient
from scoring_function import FakeEngine

from cappy.scoring.encoding import EncodedPair, Pair

Serve = Callable[..., TestClient]
TEXTS = ["a", "abc", "ab"]


@dataclass
class Saturated(FakeEngine):
    """Logits of 60 and more, whose sigmoid is 1.0 even in fp64; the longest text has the highest."""

    def compute(self, batch: Sequence[EncodedPair]) -> list[tuple[float, float]]:
        logits = [60.0 + len(pair.ids) for pair in batch]
        return [(1 / (1 + math.exp(-logit)), logit) for logit in logits]


def test_a5_select_picks_the_highest_logit(serve: Serve) -> None:
    answer = serve(Saturated()).post("/select", json={"instruction": "x", "responses": TEXTS}).json()
    assert answer["scores"] == [1.0, 1.0, 1.0]
    assert (answer["index"], answer["response"]) == (1, "abc")


def test_a5_score_says_the_logits_beside_the_scores(serve: Serve) -> None:
    answer = serve(Saturated()).post("/score", json={"pairs": [["x", text] for text in TEXTS]}).json()
    assert answer["scores"] == [1.0, 1.0, 1.0]
    assert answer["logits"] == [63.0, 65.0, 64.0]


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
@pytest.mark.parametrize("top", [1, 2, None])
def test_a5_rerank_orders_by_logits(serve: Serve, path: str, top: int | None) -> None:
    results = serve(Saturated()).post(path, json={"query": "x", "documents": TEXTS, "top_n": top}).json()["results"]
    assert [result["index"] for result in results] == [1, 2, 0][:top]
    assert {result["relevance_score"] for result in results} == {1.0}


def test_a5_tei_orders_by_logits(serve: Serve) -> None:
    results = serve(Saturated()).post("/rerank", json={"query": "x", "texts": TEXTS}).json()
    assert [result["index"] for result in results] == [1, 2, 0]


@dataclass
class Cutting(FakeEngine):
    """Cuts pairs of more than eight characters."""

    def encode(self, pairs: Sequence[Pair]) -> list[EncodedPair]:
        return [EncodedPair(pair.ids, pair.types, whole=len(pair.ids) <= 9) for pair in super().encode(pairs)]


@pytest.mark.parametrize("path", ["/score", "/select"])
def test_a4_an_answer_and_the_metrics_say_how_many_pairs_were_cut(serve: Serve, path: str) -> None:
    client, texts = serve(Cutting()), ["short", "much too long", "much too long", "far too long"]
    pairs: dict[str, Any] = {"pairs": [["x", text] for text in texts]}
    answer = client.post(path, json=pairs if path == "/score" else {"instruction": "x", "responses": texts})
    assert answer.headers["X-Cappy-Pairs-Cut"] == "2"
    assert answer.headers["X-Cappy-Version"] == "abc"
    assert "cappy_pairs_cut_total 2.0" in client.get("/metrics").text
    assert "X-Cappy-Pairs-Cut" not in client.post("/score", json={"pairs": [["x", "short"]]}).headers
