"""An OpenAI-compatible endpoint, here a real HTTP server on this machine: what is asked, read, learned and refused."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import Model, serving
from wording import raises_naming

from cappy.errors import ConfigError, GeneratorError
from cappy.sampling.endpoint import Endpoint
from cappy.sampling.generators import EndpointConfig
from cappy.sampling.strategies import BEAM4, GREEDY, Decoding
from cappy.specs import parse_spec

SAMPLING = Decoding(name="sampling", num_samples=4)
NUCLEUS = Decoding(name="topp0.5", num_samples=2, top_p=0.5)
TOP_K = Decoding(name="topk40", top_k=40)
Make = Callable[..., Endpoint]


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def url(model: Model) -> Iterator[str]:
    with serving(model) as address:
        yield address


@pytest.fixture
def make(url: str) -> Iterator[Make]:
    """make(max_retries=...) -> an endpoint on these terms."""
    made: list[Endpoint] = []

    def endpoint(**terms: Any) -> Endpoint:
        config = EndpointConfig(**{"first_wait": 0.01, "max_retries": 3, **terms})
        made.append(Endpoint(parse_spec(f"openai:m@{url}"), config))
        return made[-1]

    yield endpoint
    for one in made:
        one.close()


def test_candidates_come_back_in_order_with_likelihood_and_model(make: Make) -> None:
    drawn = make().sample(["one", "two"], [GREEDY, SAMPLING], seed=5)
    assert [[c.decoding for c in group] for group in drawn] == [["greedy", *["sampling"] * 4]] * 2
    assert [[c.response.split()[0] for c in group] for group in drawn] == [["ONE"] * 5, ["TWO"] * 5]
    assert {(c.logprob_sum, c.logprob_mean, c.num_tokens, c.revision) for g in drawn for c in g} == {
        (-1.0, -0.5, 2, "m-2026")
    }


def test_every_knob_is_stated_and_samples_are_asked_for_together(make: Make, model: Model) -> None:
    make().sample(["one"], [GREEDY, SAMPLING, NUCLEUS], seed=5)
    asked = sorted((b["temperature"], b["top_p"], b.get("n"), b["max_tokens"]) for b in model.asked)
    assert asked == [(0.0, 1.0, None, 64), (1.0, 0.5, 2, 64), (1.0, 1.0, 4, 64)]
    assert len({b["seed"] for b in model.asked}) == 3


def test_completions_send_the_instruction_as_it_is(make: Make, model: Model) -> None:
    drawn = make(api="completions").sample(["one"], [GREEDY], seed=0)[0][0]
    assert (model.asked[0]["prompt"], model.paths) == ("one", ["/v1/completions"])
    assert (drawn.response.split()[0], drawn.logprob_sum) == ("ONE", -1.0)


def test_a_sample_depends_on_its_instruction_alone(make: Make) -> None:
    together = make().sample(["one", "two", "three"], [SAMPLING], seed=1)
    assert make().sample(["two"], [SAMPLING], seed=1)[0] == together[1]
    assert make().sample(["two"], [SAMPLING], seed=2)[0] != together[1]


@pytest.mark.parametrize("name", ["n", "temperature", "top_p", "seed", "logprobs", "max_tokens"])
def test_a_refused_parameter_is_asked_for_once_and_reported(make: Make, model: Model, name: str) -> None:
    model.refused = (name,)
    endpoint = make(concurrency=1)
    drawn = endpoint.sample(["one", "two", "three"], [SAMPLING], seed=0)
    assert [len(group) for group in drawn] == [4, 4, 4]
    assert {c.status for g in drawn for c in g} == {"ok"}
    assert sum(name in body for body in model.asked) == 1
    actual = {key.rpartition("/")[2] for key in endpoint.take_counts() if key.startswith("not_asked/")}
    # The limit on length has another name to go by.
    assert actual == ({name} - {"max_tokens"})
    assert all((name == "max_tokens") == ("max_completion_tokens" in body) for body in model.asked[1:])
    assert all((c.seed is None) == (name == "seed") for g in drawn for c in g)
    assert all((c.logprob_sum is None) == (name == "logprobs") for g in drawn for c in g)


def test_all_refusals_together_are_learned_under_concurrency(make: Make, model: Model) -> None:
    model.refused = ("n", "temperature", "top_p", "seed", "logprobs", "max_tokens", "max_completion_tokens")
    drawn = make(max_retries=0).sample([f"p{i}" for i in range(20)], [SAMPLING], seed=0)
    assert sum(len(group) for group in drawn) == 80
    assert sum(model.answered.values()) == 80


@pytest.mark.parametrize("way", ["ignores_n", "copies_n"])
def test_a_server_that_ignores_n_is_asked_for_the_rest_one_by_one(make: Make, model: Model, way: str) -> None:
    setattr(model, way, True)
    drawn = make().sample(["one"], [SAMPLING], seed=0)[0]
    assert len({c.response for c in drawn}) == 4
    assert len({c.seed for c in drawn}) == 4
    assert [body.get("n") for body in model.asked] == [4, None, None, None]


def test_equal_responses_are_kept_where_n_is_known(make: Make, model: Model) -> None:
    drawn = make().sample(["same"], [SAMPLING], seed=0)[0]
    assert [c.response for c in drawn] == ["the same"] * 4
    assert len(model.asked) == 1


@pytest.mark.parametrize(
    ("head", "status", "response", "selectable"),
    [
        ("long", "truncated", "LONG", True),
        ("blank", "empty", "", False),
        ("cut", "empty", "", False),
        ("filtered", "filtered", "", False),
        ("refuse", "refused", "I", False),
        ("endless", "failed", "", False),
        ("wicked", "filtered", "", False),
    ],
)
def test_what_is_no_plain_answer_is_a_candidate_with_its_status(
    make: Make, head: str, status: str, response: str, selectable: bool
) -> None:
    drawn = make(max_retries=0).sample([f"{head} story", "plain"], [NUCLEUS], seed=0)
    assert {c.status for c in drawn[0]} == {status}
    assert {c.response.partition(" ")[0] for c in drawn[0]} == {response}
    assert {c.selectable for c in drawn[0]} == {selectable}
    assert {c.status for c in drawn[1]} == {"ok"}


@pytest.mark.parametrize(
    ("head", "named"),
    [
        ("unauthorized", ("401", "OPENAI_API_KEY", "OPENAI_API_KEY_FILE")),
        ("forbidden", ("403", "OPENAI_API_KEY")),
        ("absent", ("404", "model 'm' does not exist", "name", "address")),
        ("broke", ("exceeded your current quota", "account")),
    ],
)
def test_what_does_not_pass_ends_the_run_at_once_in_one_line(
    make: Make, model: Model, head: str, named: tuple[str, ...]
) -> None:
    with raises_naming(GeneratorError, *named) as error:
        make(concurrency=1).sample([f"{head} {i}" for i in range(50)], [GREEDY], seed=0)
    assert "\n" not in str(error.value)
    assert len(model.asked) == 1


def test_an_unknown_host_is_tried_again_and_then_one_line() -> None:
    endpoint = Endpoint(
        parse_spec("openai:m@http://no-such-host.invalid/v1"), EndpointConfig(max_retries=2, first_wait=0.01)
    )
    with pytest.raises(GeneratorError, match=r"\(.+\).* 3 attempts.*address") as error:
        endpoint.sample(["one"], [GREEDY], seed=0)
    assert "\n" not in str(error.value)
    assert endpoint.usage.errors == 3
    endpoint.close()


def test_a_decoding_that_no_endpoint_can_do_is_refused_before_the_first_request(make: Make, model: Model) -> None:
    with pytest.raises(ConfigError, match="beam4.*--strategy endpoint8"):
        make().sample(["one"], [GREEDY, BEAM4], seed=0)
    with pytest.raises(ConfigError, match="topk40.*--extra top_k"):
        make().sample(["one"], [GREEDY, TOP_K], seed=0)
    assert model.asked == []


def test_top_k_is_sent_where_the_server_takes_it_and_switched_off_elsewhere(make: Make, model: Model) -> None:
    make(extra=("top_k",), concurrency=1).sample(["one"], [TOP_K, GREEDY], seed=0)
    assert [body["top_k"] for body in model.asked] == [40, -1]


def test_the_key_comes_from_the_environment_or_a_file(
    make: Make, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text("from-file\n")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY_FILE", str(tmp_path / "key"))
    make().sample(["one"], [GREEDY], seed=0)
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    make().sample(["one"], [GREEDY], seed=0)
    assert model.keys == {"from-file", "from-environment"}
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("OPENAI_API_KEY_FILE", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="OPENAI_API_KEY_FILE: .*read"):
        make()


def test_a_secret_in_the_address_and_a_broken_key_are_refused_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("https://me:canary@host/v1", "https://host/v1?api_key=canary"):
        with pytest.raises(ConfigError, match="OPENAI_API_KEY") as error:
            Endpoint(parse_spec(f"openai:m@{address}"))
        assert "canary" not in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", "canary\nkey")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY: .*white space") as error:
        Endpoint(parse_spec("openai:m@https://host/v1"))
    assert "canary" not in str(error.value)
