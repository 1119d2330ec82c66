"""The gateway in front of a small server that counts: which answer comes back, and what is said of it."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from typing import Any

import httpx
import openai
import pytest
from calibrations import straight
from chat_server import Model, serving
from gateway_server import PRICES, by_number, gateway, listening, sampled, scoring
from local_server import handled_by
from scripted_server import Script, refusing, saying, scripted
from wording import assert_names

from cappy.selection.linear import Rule, Selector
from serving.gateway.config import Policy, SpendingLimits
from serving.gateway.scoring import Evaluated, SampledCandidate, Scoring, with_values
from serving.gateway.upstream import LLM, Upstream

HALVES = straight({1: 0.5})
LIKELIHOODS = Evaluated(Selector(rules=(Rule(features=("score", "likelihood"), weights=(1.0, 1.0)),)))
"""What was fitted for a scorer whose selector uses likelihoods."""


def ask(url: str, text: str = "hello", *, details: bool = True, **more: object) -> httpx.Response:
    body = {"model": "m", "messages": [{"role": "user", "content": text}], **more}
    headers = {"X-Cappy-Candidates": "1"} if details else {}
    return httpx.post(f"{url}/chat/completions", json=body, headers=headers, timeout=30)


def test_the_best_of_all_candidates_comes_back_as_the_server_sent_it() -> None:
    model = Model()
    with (
        serving(model) as upstream,
        listening(gateway(upstream, policy=sampled(candidates=5, min_gain=0))) as url,
    ):
        answer = ask(url, seed=3)
    body = answer.json()
    assert body["choices"] == [
        {
            "index": 0,
            "finish_reason": "stop",
            "logprobs": None,
            "message": {"role": "assistant", "content": " HELLO 7/0 ", "refusal": None},
        }
    ]
    assert [(one["content"], one["score"]) for one in body["cappy"]["candidates"]] == [
        ("HELLO 7/0", 0.7),
        ("HELLO 3/3", 0.33),
        ("HELLO 3/2", 0.32),
        ("HELLO 3/1", 0.31),
        ("HELLO 3/0", 0.3),
    ]
    assert [(asked.get("n"), asked["seed"]) for asked in model.asked] == [(4, 3), (None, 7)]
    assert (body["model"], body["object"]) == ("m-2026", "chat.completion")


def test_a5_the_best_has_the_highest_logit_where_the_scores_are_1_for_all() -> None:
    async def score(pairs: Sequence[tuple[str, str]]) -> list[tuple[float, float]]:
        return [(1.0, 60 + by_number(response)) for _, response in pairs]

    saturated = Scoring(score=score, version=lambda: "0123456789ab")
    with (
        serving(Model()) as upstream,
        listening(gateway(upstream, scoring=saturated, policy=sampled(candidates=5, min_gain=0))) as url,
    ):
        body = ask(url, seed=3).json()
    assert body["choices"][0]["message"]["content"].strip() == "HELLO 7/0"
    assert [one["score"] for one in body["cappy"]["candidates"]] == [1.0] * 5
    assert [one["content"] for one in body["cappy"]["candidates"]][1:3] == ["HELLO 3/3", "HELLO 3/2"]


def test_usage_and_cost_are_those_of_every_call() -> None:
    with (
        serving(Model()) as upstream,
        listening(gateway(upstream, policy=sampled(candidates=6, min_gain=0))) as url,
    ):
        answer = ask(url)
    assert answer.json()["usage"] == {"prompt_tokens": 20, "completion_tokens": 30, "total_tokens": 50}
    assert float(answer.headers["x-cappy-cost"]) == pytest.approx(PRICES.cost(20, 30))
    assert (answer.headers["x-cappy-calls"], answer.headers["x-cappy-sampled"]) == ("2", "6")


@pytest.mark.parametrize("how", ["refused", "ignores_n", "copies_n"])
def test_a_server_that_takes_no_n_is_asked_one_by_one_and_never_again_for_more(how: str) -> None:
    switched: dict[str, Any] = {how: True}
    model = Model(refused=("n",)) if how == "refused" else Model(**switched)
    with (
        serving(model) as upstream,
        listening(gateway(upstream, policy=sampled(candidates=4, min_gain=0))) as url,
    ):
        first, again = ask(url, seed=1), ask(url, seed=1)
    assert [one["content"] for one in again.json()["cappy"]["candidates"]] == [f"HELLO {n}/0" for n in (4, 3, 2, 1)]
    assert len(first.json()["cappy"]["candidates"]) == 4
    assert [one.get("n") for one in model.asked].count(4) == 1
    assert again.headers["x-cappy-failed-calls"] == first.headers["x-cappy-failed-calls"] == "0"


def test_sampling_stops_at_a_score_that_is_good_enough() -> None:
    model = Model()
    policy = sampled(candidates=8, round_size=2, threshold=0.2, min_gain=0)
    with serving(model) as upstream, listening(gateway(upstream, policy=policy)) as url:
        answer = ask(url, seed=0)
    assert (answer.headers["x-cappy-stop"], answer.headers["x-cappy-sampled"]) == ("threshold", "4")


def test_the_threshold_is_on_the_calibrated_score_and_the_pick_on_the_scorers() -> None:
    level = straight({1: 0.3}, low=0.3)
    for calibration, count in ((HALVES, "6"), (level, "4")):
        policy = sampled(candidates=8, round_size=2, threshold=0.2 if calibration is HALVES else 0.4, min_gain=0.001)
        behind = scoring(calibration=calibration)
        with serving(Model()) as upstream, listening(gateway(upstream, policy=policy, scoring=behind)) as url:
            body = ask(url, seed=0).json()
        assert body["choices"][0]["message"]["content"] == f" HELLO {int(count) - 2}/1 "
        best = body["cappy"]["candidates"][0]
        assert best["calibrated_score"] == pytest.approx(calibration.apply([best["score"]], n=int(count))[0])
        assert (body["cappy"]["calibrated"], str(body["cappy"]["sampled"])) == (True, count)


def test_sampling_stops_where_another_sample_promises_too_little() -> None:
    behind = scoring(lambda _: 0.5)
    with serving(Model()) as upstream, listening(gateway(upstream, scoring=behind)) as url:
        answer = ask(url)
    assert (answer.headers["x-cappy-stop"], answer.headers["x-cappy-sampled"]) == ("gain", "4")


def test_a_request_without_randomness_is_sampled_once() -> None:
    with serving(Model()) as upstream, listening(gateway(upstream)) as url:
        answer = ask(url, temperature=0)
    assert (answer.headers["x-cappy-stop"], answer.headers["x-cappy-sampled"]) == ("temperature", "1")


def test_n_choices_are_the_n_best_and_are_sampled_whatever_stops_earlier() -> None:
    policy = sampled(candidates=8, round_size=1, threshold=0.0)
    with serving(Model()) as upstream, listening(gateway(upstream, policy=policy)) as url:
        body = ask(url, n=3, seed=0).json()
        too_many = ask(url, n=9)
    assert [(choice["index"], choice["message"]["content"]) for choice in body["choices"]] == [
        (0, " HELLO 0/2 "),
        (1, " HELLO 0/1 "),
        (2, " HELLO 0/0 "),
    ]
    assert too_many.status_code == 400
    assert too_many.json()["error"]["param"] == "n"


def test_logprobs_and_whatever_else_the_server_knows_pass_through() -> None:
    model = Model()
    with serving(model) as upstream, listening(gateway(upstream)) as url:
        body = ask(url, logprobs=True, response_format={"type": "json_object"}, top_k=5, user="u").json()
    assert len(body["choices"][0]["logprobs"]["content"]) == 2
    sent = model.asked[0]
    assert (sent["logprobs"], sent["top_k"], sent["user"]) == (True, 5, "u")
    assert sent["response_format"] == {"type": "json_object"}


def test_without_the_header_the_body_is_openais_alone() -> None:
    with serving(Model()) as upstream, listening(gateway(upstream)) as url:
        answer = ask(url, details=False)
        odd = httpx.post(f"{url}/chat/completions", json={}, headers={"X-Cappy-Candidates": "yes"})
    assert set(answer.json()) == {"id", "object", "created", "model", "choices", "usage"}
    assert odd.status_code == 400


@pytest.mark.parametrize("word", ["refuse", "filtered", "blank"])
def test_where_no_candidate_can_be_scored_the_servers_own_answer_is_given(word: str) -> None:
    policy = sampled(candidates=4, floor=0.5)
    with serving(Model()) as upstream, listening(gateway(upstream, policy=policy)) as url:
        answer = ask(url, word)
    assert answer.headers["x-cappy-outcome"] == "unscored"
    assert "x-cappy-score" not in answer.headers
    assert {one["score"] for one in answer.json()["cappy"]["candidates"]} == {None}
    assert answer.json()["choices"][0]["message"]["content"] in (None, "")


def test_below_the_floor_the_answer_is_a_stated_refusal() -> None:
    with (
        serving(Model()) as upstream,
        listening(gateway(upstream, policy=sampled(floor=0.5, min_gain=0))) as url,
    ):
        answer = ask(url, seed=0)
    choice = answer.json()["choices"][0]
    assert (answer.headers["x-cappy-outcome"], choice["finish_reason"]) == ("abstained", "content_filter")
    assert choice["message"]["refusal"] == choice["message"]["content"] != ""
    assert answer.json()["usage"]["completion_tokens"] == 40


def test_below_the_floor_a_second_llm_is_asked_with_its_own_key_and_the_best_of_all_is_given() -> None:
    first, second = Model(), Model()
    policy = sampled(candidates=2, floor=0.5)
    with serving(first) as upstream, serving(second) as other:
        for key, best in (("second-key", "SEED"), ("", "SEED")):
            llm = LLM(url=other, model="big", key=key, passes_key=False, prices=PRICES)
            behind = scoring(lambda text: by_number(text) + 0.1 * (len(first.asked) and "0/0" in text))
            made = gateway(upstream, policy=policy, second_upstream=Upstream(llm), scoring=behind)
            with listening(made) as url:
                body = {"model": "m", "messages": [{"role": "user", "content": "seed"}], "seed": 0}
                answer = httpx.post(
                    f"{url}/chat/completions", json=body, headers={"Authorization": "Bearer client-key"}
                )
            assert answer.headers["x-cappy-outcome"] == "escalated"
            assert answer.json()["choices"][0]["message"]["content"].strip().startswith(best)
            assert answer.headers["x-cappy-sampled"] == "3"
            assert answer.json()["usage"]["prompt_tokens"] == 20
    assert first.keys == {"client-key"}
    assert second.keys == {"second-key", ""}
    assert {asked["model"] for asked in second.asked} == {"big"}


def test_a_second_llm_that_fails_leaves_the_best_of_the_first() -> None:
    dead = Upstream(LLM(url="http://127.0.0.1:9/v1", model="big", passes_key=False))
    made: dict[str, Any] = {"policy": sampled(candidates=2, floor=0.5), "second_upstream": dead}
    with serving(Model()) as upstream, listening(gateway(upstream, **made)) as url:
        answer = ask(url, seed=0)
    assert answer.headers["x-cappy-outcome"] == "escalation-failed"
    assert answer.json()["choices"][0]["message"]["content"] == " HELLO 0/1 "


def test_the_limit_on_tokens_ends_sampling_and_is_reported() -> None:
    model = Model()
    limited: dict[str, Any] = {
        "policy": sampled(candidates=8, min_gain=0),
        "limits": SpendingLimits(max_tokens=27),
    }
    with serving(model) as upstream, listening(gateway(upstream, **limited)) as url:
        answer = ask(url, max_tokens=6)
    assert (answer.headers["x-cappy-limit"], answer.headers["x-cappy-stop"]) == ("tokens", "limit")
    assert answer.json()["usage"]["completion_tokens"] == 25
    assert [asked["max_tokens"] for asked in model.asked] == [6, 6]


def test_a_response_that_the_limit_cuts_says_so() -> None:
    model = Model()
    with serving(model) as upstream, listening(gateway(upstream, limits=SpendingLimits(max_tokens=20))) as url:
        answer = ask(url, "long")
    assert answer.headers["x-cappy-limit"] == "tokens"
    assert [asked["max_tokens"] for asked in model.asked] == [20]


def test_the_limit_on_time_gives_the_best_of_what_is_there_and_else_an_error() -> None:
    model = Model(refused=("n",), latency=0.3)
    limited: dict[str, Any] = {
        "policy": sampled(candidates=100, round_size=1, min_gain=0),
        "limits": SpendingLimits(max_seconds=1.5),
    }
    with serving(model) as upstream, listening(gateway(upstream, **limited)) as url:
        answer = ask(url)
        model.latency = 3.0
        none = ask(url)
    assert (answer.status_code, answer.headers["x-cappy-limit"]) == (200, "seconds")
    assert 1 <= int(answer.headers["x-cappy-sampled"]) <= 5
    assert answer.headers["x-cappy-unmetered-calls"] == "1"
    assert none.status_code == 504
    assert "--max-seconds" in none.json()["error"]["message"]


def test_limits_on_money_hold_for_a_request_and_for_all() -> None:
    made: dict[str, Any] = {"policy": sampled(candidates=8, round_size=1, min_gain=0)}
    with serving(Model()) as upstream:
        made["limits"] = SpendingLimits(max_cost=0.02)
        with listening(gateway(upstream, **made)) as url:
            answer = ask(url, max_tokens=5)
        assert answer.headers["x-cappy-limit"] == "money"
        assert float(answer.headers["x-cappy-cost"]) <= 0.02
        made["limits"] = SpendingLimits(max_total_cost=0.02)
        with listening(gateway(upstream, **made)) as url:
            first, second = ask(url, max_tokens=5), ask(url, max_tokens=5)
    assert first.headers["x-cappy-limit"] == "total-money"
    assert float(first.headers["x-cappy-cost"]) <= 0.02
    assert second.status_code == 429
    assert second.json()["error"]["code"] == "insufficient_quota"
    assert second.headers["x-should-retry"] == "false"


def test_a_scorer_that_answers_no_number_is_an_error_and_no_guess() -> None:
    with serving(Model()) as upstream, listening(gateway(upstream, scoring=scoring(lambda _: float("nan")))) as url:
        answer = ask(url)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "scorer_error"


def test_health_and_metrics_are_reported() -> None:
    with serving(Model()) as upstream, listening(gateway(upstream, policy=sampled(min_gain=0))) as url:
        root = url.removesuffix("/v1")
        ask(url)
        assert ask(url, n=0).status_code == 400
        json_type = {"content-type": "application/json"}
        assert httpx.post(f"{url}/chat/completions", content=b"{", headers=json_type).status_code == 400
        assert httpx.get(f"{root}/health").json() == {"status": "ok"}
        text = httpx.get(f"{root}/metrics").text
    for line in (
        'cappy_gateway_requests_total{outcome="answered"} 1.0',
        'cappy_gateway_requests_total{outcome="400"} 2.0',
        "cappy_gateway_samples_total 8.0",
        'cappy_gateway_stops_total{reason="candidates"} 1.0',
        'cappy_gateway_tokens_total{kind="completion"} 40.0',
        "cappy_gateway_seconds_count 1.0",
    ):
        assert line in text


def test_models_pass_through_and_readiness_says_whether_the_server_answers() -> None:
    status, keys = 200, []

    class Models(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            keys.append(self.headers["Authorization"])
            known = b'{"object": "list", "data": [{"id": "m-1", "object": "model", "created": 0, "owned_by": "us"}]}'
            self.send_response(status)
            self.end_headers()
            self.wfile.write(known if status == 200 else b"client-key is wrong")

    with handled_by(Models) as upstream, listening(gateway(f"{upstream}/v1")) as url:
        ready = f"{url.removesuffix('/v1')}/ready"
        with openai.OpenAI(base_url=url, api_key="client-key", max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["m-1"]
            assert httpx.get(ready).json() == {"ready": True, "reason": ""}
            status = 401
            with pytest.raises(openai.AuthenticationError, match=r"LLM .*401: \*\*\* is wrong"):
                client.models.list()
            assert httpx.get(ready).status_code == 200
            status = 503
            assert httpx.get(ready).status_code == 503
    assert set(keys) == {"Bearer client-key", None}
    with listening(gateway("http://127.0.0.1:9/v1")) as url:
        unready = httpx.get(f"{url.removesuffix('/v1')}/ready")
    assert unready.status_code == 503
    assert_names(unready.json()["reason"], "the LLM", "reached")


def test_what_the_best_is_worth_depends_on_how_many_distinct_candidates_were_scored() -> None:
    """A floor in units of the label is kept by the best of many too, whose score is luck more than that of one."""
    calibration = straight({1: 1.0, 2: 0.5, 4: 0.25})
    result = {}
    for candidates in (1, 2, 4):
        policy = sampled(candidates=candidates, round_size=1, min_gain=0, floor=0.15)
        with (
            serving(Model()) as upstream,
            listening(gateway(upstream, policy=policy, scoring=scoring(lambda _: 0.5, calibration))) as url,
        ):
            cappy = ask(url, seed=0).json()["cappy"]
        result[candidates] = (cappy["outcome"], cappy["score"])
        assert [one["calibrated_score"] for one in cappy["candidates"]] == [cappy["score"]] * candidates
    assert result == {
        1: ("answered", pytest.approx(0.5)),
        2: ("answered", pytest.approx(0.25)),
        4: ("abstained", pytest.approx(0.125)),
    }


def test_a_text_that_the_llm_repeats_is_one_candidate() -> None:
    candidates = [
        SampledCandidate(choice={}, text=text, status="ok", model="m", generator="g", score=0.5, logit=0.0)
        for text in ("a", "a", "a")
    ]
    assert [
        candidate.value for candidate in with_values(candidates, scoring(calibration=straight({1: 1.0, 4: 0.25})))
    ] == [0.5] * 3


def greedy_gateway(upstream: str, evaluated: Evaluated | None = None, **policy: Any) -> Any:
    """A gateway that decodes one candidate greedily."""
    behind = scoring() if evaluated is None else replace(scoring(), evaluated=lambda: evaluated)
    return gateway(upstream, policy=Policy(min_gain=0, **policy), scoring=behind)


def test_one_of_several_candidates_is_greedy_and_the_client_sees_which() -> None:
    model = Model()
    with serving(model) as upstream, listening(greedy_gateway(upstream, candidates=4)) as url:
        body = ask(url, seed=3, temperature=0.7).json()
    asked = sorted((one["temperature"], one.get("n"), one["seed"]) for one in model.asked)
    assert asked == [(0, None, 3), (0.7, 3, 4)]
    assert [one["greedy"] for one in body["cappy"]["candidates"]].count(True) == 1
    assert len(body["cappy"]["candidates"]) == 4


@pytest.mark.parametrize(("candidates", "sent"), [(1, {}), (4, {"temperature": 0})])
def test_nothing_is_decoded_greedily_for_one_candidate_or_where_the_client_already_does(
    candidates: int, sent: dict[str, Any]
) -> None:
    model = Model()
    with serving(model) as upstream, listening(greedy_gateway(upstream, candidates=candidates)) as url:
        body = ask(url, **sent).json()
    assert [one.get("temperature") for one in model.asked] == [sent.get("temperature")]
    assert not any(one["greedy"] for one in body["cappy"]["candidates"])


def refusing_model(name: str, value: float) -> Script:
    """A model that refuses one value of a parameter."""

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        if body.get(name) == value:
            return 400, refusing(f"Unsupported value: '{name}' does not support {value}.", param=name)
        return 200, saying("x 3/1")

    return Script(reply)


def test_a_model_that_refuses_temperature_0_gives_a_sample_and_is_not_asked_again() -> None:
    script = refusing_model("temperature", 0)
    with scripted(script) as upstream, listening(greedy_gateway(f"{upstream}/v1", candidates=2)) as url:
        for _ in range(2):
            body = ask(url).json()
            assert not any(one["greedy"] for one in body["cappy"]["candidates"])
            assert body["cappy"]["failed_calls"] == 0
    assert [one.get("temperature") for one in script.bodies].count(0) == 1


def selector(**weights: float) -> Evaluated:
    """A fitted selector with these weights of score, MBR and the greedy response."""
    rule = Rule(
        features=("score", "mbr", "greedy"),
        weights=tuple(weights.get(name, 0.0) for name in ("score", "mbr", "greedy")),
        scales=(0.1, 0.1, 1.0),
        label_slope=0.1,
    )
    return Evaluated(Selector(rules=(rule,)), None)


def test_the_greedy_response_is_picked_where_the_selector_says_so_whatever_the_scores() -> None:
    with serving(Model()) as upstream:
        for weights, picked in (({"greedy": 1.0}, True), ({"score": 1.0}, False)):
            with listening(greedy_gateway(upstream, selector(**weights), candidates=4)) as url:
                best = ask(url, seed=3).json()["cappy"]["candidates"][0]
            assert best["greedy"] is picked, weights


def test_sampling_stops_where_another_sample_is_expected_to_be_no_better_than_the_greedy_response() -> None:
    """All scores are about equal, and the selector knows that the greedy response is worth far more."""
    for weight, sampled_count in ((9.0, 4), (0.0, 12)):
        behind = replace(scoring(lambda text: by_number(text) / 1000), evaluated=lambda: fitted)  # noqa: B023
        fitted = selector(score=0.01 if weight else 1e5, greedy=weight)
        policy = Policy(candidates=12, round_size=4, min_gain=0.01)
        with (
            serving(Model()) as upstream,
            listening(gateway(upstream, policy=policy, scoring=behind)) as url,
        ):
            cappy = ask(url, seed=0).json()["cappy"]
        assert cappy["sampled"] == sampled_count, weight


def test_likelihoods_are_asked_for_where_the_selector_uses_them_and_not_passed_on() -> None:
    rule = Rule(features=("score", "mbr", "likelihood"), weights=(0.0, 0.0, 1.0), scales=(1.0, 1.0, 1.0))

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        values = (-3.0, -0.5, -2.0) if body.get("logprobs") else (None,) * 3
        choices = [
            {
                **saying(f"x {index}/0")["choices"][0],
                "index": index,
                "logprobs": None if value is None else {"content": [{"token": "x", "logprob": value}]},
            }
            for index, value in enumerate(values)
        ]
        return 200, {**saying(""), "choices": choices}

    fitted = Evaluated(Selector(rules=(rule,)), None)
    behind = replace(scoring(), evaluated=lambda: fitted)
    cases: list[tuple[dict[str, Any], bool]] = [({}, False), ({"logprobs": True}, True)]
    for sent, passed_on in cases:
        script = Script(reply)
        policy = sampled(candidates=3, round_size=3, min_gain=0)
        with (
            scripted(script) as upstream,
            listening(gateway(f"{upstream}/v1", policy=policy, scoring=behind)) as url,
        ):
            choice = ask(url, **sent).json()["choices"][0]
        assert script.bodies[0]["logprobs"] is True
        assert choice["message"]["content"] == "x 1/0"
        assert bool(choice["logprobs"]) is passed_on


def test_the_second_llm_is_a_pool_of_its_own_whose_better_answer_wins() -> None:
    """By the selector the greedy response is best, which says nothing of the other LLM's answer."""
    weak = Script(lambda body: (200, saying(f"x {int(body.get('temperature') == 0)}/1")))
    strong = Script(lambda body: (200, saying("strong 9/5")))
    fitted = selector(greedy=1.0)
    behind = replace(scoring(), evaluated=lambda: fitted)
    with scripted(weak) as first, scripted(strong) as second:
        policy = Policy(candidates=2, min_gain=0, floor=0.5)
        escalating = gateway(
            f"{first}/v1",
            policy=policy,
            scoring=behind,
            second_upstream=Upstream(LLM(url=f"{second}/v1", prices=PRICES)),
        )
        with listening(escalating) as url:
            body = ask(url).json()
    assert body["cappy"]["outcome"] == "escalated"
    assert body["choices"][0]["message"]["content"] == "strong 9/5"


def test_fields_that_reshape_the_distribution_are_not_sent_with_temperature_0() -> None:
    """Some servers refuse them there ("top_p must be 1 when using greedy sampling")."""
    script = Script(lambda body: (200, saying("x 3/1")))
    with scripted(script) as upstream, listening(greedy_gateway(f"{upstream}/v1", candidates=2)) as url:
        assert ask(url, top_p=0.9, top_k=40, min_p=0.1, frequency_penalty=0.5).status_code == 200
    greedy, drawn = sorted(script.bodies, key=lambda body: "top_p" in body)
    assert (greedy["temperature"], greedy["frequency_penalty"]) == (0, 0.5)
    assert not {"top_p", "top_k", "min_p"} & {*greedy}
    assert {name: drawn[name] for name in ("top_p", "top_k", "min_p")} == {"top_p": 0.9, "top_k": 40, "min_p": 0.1}


def test_a_refused_greedy_call_gives_a_sample_and_is_tried_again_for_the_next_request() -> None:
    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        if body.get("temperature") == 0 and "presence_penalty" in body:
            return 400, refusing("presence_penalty must be 0 for greedy sampling", param="presence_penalty")
        return 200, saying("x 3/1")

    script = Script(reply)
    with scripted(script) as upstream, listening(greedy_gateway(f"{upstream}/v1", candidates=3)) as url:
        first, second = (ask(url, presence_penalty=1).json()["cappy"], ask(url).json()["cappy"])
    assert [len(answer["candidates"]) for answer in (first, second)] == [3, 3]
    assert [answer["failed_calls"] for answer in (first, second)] == [0, 0]
    assert [sum(one["greedy"] for one in answer["candidates"]) for answer in (first, second)] == [0, 1]


@pytest.mark.parametrize(("status", "field"), [(400, "logprobs"), (403, "logprobs"), (422, "max_tokens")])
def test_a_field_that_two_calls_send_at_once_and_the_model_refuses_costs_no_candidate(status: int, field: str) -> None:
    both = threading.Barrier(2)

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        if field in body:
            both.wait(10)  # The greedy call and the others are on their way before one of them is refused.
            text = f"'{field}' is not supported with this model"
            return status, refusing(text, param=field)
        choices = [saying(f"x {index}/1")["choices"][0] for index in range(body.get("n", 1))]
        return 200, {**saying("x 3/1"), "choices": choices}

    settings: dict[str, Any] = {"policy": Policy(min_gain=0, candidates=4), "limits": SpendingLimits(max_tokens=1000)}
    behind = replace(scoring(), evaluated=lambda: LIKELIHOODS)
    with (
        scripted(Script(reply)) as upstream,
        listening(gateway(f"{upstream}/v1", scoring=behind, **settings)) as url,
    ):
        answer = ask(url).json()["cappy"]
    assert (len(answer["candidates"]), answer["failed_calls"]) == (4, 0)


@pytest.mark.parametrize("status", [401, 402, 429, 500])
def test_an_error_of_the_key_or_the_moment_is_no_refusal_of_a_field(status: int) -> None:
    script = Script(lambda body: (status, refusing("logprobs: no", param="logprobs")))
    with (
        scripted(script) as upstream,
        listening(greedy_gateway(f"{upstream}/v1", evaluated=LIKELIHOODS, candidates=2)) as url,
    ):
        assert ask(url).status_code >= 400
    assert all("logprobs" in body for body in script.bodies)
