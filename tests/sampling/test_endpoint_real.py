"""The generator against `transformers serve`, which refuses what it does not know in its own words."""

from pathlib import Path

import pytest
from fault_proxy import FAULTS, Weather, proxying

from cappy.errors import GeneratorError
from cappy.sampling.endpoint import Endpoint
from cappy.sampling.generators import EndpointConfig
from cappy.sampling.strategies import GREEDY, Decoding
from cappy.specs import parse_spec

SAMPLING = Decoding(name="sampling", num_samples=3, max_new_tokens=8)


def test_a_server_of_others_answers_every_sample(transformers_server: str, causal_folder: Path, tmp_path: Path) -> None:
    spec = parse_spec(f"openai:{causal_folder}@{transformers_server}")
    endpoint = Endpoint(spec, EndpointConfig(folder=tmp_path / "answers"))
    prompts = ["the cat sat", "where is the dog"]
    drawn = endpoint.sample(prompts, [GREEDY, SAMPLING], seed=0)
    assert [[one.decoding for one in of_one] for of_one in drawn] == [["greedy", *["sampling"] * 3]] * 2
    assert {one.status for of_one in drawn for one in of_one} <= {"ok", "truncated", "empty"}
    # It takes no `n` and says nothing of it: the rest was asked for one by one.
    assert endpoint.usage.requests == 8
    assert 0 < endpoint.usage.output_tokens <= 2 * (64 + 3 * 8)
    again = Endpoint(spec, EndpointConfig(folder=tmp_path / "answers"))
    assert again.sample(prompts, [GREEDY, SAMPLING], seed=0) == drawn
    assert again.usage.requests == 0
    assert again.usage.cached == 8
    endpoint.close()
    again.close()


def test_completions_of_a_server_of_others_are_read(transformers_server: str, causal_folder: Path) -> None:
    endpoint = Endpoint(parse_spec(f"openai:{causal_folder}@{transformers_server}"), EndpointConfig(api="completions"))
    drawn = endpoint.sample(["the cat sat"], [SAMPLING], seed=0)[0]
    assert len(drawn) == 3
    assert {one.status for one in drawn} <= {"ok", "truncated", "empty"}
    endpoint.close()


def test_a_model_that_the_server_does_not_have_ends_the_run(transformers_server: str, tmp_path: Path) -> None:
    endpoint = Endpoint(parse_spec(f"openai:{tmp_path}/none@{transformers_server}"), EndpointConfig(max_retries=0))
    with pytest.raises(GeneratorError, match="same command again"):
        endpoint.sample(["the cat sat"], [SAMPLING], seed=0)
    endpoint.close()


def test_every_fault_in_front_of_a_server_of_others_is_outlasted(
    transformers_server: str, causal_folder: Path, tmp_path: Path
) -> None:
    weather = Weather(plan=list(FAULTS), stall=6.0, later=0.1)
    with proxying(transformers_server, weather) as url:
        endpoint = Endpoint(
            parse_spec(f"openai:{causal_folder}@{url}"),
            EndpointConfig(folder=tmp_path, timeout=4.0, concurrency=3, max_retries=len(FAULTS), first_wait=0.05),
        )
        drawn = endpoint.sample(["the cat sat", "where is the dog", "who"], [SAMPLING], seed=0)
        endpoint.close()
    assert [len(of_one) for of_one in drawn] == [3, 3, 3]
    assert {one.status for of_one in drawn for one in of_one} <= {"ok", "truncated", "empty"}
    assert set(weather.blown) == set(FAULTS)
    assert endpoint.usage.errors >= len(FAULTS)
