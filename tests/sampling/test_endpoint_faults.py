"""Lines D1 to D9 and C10 of the field faults: what real servers answer, and what sampling makes of it."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from scripted_server import Reply, Script, prompt_of, refusing, saying, scripted
from wording import assert_names, raises_naming

from cappy.errors import ConfigError, GeneratorError
from cappy.records import Candidate, Instance, Manifest, read, write
from cappy.sampling.endpoint import Endpoint
from cappy.sampling.endpoint.address import base_address, join_path, key_headers
from cappy.sampling.endpoint.answers import answer_key
from cappy.sampling.endpoint.faults import PROBE, REFUSALS_PER_PROBE
from cappy.sampling.generators import EndpointConfig
from cappy.sampling.statistics import cautions
from cappy.sampling.step import SamplingConfig, run
from cappy.sampling.strategies import GREEDY, Decoding
from cappy.specs import parse_spec

PLAIN = Decoding(name="plain")
FOUR = Decoding(name="four", num_samples=4)
TOO_LARGE = (
    "'max_tokens' or 'max_completion_tokens' is too large: 4096. This model's maximum context length is 2048 tokens "
    "and your request has 12 input tokens"
)


def sample(
    script: Script, prompts: Sequence[str], decodings: Sequence[Decoding] = (PLAIN,), **terms: Any
) -> tuple[list[list[Candidate]], dict[str, int]]:
    """The candidates of an endpoint with this script, and its take_counts."""
    with scripted(script) as url:
        made = EndpointConfig(**{"first_wait": 0.001, "max_retries": 2, **terms})
        endpoint = Endpoint(parse_spec(f"openai:m@{url}/v1"), made)
        try:
            return endpoint.sample(prompts, decodings, seed=0), dict(endpoint.take_counts())
        finally:
            endpoint.close()


def step(
    script: Script, folder: Path, prompts: Sequence[str], target: str = "out", **values: Any
) -> tuple[Manifest, list[Candidate]]:
    """The step's manifest and candidates over these prompts."""
    folder.mkdir(exist_ok=True)
    if not (folder / "in").exists():
        write(folder / "in", [Instance(instance_id=p, instruction=p, references=("x",)) for p in prompts])
    with scripted(script) as url:
        # The address must not change between the runs of a test, or all work would be new.
        (folder / "url").write_text(url) if not (folder / "url").exists() else None
        config = {"source": folder / "in", "target": folder / target, "work": folder / "work", "max_retries": 1}
        spec = values.pop("generator", (f"openai:m@{url}/v1",))
        manifest = run(SamplingConfig(**{**config, "generator": spec, "strategy": "sampling1", **values}))
    return manifest, [candidate for one in read(folder / target) for candidate in one.candidates]


HALF: dict[str, Callable[[], dict[str, Any]]] = {
    "error": lambda: saying("It is Par", "error"),
    "ERROR": lambda: saying("It is Par", "ERROR"),
    "abort": lambda: saying("It is Par", "abort"),
    "sglang's object": lambda: saying("It is Par", {"type": "abort", "message": "out of memory"}),
    "a word of tomorrow": lambda: saying("It is Par", "lost_interest"),
    "deepseek": lambda: saying("It is Par", "insufficient_system_resource"),
    "an error in the choice": lambda: saying("It is Par", None, error={"code": 502, "message": "upstream broke"}),
    "an error in the body": lambda: {**saying("It is Par", None), "error": {"message": "upstream broke"}},
    "an error alone": lambda: refusing("upstream broke", code=503),
}


@pytest.mark.parametrize("name", HALF)
def test_d1_a_response_that_its_server_gave_up_is_a_failed_attempt_and_asked_again(name: str, tmp_path: Path) -> None:
    answers = iter([HALF[name](), HALF[name](), saying("It is Paris.")])
    script = Script(lambda body: (200, next(answers)))
    ((candidate,),), take_counts = sample(script, ["capital?"], folder=tmp_path)
    assert (candidate.response, candidate.status) == ("It is Paris.", "ok")
    assert (len(script.bodies), take_counts["errors"]) == (3, 2)
    kept = [file.read_text() for file in tmp_path.glob("[0-9a-f][0-9a-f]/*.json")]
    assert len(kept) == 1
    assert 'It is Par"' not in kept[0]


def test_d1_of_several_choices_the_good_ones_are_kept_and_the_others_asked_for_again() -> None:
    def reply(body: dict[str, Any]) -> Reply:
        choices = [
            {"index": n, "message": {"content": f"text {n}"}, "finish_reason": "error" if n == 1 else "stop"}
            for n in range(body.get("n", 1))
        ]
        return 200, {**saying(""), "choices": choices}

    script = Script(reply)
    ((*candidates,),), _ = sample(script, ["capital?"], [FOUR])
    assert Counter(one.response for one in candidates) == {"text 0": 2, "text 2": 1, "text 3": 1}
    assert [body.get("n", 1) for body in script.bodies] == [4, 1]


def test_d1_a_word_for_a_whole_response_or_none_at_all_is_an_answer() -> None:
    for finish, status in (
        *[
            (word, "ok")
            for word in ("stop", "STOP", "eos_token", "end_turn", "stop_sequence", None, "", {"type": "stop"})
        ],
        *[(word, "truncated") for word in ("length", "max_tokens", "MAX_TOKENS", "model_length")],
        *[(word, "filtered") for word in ("content_filter", "SAFETY", "guardrail_intervened", "content_filtered")],
        *[(word, "ok") for word in ("endoftext", "stop-sequence", "null", "None")],
        ("refusal", "refused"),
    ):
        ((candidate,),), _ = sample(Script(lambda body, finish=finish: (200, saying("text", finish))), ["hello"])  # type: ignore[misc]
        assert candidate.status == status, finish


def test_d1_an_instruction_whose_answer_always_breaks_off_fails_alone() -> None:
    """While others are answered it is about this one; alone it ends the run with the server's word."""

    def reply(body: dict[str, Any]) -> Reply:
        return 200, saying("half", "error") if "broken" in prompt_of(body) else saying("whole")

    drawn, take_counts = sample(Script(reply), ["broken", *(f"p{n}" for n in range(30))], concurrency=2, max_retries=1)
    assert [group[0].status for group in drawn] == ["failed", *["ok"] * 30]
    assert [name for name in take_counts if "finish_reason: 'error'" in name]
    # Also where it is the last one, and nothing but a plain question is answered beside it.
    ((alone,),), _ = sample(Script(reply), ["broken"], max_retries=1)
    assert alone.status == "failed"
    with pytest.raises(GeneratorError, match="finish_reason.*'error'.* 2 attempts"):
        sample(Script(lambda body: (200, saying("half", "error"))), ["one"], max_retries=1)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ((200, saying("half", "error")), ("finish_reason", "'error'", "server's log")),
        ((200, saying("half", None, error={"message": "out of memory"})), ("out of memory", "server's log")),
        ((200, refusing("upstream broke", code=503)), ("503 upstream broke", "server's log")),
        ((500, refusing("CUDA error")), ("500 CUDA error", "server's log")),
        ((429, refusing("slow down")), ("429 slow down", "--concurrency")),
        ((200, b"<html>"), ("JSON", "address", "OpenAI-compatible")),
        ((200, b'{"a": "\xe9"}'), ("UTF-8", "charset")),
    ],
)
def test_d1_the_remedy_is_of_what_the_server_said_and_not_of_the_network(reply: Reply, words: tuple[str, ...]) -> None:
    with raises_naming(GeneratorError, "2 attempts", *words) as caught:
        sample(Script(lambda body: reply), ["one"], max_retries=1)
    assert "network" not in str(caught.value)


def test_d1_one_candidate_is_one() -> None:
    lines = {n: cautions({}, {}, {"unanswered": {"m": {"400 odd": n}}}) for n in (1, 2)}
    ((one,), (two,)) = lines.values()
    assert_names(one, "m", "1 candidate ", "400 odd")
    assert_names(two, "m", "2 candidates ", "400 odd")


def test_d1_an_error_under_status_200_is_judged_by_the_code_that_it_states() -> None:
    answers = iter([refusing("slow down", code=429), saying("whole")])
    ((candidate,),), _ = sample(Script(lambda body: (200, next(answers), {"Retry-After": "0"})), ["hello"])
    assert candidate.response == "whole"
    with pytest.raises(GeneratorError, match="402 no credits left.*account"):
        sample(Script(lambda body: (200, refusing("no credits left", code=402))), ["hello"])
    with pytest.raises(GeneratorError, match="900 s"):
        sample(Script(lambda body: (200, refusing("slow down", code="429"), {"Retry-After": "900"})), ["hello"])


def test_d1_answers_that_an_older_version_kept_are_not_used() -> None:
    from cappy.config import fingerprint

    assert answer_key(url="u") != fingerprint("answer", {"url": "u"})


def test_d1_tokens_of_a_response_that_was_given_up_count_towards_the_budget(tmp_path: Path) -> None:
    script = Script(lambda body: (200, saying("half", "error")))
    with pytest.raises(GeneratorError, match="3 requests.*--max-total-requests"):
        sample(script, ["one"], folder=tmp_path, max_total_requests=3, max_retries=9)
    assert len(script.bodies) == 3


def test_d2_a_run_whose_requests_all_fail_ends_with_the_servers_words_and_the_next_asks_again(tmp_path: Path) -> None:
    prompts = [f"prompt {n}" for n in range(6)]
    script = Script(lambda body: (400, refusing(TOO_LARGE, param="max_tokens", code="BadRequestError")))
    with raises_naming(GeneratorError, "6 of 6", "--max-failed 0.1", "400", "is too large: 4096") as error:
        step(script, tmp_path, prompts)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert len(script.bodies) == 6


def test_d2_failures_below_the_limit_are_kept_with_their_words_and_asked_again_by_the_same_command(
    tmp_path: Path,
) -> None:
    refuse = True

    def reply(body: dict[str, Any]) -> Reply:
        return (400, refusing(TOO_LARGE)) if refuse and prompt_of(body) == "prompt 3" else (200, saying("whole"))

    prompts = [f"prompt {n}" for n in range(20)]
    script = Script(reply)
    write(tmp_path / "in", [Instance(instance_id=p, instruction=p, references=("x",)) for p in prompts])
    with scripted(script) as url:
        spec = f"openai:m@{url}/v1"
        config = SamplingConfig(
            source=tmp_path / "in", target=tmp_path / "out", work=tmp_path / "work", generator=(spec,),
            strategy="sampling1", part_rows=5,
        )  # fmt: skip
        manifest = run(config)
        assert manifest.metrics["failed"] == 1
        ((words, count),) = manifest.facts["unanswered"][spec].items()
        assert (count, "maximum context length is 2048" in words) == (1, True)
        said = cautions(manifest.metrics, manifest.config, manifest.facts)
        assert any("400 'max_tokens'" in line for line in said)
        assert any("cappy sampling" in line for line in said)
        asked = len(script.bodies)
        refuse = False
        again = run(config)
    # Only what failed is asked for, the rest of its part comes from the answers that were kept.
    assert [prompt_of(body) for body in script.bodies[asked:]] == ["prompt 3"]
    assert again.metrics["failed"] == 0
    assert "unanswered" not in again.facts


def test_d2_a_run_ends_as_soon_as_its_share_of_failures_cannot_be_kept(tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        number = int(prompt_of(body).split()[1])
        return (400, refusing(TOO_LARGE)) if number % 2 else (200, saying("whole"))

    script = Script(reply)
    with pytest.raises(GeneratorError, match="11 of 100 .*--max-failed 0.1"):
        step(script, tmp_path, [f"prompt {n}" for n in range(100)], part_rows=2)
    assert len(script.bodies) == 22
    manifest, _ = step(Script(reply), tmp_path, [], max_failed=0.5, target="two")
    assert manifest.metrics["failed"] == 50


def test_d2_many_refusals_in_a_row_and_of_a_plain_question_end_the_run_early(tmp_path: Path) -> None:
    script = Script(lambda body: (400, refusing(TOO_LARGE)))
    with pytest.raises(GeneratorError, match=f"{REFUSALS_PER_PROBE} requests.*400 'max_tokens'"):
        sample(script, [f"prompt {n}" for n in range(500)], concurrency=4)
    assert REFUSALS_PER_PROBE < len(script.bodies) < 3 * REFUSALS_PER_PROBE
    assert PROBE in map(prompt_of, script.bodies)


def test_d2_many_refusals_in_a_row_do_not_end_a_run_whose_endpoint_answers_a_plain_question() -> None:
    def reply(body: dict[str, Any]) -> Reply:
        return (200, saying("yes")) if prompt_of(body) in (PROBE, "last") else (400, refusing("too wicked"))

    drawn, _ = sample(Script(reply), [*(f"prompt {n}" for n in range(50)), "last"], concurrency=1)
    assert [group[0].status for group in drawn] == [*["failed"] * 50, "ok"]


def test_d2_of_a_few_instances_one_may_fail_but_not_two_and_none_with_max_failed_0(tmp_path: Path) -> None:
    refused = {"prompt 1"}

    def reply(body: dict[str, Any]) -> Reply:
        return (400, refusing("too long")) if prompt_of(body) in refused else (200, saying("whole"))

    prompts = [f"prompt {n}" for n in range(4)]
    manifest, _ = step(Script(reply), tmp_path, prompts, strategy="sampling4")
    assert manifest.metrics["failed"] == 4
    with pytest.raises(GeneratorError, match="4 of 16 .*--max-failed 0 "):
        step(Script(reply), tmp_path, prompts, strategy="sampling4", max_failed=0.0, target="two")
    refused.add("prompt 2")
    with pytest.raises(GeneratorError, match="8 of 16 .*--max-failed 0.1 "):
        step(Script(reply), tmp_path, prompts, strategy="sampling4", target="three")
    refused |= set(prompts)
    with pytest.raises(GeneratorError, match="1 of 1 "):
        step(Script(reply), tmp_path / "alone", prompts[:1])


def test_d2_with_max_failed_1_a_run_of_refusals_alone_ends_well(tmp_path: Path) -> None:
    script = Script(lambda body: (400, refusing(TOO_LARGE)))
    manifest, drawn = step(script, tmp_path, [f"prompt {n}" for n in range(30)], max_failed=1.0)
    assert manifest.metrics["failed"] == 30
    assert {one.status for one in drawn} == {"failed"}
    assert PROBE not in map(prompt_of, script.bodies)


def test_d2_the_key_does_not_stand_in_the_words_that_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-0123456789")

    def reply(body: dict[str, Any]) -> Reply:
        refused = prompt_of(body) == "prompt 0"
        return (400, refusing("odd: sk-canary-0123456789")) if refused else (200, saying("whole"))

    manifest, _ = step(Script(reply), tmp_path, [f"prompt {n}" for n in range(20)])
    assert "odd: ***" in manifest.to_json()
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"sk-canary" in p.read_bytes()]


REFUSALS = {
    "openai": (400, refusing("Invalid prompt: your prompt was flagged.", code="invalid_prompt"), "filtered"),
    "azure": (
        400,
        refusing(
            "The response was filtered due to the prompt triggering Azure OpenAI's content management policy",
            code="content_filter",
        ),
        "filtered",
    ),
    "openrouter": (403, refusing("Your input was flagged", metadata={"reasons": ["violence"]}), "filtered"),
    "anthropic": (400, refusing("Output blocked by content filtering policy"), "filtered"),
    "alibaba": (
        400,
        refusing("Input data may contain inappropriate content.", code="data_inspection_failed"),
        "filtered",
    ),
    "llama.cpp": (
        400,
        refusing(
            "request (67 tokens) exceeds the available context size (64 tokens), try increasing it",
            type="exceed_context_size_error",
            code=400,
        ),
        "failed",
    ),
    "llama.cpp, older": (500, refusing("the request exceeds the available context size", code=500), "failed"),
    "a word of tomorrow": (400, refusing("I would rather not"), "failed"),
    "no JSON at all": (422, b"<html>no</html>", "failed"),
    "a firewall": (403, b"blocked", "failed"),
    "not found": (404, refusing("no endpoint supports image input"), "failed"),
    "unavailable for legal reasons": (451, refusing("no"), "failed"),
    "its worker dies": (500, refusing("worker died"), "failed"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_d3_what_is_about_one_instruction_leaves_the_others(name: str, tmp_path: Path) -> None:
    status, body, expected = REFUSALS[name]

    def reply(asked: dict[str, Any]) -> Reply:
        return (status, body) if prompt_of(asked) == "prompt 7" else (200, saying("whole"))

    manifest, drawn = step(Script(reply), tmp_path, [f"prompt {n}" for n in range(20)], concurrency=1)
    assert Counter(one.status for one in drawn) == {"ok": 19, expected: 1}
    assert manifest.facts["unanswered"]


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, refusing("no"), ("401 no", "OPENAI_API_KEY")),
        (402, refusing("no"), ("402 no", "account")),
        (403, refusing("no"), ("403 no", "OPENAI_API_KEY")),
        (404, refusing("model not found"), ("404 model not found", "model's name", "address")),
        (405, refusing("no"), ("405 no", "model's name", "address")),
        (400, refusing("API key not valid. Please pass a valid API key."), ("400", "OPENAI_API_KEY")),
        (307, b"", ("307", "address")),
    ],
)
def test_d3_what_is_about_all_requests_ends_the_run_at_the_first(
    status: int, body: Any, words: tuple[str, ...]
) -> None:
    script = Script(lambda asked: (status, body))
    with raises_naming(GeneratorError, *words):
        sample(script, [f"prompt {n}" for n in range(50)], concurrency=1)
    assert len(script.bodies) == 1


def test_d3_a_first_refusal_in_unknown_words_ends_the_run_where_a_plain_question_is_refused_too() -> None:
    script = Script(lambda body: (400, refusing("this server is pinned to another model")))
    with pytest.raises(GeneratorError, match="400 this server is pinned to another model;"):
        sample(script, [f"prompt {n}" for n in range(50)], concurrency=1)
    assert [prompt_of(body) for body in script.bodies] == ["prompt 0", PROBE]


def test_d3_an_outage_of_the_filter_is_tried_again() -> None:
    answers = iter([(503, refusing("the moderation service is away")), (200, saying("whole"))])
    ((candidate,),), _ = sample(Script(lambda body: next(answers)), ["one"])
    assert candidate.status == "ok"


def test_d3_a_key_that_is_taken_back_under_way_ends_the_run() -> None:
    script = Script(lambda body: (200, saying("whole")) if len(script.bodies) <= 5 else (403, refusing("revoked")))
    with pytest.raises(GeneratorError, match=f"{REFUSALS_PER_PROBE} requests.*403 revoked.*OPENAI_API_KEY"):
        sample(script, [f"prompt {n}" for n in range(100)], concurrency=1)


BOTH = "`temperature` and `top_p` cannot both be specified for this model. Please use only one."


def knobs(body: dict[str, Any]) -> dict[str, float]:
    return {name: body[name] for name in ("temperature", "top_p") if name in body}


@pytest.mark.parametrize("param", [None, "top_p", "temperature"])
def test_d4_of_two_knobs_that_do_not_go_together_the_neutral_one_goes(param: str | None) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        return (400, refusing(BOTH, param=param)) if len(knobs(body)) == 2 else (200, saying("whole"))

    decodings = [GREEDY, PLAIN, Decoding(name="nucleus", top_p=0.9), Decoding(name="cool", temperature=0.7)]
    script = Script(reply)
    ((*drawn,),), _ = sample(script, ["one"], decodings, concurrency=1)
    assert {one.status for one in drawn} == {"ok"}
    taken = [knobs(body) for body in script.bodies if len(knobs(body)) == 1]
    # In the order in which the threads came.
    assert sorted(map(str, taken)) == sorted(
        map(str, [{"temperature": 0.0}, {"temperature": 1.0}, {"top_p": 0.9}, {"temperature": 0.7}])
    )
    assert len(script.bodies) == 5
    with raises_naming(GeneratorError, "temperature 0.7", "top_p 0.9", "decoding both", "400"):
        sample(Script(reply), ["one"], [Decoding(name="both", temperature=0.7, top_p=0.9)])


def test_d4_a_server_that_names_only_one_of_two_knobs_is_asked_once_more_without_the_neutral_one() -> None:
    def reply(body: dict[str, Any]) -> Reply:
        refused = len(knobs(body)) == 2
        return (400, refusing("top_p cannot be set here", param="top_p")) if refused else (200, saying("whole"))

    script = Script(reply)
    ((*drawn,),), _ = sample(script, ["one"], [Decoding(name="nucleus", top_p=0.9), GREEDY], concurrency=1)
    assert {one.status for one in drawn} == {"ok"}
    taken = [knobs(body) for body in script.bodies if len(knobs(body)) == 1]
    assert sorted(map(str, taken)) == sorted(map(str, [{"top_p": 0.9}, {"temperature": 0.0}]))


def test_d4_greedy_is_never_drawn_without_its_temperature(tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        words = (
            "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) is supported."
        )
        wrong = body.get("temperature", 1.0) != 1.0
        return (400, refusing(words, param="temperature")) if wrong else (200, saying("whole"))

    with raises_naming(GeneratorError, "temperature 0", "decoding greedy", "400 Unsupported value", "--strategy"):
        sample(Script(reply), ["one", "two"], [GREEDY])
    _, take_counts = sample(Script(reply), ["one", "two"], [PLAIN])
    assert not [name for name in take_counts if name.startswith("not_asked")]


@pytest.mark.parametrize("knob", ["top_k", "min_p", "min_tokens"])
def test_d4_a_knob_beyond_openais_goes_only_where_it_is_off(knob: str) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        return (400, refusing(f"{knob} is not supported")) if knob in body else (200, saying("whole"))

    on = Decoding(name="on", **{{"min_tokens": "min_new_tokens"}.get(knob, knob): {"min_p": 0.1}.get(knob, 4)})  # type: ignore[arg-type]
    ((drawn,),), _ = sample(Script(reply), ["one"], extra=(knob,))
    assert drawn.status == "ok"
    with pytest.raises(GeneratorError, match=f"{knob}.* decoding on "):
        sample(Script(reply), ["one"], [on], extra=(knob,))


@pytest.mark.parametrize("status", [400, 403, 404, 422, 501])
def test_d5_a_model_that_gives_no_logprobs_is_asked_without_them(status: int) -> None:
    words = "You are not allowed to request logprobs from this model" if status != 422 else "no log probabilities here"
    script = Script(lambda body: (status, refusing(words)) if body.get("logprobs") else (200, saying("whole")))
    drawn, take_counts = sample(script, ["one", "two"], concurrency=1)
    assert [group[0].status for group in drawn] == ["ok", "ok"]
    assert [group[0].logprob_sum for group in drawn] == [None, None]
    assert len(script.bodies) == 3
    assert [name.rpartition("/")[2] for name in take_counts if name.startswith("not_asked")] == ["logprobs"]


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_d5_logprobs_are_not_asked_for_with_no_logprobs(tmp_path: Path, api: str) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        return 200, saying("whole") if "messages" in body else {"choices": [{"text": "whole", "finish_reason": "stop"}]}

    script = Script(reply)
    manifest, _ = step(script, tmp_path, ["one"], logprobs=False, api=api)
    assert not [body for body in script.bodies if "logprobs" in body]
    assert manifest.config["logprobs"] is False


@pytest.mark.parametrize(
    ("given", "chat"),
    [
        ("/v1", "/v1/chat/completions"),
        ("/v1/", "/v1/chat/completions"),
        ("/v1//", "/v1/chat/completions"),
        ("", "/v1/chat/completions"),
        ("/", "/v1/chat/completions"),
        ("?api-version=2024-06-01", "/v1/chat/completions?api-version=2024-06-01"),
        ("/api/openai", "/api/openai/chat/completions"),
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions?a=b", "/v1/chat/completions?a=b"),
        (
            "/openai/deployments/d?api-version=2024-06-01",
            "/openai/deployments/d/chat/completions?api-version=2024-06-01",
        ),
        (
            "/openai/deployments/d/?api-version=2024-06-01&x=%2Fy",
            "/openai/deployments/d/chat/completions?api-version=2024-06-01&x=%2Fy",
        ),
    ],
)
def test_d6_the_path_goes_before_the_query(given: str, chat: str) -> None:
    script = Script(lambda body: (200, saying("whole")))
    with scripted(script) as url:
        endpoint = Endpoint(parse_spec(f"openai:m@{url}{given}"), EndpointConfig(max_retries=0))
        endpoint.sample(["one"], [PLAIN], seed=0)
        endpoint.close()
    assert script.paths == [chat]
    base = base_address(f"http://host{given}")
    assert join_path(base, "/models") == "http://host" + chat.replace("/chat/completions", "/models")


def test_d6_azures_key_goes_into_its_own_header(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, given, header in (
        ("key-of-azure", "/openai/deployments/d?api-version=2024-06-01", ("api-key", "key-of-azure")),
        ("key-of-azure", "/openai/v1", ("authorization", "Bearer key-of-azure")),
        ("eyJ0eXAi.x.y", "/openai/deployments/d?api-version=2024-06-01", ("authorization", "Bearer eyJ0eXAi.x.y")),
    ):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        script = Script(lambda body: (200, saying("whole")))
        with scripted(script) as url:
            endpoint = Endpoint(parse_spec(f"openai:m@{url}{given}"), EndpointConfig(max_retries=0))
            endpoint.sample(["one"], [PLAIN], seed=0)
            endpoint.close()
        result = {name: value for name, value in script.headers[0].items() if name in ("api-key", "authorization")}
        assert result == dict([header])
    assert key_headers("http://h/v1", "") == {}


def config_of(*generator: str, **values: Any) -> SamplingConfig:
    return SamplingConfig(source=Path("in"), target=Path("out"), generator=generator, **values)


def test_d7_an_endpoint_without_a_strategy_draws_by_one_that_it_can_do(tmp_path: Path) -> None:
    script = Script(lambda body: (200, saying("whole")))
    manifest, drawn = step(script, tmp_path, ["one", "two"], strategy="")
    assert manifest.metrics["sampled"] == 16
    assert {one.decoding for one in drawn} == {"temperature0", "sampling", "topp0.95"}


def test_d7_in_a_pool_each_generator_has_its_own_default_and_length() -> None:
    mixed = config_of("builtin", "openai:m@http://h/v1", "vllm:folder").decodings
    each = [[one for one in mixed if one.generator == position] for position in range(3)]
    assert [sum(one.num_samples for one in own) for own in each] == [18, 8, 8]
    assert [{one.max_new_tokens for one in own} for own in each] == [{64}, {512}, {64}]
    assert all(one.generator is None for one in config_of("builtin").decodings)
    both = config_of("openai:a@http://h/v1", "openai:b@http://h/v1").decodings
    assert {(one.generator, one.max_new_tokens) for one in both} == {(None, 512)}
    endpoint = Endpoint(parse_spec("openai:m@http://h/v1"))
    with pytest.raises(ConfigError, match="beam4.*--strategy endpoint8"):
        endpoint.check(config_of("openai:m@http://h/v1", strategy="paper17").decodings)
    endpoint.close()


def test_d8_an_endpoints_response_has_512_tokens_unless_something_states_another_number(tmp_path: Path) -> None:
    def lengths(*generator: str, **values: Any) -> set[int]:
        return {one.max_new_tokens for one in config_of(*generator, **values).decodings}

    endpoint = "openai:m@http://h/v1"
    assert lengths(endpoint) == lengths(endpoint, strategy="greedy+sampling4") == {512}
    assert lengths(endpoint, max_new_tokens=40) == {40}
    assert lengths("builtin") == lengths() == {64}
    assert lengths(endpoint, strategy="paper17-leaky") == {63}
    (tmp_path / "s.yaml").write_text("[greedy, {name: a, max_new_tokens: 64}, {name: b, max_new_tokens: 9}, {name: c}]")
    stated = config_of(endpoint, strategy=str(tmp_path / "s.yaml")).decodings
    assert [one.max_new_tokens for one in stated] == [512, 64, 9, 512]
    by_both = config_of("builtin", endpoint, strategy="greedy+sampling4").decodings
    assert [(one.name, one.generator, one.max_new_tokens) for one in by_both] == [
        ("greedy", 0, 64), ("sampling", 0, 64), ("greedy", 1, 512), ("sampling", 1, 512),
    ]  # fmt: skip


def test_d8_responses_that_an_endpoint_cut_are_counted(tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        return 200, saying("text", "length" if prompt_of(body) == "long" else "stop")

    manifest, _ = step(Script(reply), tmp_path, ["long", "short"])
    assert manifest.metrics["truncated"] == 1


@pytest.mark.parametrize("charset", ["iso-8859-1", "latin1", "us-ascii", "utf-16", "windows-1252", "nonsense"])
def test_d9_json_is_utf_8_whatever_its_header_says(charset: str) -> None:
    for sign in (b"", b"\xef\xbb\xbf"):
        data = sign + json.dumps(saying("café 日本"), ensure_ascii=False).encode()
        head = {"Content-Type": f"application/json; charset={charset}"}
        ((candidate,),), _ = sample(Script(lambda body, data=data, head=head: (200, data, head)), ["one"])  # type: ignore[misc]
        assert candidate.response == "café 日本"
    refused = json.dumps(refusing("zu groß"), ensure_ascii=False).encode()
    with pytest.raises(GeneratorError, match="400 zu groß"):
        sample(Script(lambda body: (400, refused, head)), ["one"])


LATIN = json.dumps(saying("café"), ensure_ascii=False)


@pytest.mark.parametrize(
    ("charset", "codec"),
    [
        *(("iso-8859-1", "latin-1"), ("latin1", "latin-1")),
        *(('"windows-1252"', "cp1252"), ("ISO-8859-15", "iso8859-15")),
        *(("utf-16", "utf-16"), ("utf-16le", "utf-16-le")),
    ],
)
def test_d9_a_body_that_is_not_utf_8_is_read_in_the_charset_that_its_server_names(charset: str, codec: str) -> None:
    head = {"Content-Type": f"application/json; Charset={charset}"}
    ((candidate,),), take_counts = sample(Script(lambda body: (200, LATIN.encode(codec), head)), ["one"])
    assert (candidate.response, candidate.status, take_counts["errors"]) == ("café", "ok", 0)


@pytest.mark.parametrize(
    "kind",
    ["json", "json; charset=utf-8", "json; charset=us-ascii", *(f"json; charset={c}" for c in ("x", "zlib", "idna"))],
)
def test_d9_a_body_that_cannot_be_read_is_a_failed_attempt_and_no_other_text(kind: str) -> None:
    head = {"Content-Type": f"application/{kind}"}
    answers = iter([LATIN.encode("latin-1"), LATIN.encode()])
    ((candidate,),), take_counts = sample(Script(lambda body: (200, next(answers), head)), ["one"])
    assert (candidate.response, take_counts["errors"]) == ("café", 1)
    with pytest.raises(GeneratorError, match="UTF-8.*charset") as caught:
        sample(Script(lambda body: (200, LATIN.encode("latin-1"), head)), ["one"])
    assert "\n" not in str(caught.value)


THINKING = "<think>It could be Rome.</think>Paris"


def test_c10_reasoning_is_counted_and_reported_and_stripped_on_demand(tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        text = {"one": THINKING, "two": "<think>It could be", "three": "Paris"}[prompt_of(body)]
        logprobs = {"content": [{"token": "x", "logprob": -1.0}]}
        return 200, saying(text, "length" if text == "<think>It could be" else "stop", logprobs=logprobs)

    prompts = ["one", "two", "three"]
    manifest, drawn = step(Script(reply), tmp_path, prompts)
    assert [one.response for one in drawn] == [THINKING, "<think>It could be", "Paris"]
    assert manifest.metrics["reasoning"] == 2
    _cut, line = cautions(manifest.metrics, manifest.config, manifest.facts)
    assert_names(line, "2 of 3", "reasoning", "--strip-reasoning")
    stripped, drawn = step(Script(reply), tmp_path, prompts, target="two", strip_reasoning=True)
    assert [(one.response, one.status, one.logprob_sum, one.num_tokens) for one in drawn] == [
        ("Paris", "ok", None, None),
        ("", "empty", None, None),
        ("Paris", "ok", -1.0, 1),
    ]
    assert stripped.config["strip_reasoning"] is True
    said = cautions(stripped.metrics, stripped.config, stripped.facts)
    assert_names(said[0], "2 of 3", "reasoning", "removed")


def test_c10_reasoning_beside_the_content_is_not_part_of_the_response() -> None:
    message = {"role": "assistant", "content": "Paris", "reasoning_content": "It could be Rome."}
    ((candidate,),), _ = sample(Script(lambda body: (200, saying("", message=message))), ["one"])
    assert candidate.response == "Paris"
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "Rome?"}]}, {"type": "text", "text": "Paris"}]
    ((candidate,),), _ = sample(Script(lambda body: (200, saying(parts))), ["one"])  # type: ignore[arg-type]
    assert candidate.response == "Paris"
    parts[0] = {"type": "reasoning", "text": "Rome?"}
    ((candidate,),), _ = sample(Script(lambda body: (200, saying(parts))), ["one"])  # type: ignore[arg-type]
    assert candidate.response == "Paris"
