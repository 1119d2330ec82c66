"""Nothing lost and nothing paid twice: storms, kills, budgets and limits, over a server that counts."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from chat_server import Model, serving
from fault_proxy import BEFORE, FAULTS, Weather, proxying
from waiting import wait_until

from cappy.config import to_values
from cappy.errors import ConfigError, GeneratorError
from cappy.progress import FileProgress
from cappy.records import Instance, read, read_manifest, write
from cappy.sampling.endpoint import Endpoint
from cappy.sampling.endpoint.faults import retry_after
from cappy.sampling.endpoint.limits import REFRESH_SECONDS, Budget, Spending, StoppedError
from cappy.sampling.generators import EndpointConfig
from cappy.sampling.step import SamplingConfig, endpoint_config, run
from cappy.sampling.strategies import GREEDY, Decoding
from cappy.specs import parse_spec

SAMPLING = Decoding(name="sampling", num_samples=4)
PROMPTS = [f"prompt {i}" for i in range(60)]


def endpoint_at(url: str, **terms: object) -> Endpoint:
    return Endpoint(parse_spec(f"openai:m@{url}"), EndpointConfig(**{"first_wait": 0.01, **terms}))  # type: ignore[arg-type]


def instances(folder: Path, count: int, head: str = "say") -> Path:
    write(folder, [Instance(instance_id=str(i), instruction=f"{head} {i}", references=("x",)) for i in range(count)])
    return folder


def config_at(folder: Path, url: str, **values: object) -> SamplingConfig:
    given = {"source": folder / "in", "target": folder / "out", "work": folder / "work", "strategy": "endpoint8"}
    return SamplingConfig(**{**given, "generator": (f"openai:m@{url}",), **values})  # type: ignore[arg-type]


def test_a_storm_loses_no_instance(tmp_path: Path) -> None:
    model, weather = Model(), Weather(rate=0.3, seed=1, stall=2.0, later=0.02)
    with serving(model) as upstream, proxying(upstream, weather) as url:
        endpoint = endpoint_at(url, timeout=1.5, concurrency=16, folder=tmp_path)
        drawn = endpoint.sample(PROMPTS * 3, [GREEDY, SAMPLING], seed=0)
        endpoint.close()
    assert {len(group) for group in drawn} == {5}
    assert {c.status for group in drawn for c in group} == {"ok"}
    assert all(group[0].response.startswith(f"PROMPT {i % 60} ") for i, group in enumerate(drawn))
    # A busy machine may let answers come too late as well.
    assert endpoint.usage.errors >= sum(weather.blown.values()) > 20


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_tried_again(fault: str) -> None:
    weather = Weather(plan=[fault, fault], stall=1.5)
    with serving(Model()) as upstream, proxying(upstream, weather) as url:
        endpoint = endpoint_at(url, timeout=1.0)
        assert endpoint.sample(["one"], [GREEDY], seed=0)[0][0].response.startswith("ONE")
        endpoint.close()
    assert endpoint.usage.errors == 2
    assert len(weather.arrivals) == 3


def test_retry_after_is_waited_for_in_full() -> None:
    weather = Weather(plan=["429-later"], later=0.7)
    with serving(Model()) as upstream, proxying(upstream, weather) as url:
        endpoint = endpoint_at(url)
        endpoint.sample(["one"], [GREEDY], seed=0)
        endpoint.close()
    assert weather.arrivals[1] - weather.arrivals[0] >= 0.7


def test_an_endpoint_that_asks_to_wait_for_long_ends_the_run() -> None:
    weather = Weather(plan=["429-later"], later=700)
    with serving(Model()) as upstream, proxying(upstream, weather) as url:
        endpoint = endpoint_at(url)
        with pytest.raises(GeneratorError, match="700 s"):
            endpoint.sample(["one"], [GREEDY], seed=0)
        endpoint.close()
    assert len(weather.arrivals) == 1


def test_retry_after_is_read_in_all_its_forms() -> None:
    assert retry_after({"retry-after": "1.5"}) == 1.5
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after({"retry-after": "Mon, 01 Jan 2001 00:00:00 GMT"}) == 0.0
    assert all(retry_after({"retry-after": odd}) is None for odd in ("", "soon", "-1", "inf", "nan"))


def test_what_was_answered_before_an_end_is_kept(tmp_path: Path) -> None:
    model = Model(latency=0.02)
    with serving(model) as url:
        endpoint = endpoint_at(url, folder=tmp_path, concurrency=4)
        with pytest.raises(GeneratorError, match="401"):
            endpoint.sample([*PROMPTS[:30], "unauthorized"], [GREEDY], seed=0)
        answered = sum(model.answered.values())
        assert answered >= 26
        endpoint.sample(PROMPTS, [GREEDY], seed=0)
        endpoint.close()
    assert sum(model.answered.values()) == 60
    assert max(model.answered.values()) == 1


STEP = """
import sys
from pathlib import Path
from cappy.sampling.step import SamplingConfig, run
folder, url = Path(sys.argv[1]), sys.argv[2]
run(SamplingConfig(source=folder / "in", target=folder / "out", work=folder / "work", strategy="endpoint8",
                   generator=(f"openai:m@{url}",), part_rows=16, concurrency=4))
"""


def has_answered(model: Model, count: int) -> bool:
    return sum(model.answered.values()) >= count


@pytest.mark.parametrize(("kills", "quiet"), [((20, 150), True), ((90,), False)])
def test_after_kill_9_the_same_command_asks_nothing_twice(tmp_path: Path, kills: tuple[int, ...], quiet: bool) -> None:
    """Killed between answers: nothing. Killed amid answers: at most what was on its way."""
    instances(tmp_path / "in", 64)
    model, weather = Model(latency=0.01), Weather(rate=0.2, faults=BEFORE, later=0.01)
    command = [sys.executable, "-c", STEP, str(tmp_path)]
    with serving(model) as upstream, proxying(upstream, weather) as url:
        for wanted in kills:
            process = subprocess.Popen([*command, url])
            wait_until(partial(has_answered, model, wanted), f"{wanted} answers", pause=0.005, process=process)
            if quiet:
                # The server is down for a moment, so that nothing is on its way.
                weather.rate = 1.0
                time.sleep(0.5)
            assert process.poll() is None
            process.kill()
            process.wait()
            weather.rate = 0.2
        subprocess.run([*command, url], check=True)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.metrics["candidates"] == 64 * 8
    # Four requests under way, four answers being written down, of at most four samples each.
    twice = sum(model.answered.values()) - 64 * 8
    assert twice <= (0 if quiet else 8 * 4)
    assert manifest.metrics["requests"] >= 64 * 3
    assert manifest.metrics["output_tokens"] == 64 * 8 * 5


def test_processes_that_share_a_folder_share_its_answers(tmp_path: Path) -> None:
    model = Model()
    with serving(model) as url:
        first, second = endpoint_at(url, folder=tmp_path), endpoint_at(url, folder=tmp_path)
        assert first.sample(PROMPTS, [SAMPLING], seed=0) == second.sample(PROMPTS, [SAMPLING], seed=0)
        assert second.usage.requests == 0
        more = Decoding(name="sampling", num_samples=6)
        assert [g[:4] for g in second.sample(PROMPTS, [more], seed=0)] == first.sample(PROMPTS, [SAMPLING], seed=0)
        first.close()
        second.close()
    assert max(model.answered.values()) == 1
    assert sum(model.answered.values()) == 60 * 6


def test_an_answer_serves_its_own_question_alone(tmp_path: Path) -> None:
    plain = Decoding(name="d", top_p=0.9)
    knobs: list[dict[str, Any]] = [
        {"temperature": 0.7},
        {"do_sample": False},
        {"top_p": 0.8},
        {"max_new_tokens": 9},
        {"top_k": 4},
        {"min_p": 0.1},
        {"min_new_tokens": 2},
    ]
    with serving(Model()) as url:
        others: list[tuple[str, str, Decoding, int, dict[str, Any]]] = [
            ("m", "one", plain, 0, {}),
            ("m", "two", plain, 0, {}),
            ("m", "one", replace(plain, name="e"), 0, {}),
            ("m", "one", plain, 1, {}),
            ("n", "one", plain, 0, {}),
            ("m", "one", plain, 0, {"api": "completions"}),
            *(("m", "one", replace(plain, **changed), 0, {}) for changed in knobs),
        ]
        asked = [(f"{other[0]}@{url}", *other[1:]) for other in others] + [(f"m@{url}/other", "one", plain, 0, {})]
        for requests in (1, 0):
            for model, instruction, decoding, seed, terms in asked:
                extra = ("top_k", "min_p", "min_tokens")
                kept = EndpointConfig(folder=tmp_path, extra=extra, **terms)
                endpoint = Endpoint(parse_spec(f"openai:{model}"), kept)
                endpoint.sample([instruction], [decoding], seed=seed)
                endpoint.close()
                assert endpoint.usage.requests == requests, (model, instruction, decoding, seed, terms)


def test_a_torn_answer_is_asked_again(tmp_path: Path) -> None:
    with serving(Model()) as url:
        endpoint = endpoint_at(url, folder=tmp_path)
        before = endpoint.sample(["one"], [GREEDY], seed=0)
        (file,) = tmp_path.glob("*/*.json")
        file.write_text(file.read_text()[:20])
        assert endpoint.sample(["one"], [GREEDY], seed=0) == before
        endpoint.close()
    assert endpoint.usage.requests == 2


def test_neither_part_size_nor_more_instances_pay_again(tmp_path: Path) -> None:
    model = Model()
    instances(tmp_path / "in", 20)
    with serving(model) as url:
        run(config_at(tmp_path, url, part_rows=7))
        run(config_at(tmp_path, url, part_rows=20, target=tmp_path / "two", concurrency=3))
        instances(tmp_path / "more", 25)
        run(config_at(tmp_path, url, source=tmp_path / "more", target=tmp_path / "three"))
    assert list(read(tmp_path / "out")) == list(read(tmp_path / "two")) == list(read(tmp_path / "three"))[:20]
    assert sum(model.answered.values()) == 25 * 8


@pytest.mark.parametrize(
    ("budget", "raised"),
    [
        ({"max_total_requests": 25}, {"max_total_requests": 60}),
        ({"max_total_tokens": 900}, {"max_total_tokens": 100_000}),
        ({"max_total_cost": 0.0009}, {"max_total_cost": 1.0}),
    ],
)
def test_a_budget_stops_cleanly_and_a_raised_one_goes_on(
    tmp_path: Path, budget: dict[str, float], raised: dict[str, float]
) -> None:
    instances(tmp_path / "in", 20)
    model = Model()
    prices = {"price_input": 1.0, "price_output": 1.0, "part_rows": 5}
    (name, limit), *_ = budget.items()
    with serving(model) as url:
        remedy = f"--{name.replace('_', '-')}.*same command again"
        for _ in range(3):
            with pytest.raises(GeneratorError, match=remedy):
                run(config_at(tmp_path, url, **prices, **budget))
            paid, requests = sum(model.answered.values()), len(model.asked)
            assert 0 < paid < 160
            # A start may still ask what is small enough for what is left, and never more.
            spent = {"max_total_requests": requests, "max_total_tokens": 10 * requests + 5 * paid}
            assert (spent | {"max_total_cost": spent["max_total_tokens"] / 1e6})[name] <= limit
        manifest = run(config_at(tmp_path, url, **prices, **raised))
    assert sum(model.answered.values()) == 160
    assert max(model.answered.values()) == 1
    assert manifest.metrics["cost"] == pytest.approx((60 * 10 + 160 * 5) / 1e6)


def test_limits_per_minute_are_kept_from_the_first_request_on() -> None:
    model = Model()
    with serving(model) as url:
        for terms in ({"requests_per_minute": 600}, {"tokens_per_minute": 600 * 66}):
            started = time.monotonic()
            endpoint = endpoint_at(url, **terms)
            endpoint.sample([f"prompt {i}" for i in range(8)], [Decoding(name="g", max_new_tokens=63)], seed=len(terms))
            endpoint.close()
            # Tokens that were not taken are given back, so only requests are that slow.
            assert time.monotonic() - started >= (0.69 if "requests_per_minute" in terms else 0.05)
        assert len(model.asked) == 16


def test_tokens_that_were_not_taken_are_given_back() -> None:
    with serving(Model()) as url:
        endpoint = endpoint_at(url, tokens_per_minute=6000)
        started = time.monotonic()
        for seed in range(3):
            # Each may take a thousand tokens, ten seconds' worth, and takes fifteen.
            endpoint.sample(["one"], [Decoding(name="g", max_new_tokens=1000)], seed=seed)
        assert time.monotonic() - started < 10
        endpoint.close()


def test_what_the_model_said_is_kept_and_what_says_nothing_of_it_is_asked_again(tmp_path: Path) -> None:
    heads = ("plain", "long", "blank", "filtered", "refuse")
    with serving(Model()) as url:
        for _ in range(2):
            endpoint = endpoint_at(url, folder=tmp_path)
            endpoint.sample([f"{head} x" for head in heads], [GREEDY], seed=0)
            endpoint.close()
        assert endpoint.usage.requests == 0
    model = Model()
    with serving(model) as url:
        endpoint = endpoint_at(url, folder=tmp_path)
        for _ in range(2):
            endpoint.sample(["endless x"], [GREEDY], seed=0)
        endpoint.close()
    assert len(model.asked) == 2


def test_no_more_requests_are_under_way_than_allowed() -> None:
    model = Model(latency=0.02)
    with serving(model) as url:
        endpoint = endpoint_at(url, concurrency=5)
        endpoint.sample(PROMPTS, [GREEDY], seed=0)
        endpoint.close()
    assert model.most_at_once == 5


def test_the_manifest_counts_what_came_and_says_what_could_not_be_asked(tmp_path: Path) -> None:
    heads = ("long", "blank", "filtered", "refuse", "endless", "same", "plain")
    write(tmp_path / "in", [Instance(instance_id=h, instruction=f"{h} x", references=("y",)) for h in heads])
    with serving(Model(refused=("seed", "logprobs"))) as url:
        manifest = run(config_at(tmp_path, url, max_failed=0.2))
        again = run(config_at(tmp_path, url, max_failed=0.2, target=tmp_path / "two"))
        other = run(config_at(tmp_path, url, max_failed=0.2, target=tmp_path / "three", part_rows=2))
    counted = ("truncated", "empty", "filtered", "refused", "failed", "sampled", "duplicates", "distinct")
    assert [manifest.metrics[name] for name in counted] == [8, 8, 8, 8, 8, 56, 7 + 2 * 4, 1 + 2 * 4]
    assert manifest.facts["not_asked"] == {f"openai:m@{url}": ["logprobs", "seed"]}
    assert sum(manifest.facts["unanswered"][f"openai:m@{url}"].values()) == 8
    assert again.hash == manifest.hash
    assert {**other.metrics, "errors": 0} == {**manifest.metrics, "errors": 0}
    assert other.facts == manifest.facts


def test_a_strategy_that_an_endpoint_cannot_do_is_refused_before_anything_is_paid(tmp_path: Path) -> None:
    instances(tmp_path / "in", 3)
    model = Model()
    with serving(model) as url, pytest.raises(ConfigError, match="beam4"):
        run(config_at(tmp_path, url, strategy="paper17"))
    assert model.asked == []


def test_a_budget_of_money_needs_prices(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--max-total-cost: 2 .*--price-input"):
        config_at(tmp_path, "http://h/v1", max_total_cost=2.0)


def test_the_key_stands_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    canary = "sk-canary-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", canary)
    caplog.set_level(logging.DEBUG)
    instances(tmp_path / "in", 6)
    instances(tmp_path / "bad", 3, head="unauthorized")
    model, weather = Model(), Weather(rate=0.3, later=0.01, stall=0.01)
    with serving(model) as upstream, proxying(upstream, weather) as url:
        config = config_at(tmp_path, url)
        run(config, FileProgress(tmp_path / "progress.json"))
        # A refusal that is broken off ends the run as well, and may not have come to the key.
        weather.rate = 0.0
        with pytest.raises(GeneratorError) as caught:
            run(config_at(tmp_path, url, source=tmp_path / "bad", target=tmp_path / "never"))
    assert model.keys == {canary}
    error: BaseException | None = caught.value
    messages = []
    while error is not None:
        messages.append(f"{error!r} {error}")
        error = error.__cause__ or error.__context__
    assert "Incorrect API key provided: ***" in messages[0]
    assert canary not in " ".join(messages)
    assert canary not in caplog.text
    assert len(caplog.records) > 10
    assert canary not in repr(to_values(config))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 50
    assert not [path for path in files if canary.encode() in path.read_bytes()]
    assert not [line for batch in read(tmp_path / "out") for line in [repr(batch)] if canary in line]


def test_shards_and_part_sizes_share_a_budget_and_other_seeds_do_not(tmp_path: Path) -> None:
    one = endpoint_config(config_at(tmp_path, "http://h/v1"), "p").run
    assert (
        endpoint_config(config_at(tmp_path, "http://h/v1", shard="0/4", part_rows=3, max_total_requests=5), "p").run
        == one
    )
    assert endpoint_config(config_at(tmp_path, "http://h/v1", seed=1), "p").run != one
    assert endpoint_config(config_at(tmp_path, "http://h/v1"), "q").run != one


def test_ctrl_c_keeps_what_was_under_way(tmp_path: Path) -> None:
    model = Model(latency=0.05)
    with serving(model) as url:
        endpoint = endpoint_at(url, folder=tmp_path, concurrency=4)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            endpoint.sample(PROMPTS, [GREEDY], seed=0)
        answered = sum(model.answered.values())
        assert 0 < answered < 60
        assert len(list(tmp_path.glob("[0-9a-f][0-9a-f]/*.json"))) == answered
        endpoint.close()


ONE = Spending(requests=1, input_tokens=2, output_tokens=3)


def spend(budget: Budget, times: int = 1) -> None:
    for _ in range(times):
        with budget.reserve(ONE, threading.Event()) as spent:
            spent.add(ONE)


def test_what_another_process_spends_is_seen_while_this_one_runs(tmp_path: Path) -> None:
    terms = EndpointConfig(folder=tmp_path, run="r", max_total_requests=5)
    mine, other = Budget("mine", terms), Budget("other", terms)
    spend(mine)
    spend(other, 4)
    time.sleep(REFRESH_SECONDS + 0.1)
    with pytest.raises(GeneratorError, match=r"5 requests.*\(0 left.*--max-total-requests"):
        spend(mine)
    mine.close()
    other.close()


def test_an_earlier_start_counts_and_another_run_does_not(tmp_path: Path) -> None:
    first = Budget("m", EndpointConfig(folder=tmp_path, run="r"))
    spend(first, 3)
    first.close()
    spend(Budget("m", EndpointConfig(folder=tmp_path, run="other", max_total_tokens=5)))
    with pytest.raises(GeneratorError, match="19 tokens.*--max-total-tokens"):
        spend(Budget("m", EndpointConfig(folder=tmp_path, run="r", max_total_tokens=19)))
    spend(Budget("m", EndpointConfig(folder=tmp_path, run="r", max_total_tokens=20)))


def test_whoever_finds_the_budget_used_up_ends_the_run() -> None:
    budget, stop = Budget("m", EndpointConfig(max_total_requests=1)), threading.Event()
    spend(budget)
    with pytest.raises(GeneratorError, match="--max-total-requests"), budget.reserve(ONE, stop):
        pass
    assert stop.is_set()


def test_what_is_under_way_is_held_back_and_given_back_if_it_was_not_answered() -> None:
    budget, stop = Budget("m", EndpointConfig(max_total_requests=1)), threading.Event()
    passed = threading.Event()

    def other() -> None:
        with contextlib.suppress(StoppedError), budget.reserve(ONE, stop):
            passed.set()

    thread = threading.Thread(target=other, daemon=True)
    with budget.reserve(ONE, stop):
        thread.start()
        assert not passed.wait(0.3)
    thread.join(10)
    stop.set()
    assert passed.is_set()
