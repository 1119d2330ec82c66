"""What was evaluated is what picks everywhere: one pool goes through every way to select, and all pick one response."""

import asyncio
import json
import random
import shutil
import socket
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pandas  # type: ignore[import-untyped]
import pytest
import uvicorn
from fastapi.testclient import TestClient
from scoring_function import until_ready
from scripted_server import Script, scripted
from typer.testing import CliRunner
from waiting import wait_until

from cappy.annotation import rouge_l
from cappy.cli import app as command
from cappy.evaluation import read_report
from cappy.evaluation import step as evaluation
from cappy.records import Candidate, Instance, Manifest, Split, write
from cappy.records.folder import MANIFEST, describe_files, write_manifest
from cappy.records.instance import Status
from cappy.registry import download, registration
from cappy.scoring import Scorer
from cappy.selection.linear import FEATURE_SETS, SELECTOR, Feature, Rule, Selector, read_selector
from cappy.selection.pools import Pool, collect_pools, pick, score_pools, with_scores
from cappy.selection.selectors import Fitting, select
from serving.app import create_app
from serving.engine import Models, load
from serving.gateway.answering import Gateway
from serving.gateway.config import Policy
from serving.gateway.requests import ChatRequest, read_request
from serving.gateway.scoring import load as load_scoring
from serving.gateway.upstream import LLM, Upstream

INSTRUCTION = "Put the words in order."
WEIGHTS: dict[Feature, float] = {"score": 0.2, "mbr": 1.0, "likelihood": 2.0, "greedy": 3.0}
SEEDS = 6
"""Enough pools that the rules pick differently, whether scores are computed in bf16 or in fp32."""
KNOWN = (
    *(frozenset[str](), frozenset({"greedy"}), frozenset({"likelihood"}), frozenset({"greedy", "likelihood"})),
    frozenset({"greedy", "likelihood", "truncated"}),
)


@dataclass(frozen=True)
class Question:
    """Responses, with the likelihood per token of each and the index of the greedy one, as far as they are known.

    `truncated` are the indices of those that a length limit cut off.
    """

    responses: tuple[str, ...]
    likelihoods: tuple[float, ...] | None
    greedy: int | None
    truncated: tuple[int, ...] = ()


def ask(seed: int, known: frozenset[str]) -> Question:
    """A pool of eight different responses that resemble each other more or less."""
    rng = random.Random(100 + seed)
    words = "one two three four five six seven eight nine ten".split()
    responses = tuple(dict.fromkeys(" ".join(rng.sample(words, rng.randint(3, 6))) for _ in range(8)))
    likelihoods = tuple(-rng.random() for _ in responses) if "likelihood" in known else None
    truncated = tuple(range(0, len(responses), 2)) if "truncated" in known else ()
    return Question(responses, likelihoods, seed % 3 if "greedy" in known else None, truncated)


@pytest.fixture(scope="module")
def scorer(make_scorer: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a scorer with a selector."""
    folder = tmp_path_factory.mktemp("selected") / "scorer"
    shutil.copytree(make_scorer(seed=3), folder)
    version = Scorer.load(str(folder)).version
    rules = tuple(Rule(features=names, weights=tuple(WEIGHTS[name] for name in names)) for names in FEATURE_SETS)
    (folder / SELECTOR).write_text(
        Selector(rules=rules, metric="rougeL", groups=99, evidence="held-out", scorer=version).to_json()
    )
    return folder


def evaluated(folder: Path, question: Question) -> str:
    """What the evaluation credits the selector with."""
    scorer = Scorer.load(str(folder))
    candidates = tuple(
        Candidate(
            response=response,
            generator="g",
            decoding="greedy" if index == question.greedy else "topp0.95",
            logprob_mean=question.likelihoods[index] if question.likelihoods else None,
            labels={"rougeL": 0.0},
            status="truncated" if index in question.truncated else "ok",
        )
        for index, response in enumerate(question.responses)
    )
    instance = Instance(
        instance_id="i", instruction=INSTRUCTION, references=("r",), split="test", candidates=candidates
    )
    pools: list[Pool] = collect_pools([instance], metric="rougeL", splits={"test"})
    pools = with_scores(pools, "scorer", score_pools(pools, scorer.score, lambda count: None))
    selector = read_selector(folder, scorer.version)
    (values,) = select(Fitting(held_out=[], pools=pools, selector=selector)).values["selector"]
    return question.responses[pick(values)]


def in_python(folder: Path, question: Question) -> str:
    known = asdict(question)
    return Scorer.load(str(folder)).select(INSTRUCTION, known.pop("responses"), **known).response


def fields(question: Question) -> dict[str, Any]:
    """The fields of `cappy select` and of /select."""
    known = {name: value for name, value in asdict(question).items() if value not in (None, ())}
    return {"instruction": INSTRUCTION, **known}


def by_command(folder: Path, question: Question) -> str:
    source = folder.parent / "question.jsonl"
    source.write_text(json.dumps(fields(question)))
    result = CliRunner().invoke(command, ["select", "--scorer", str(folder), "--source", str(source)])
    assert result.exit_code == 0, result.output
    return str(json.loads(result.stdout)["response"])


def by_service(folder: Path, question: Question) -> str:
    with TestClient(create_app(Models(load(str(folder))))) as client:
        until_ready(client)
        answer = client.post("/select", json=fields(question))
    assert answer.status_code == 200, answer.text
    return str(answer.json()["response"])


def by_pyfunc(folder: Path, question: Question, tmp_path: Path) -> str:
    rows: dict[str, Any] = {"instruction": [INSTRUCTION] * len(question.responses), "response": question.responses}
    if question.likelihoods is not None:
        rows["likelihood"] = question.likelihoods
    if question.greedy is not None:
        rows["greedy"] = [index == question.greedy for index in range(len(question.responses))]
    if question.truncated:
        rows["truncated"] = [index in question.truncated for index in range(len(question.responses))]
    with warnings.catch_warnings():
        # MLflow warns about its own type hints.
        warnings.simplefilter("ignore")
        import mlflow.pyfunc

        from cappy.registry.recording import save_model

        save_model(folder, tmp_path / "model")
        model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
        picked = list(model.predict(pandas.DataFrame(rows), params={"select": True}))
    assert sorted(picked) == [0.0] * (len(question.responses) - 1) + [1.0]
    return question.responses[picked.index(1.0)]


def choice(question: Question, index: int, *, logprobs: bool) -> dict[str, Any]:
    """A response of the LLM's server, with a token's likelihood if it is asked for and known."""
    likelihood = None if question.likelihoods is None else question.likelihoods[index]
    known = {"content": [{"token": "x", "logprob": likelihood}]} if likelihood is not None and logprobs else None
    message = {"role": "assistant", "content": question.responses[index]}
    reason = "length" if index in question.truncated else "stop"
    return {"index": index, "message": message, "finish_reason": reason, "logprobs": known}


def by_gateway(spec: str, question: Question) -> str:
    """The gateway draws the greedy response first, if it may, and then the others."""

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        greedy = body.get("temperature") == 0
        chosen = [index for index in range(len(question.responses)) if (index == question.greedy) is greedy]
        return 200, {
            "model": "m",
            "choices": [choice(question, index, logprobs=bool(body.get("logprobs"))) for index in chosen],
        }

    count = len(question.responses)
    policy = Policy(candidates=count, round_size=count, min_gain=0.0, greedy=question.greedy is not None)
    body = {"model": "m", "messages": [{"role": "user", "content": INSTRUCTION}]}
    request: ChatRequest = read_request(json.dumps(body).encode(), max_choices=count)
    scoring = load_scoring(spec)

    async def answer(url: str) -> str:
        gateway = Gateway(upstream=Upstream(LLM(url=f"{url}/v1")), scoring=scoring, policy=policy)
        try:
            outcome = await gateway.answer(request, "")
        finally:
            await gateway.close()
        assert {candidate.text for candidate in outcome.candidates} == set(question.responses)
        return outcome.best.text

    with scripted(Script(reply)) as url:
        return asyncio.run(answer(url))


@contextmanager
def served(models: Models) -> Iterator[str]:
    """The address of a running service with these models."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(create_app(models), log_config=None, log_level="warning", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        wait_until(lambda: server.started, "the service to listen", seconds=20, pause=0.01)
        wait_until(lambda: httpx.get(f"{url}/ready").status_code == 200, "a ready service", seconds=20, pause=0.01)
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join(20)


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: "+".join(sorted(known)) or "texts")
def test_every_way_to_select_picks_what_the_evaluation_is_credited_with(
    scorer: Path, tmp_path: Path, known: frozenset[str]
) -> None:
    with served(Models(load(str(scorer)))) as service:
        for seed in range(SEEDS):
            question = ask(seed, known)
            picks = {
                "evaluation": evaluated(scorer, question),
                "python": in_python(scorer, question),
                "command": by_command(scorer, question),
                "service": by_service(scorer, question),
                "gateway": by_gateway(str(scorer), question),
                "gateway of a service": by_gateway(service, question),
                "pyfunc": by_pyfunc(scorer, question, tmp_path / str(seed)),
            }
            assert len(set(picks.values())) == 1, picks


def test_a_selector_of_another_decoding_does_without_the_greedy_response(scorer: Path, tmp_path: Path) -> None:
    """Its weight is that of a beam search, say, which is not what a caller marks as greedy."""
    other = tmp_path / "scorer"
    shutil.copytree(scorer, other)
    (other / SELECTOR).write_text(replace(read_selector(scorer), decoding="g beam4").to_json())
    different = 0
    with served(Models(load(str(other)))) as service:
        for seed in range(SEEDS):
            question = ask(seed, frozenset({"greedy"}))
            expected = in_python(scorer, replace(question, greedy=None))
            different += in_python(scorer, question) != expected
            picks = {
                "python": in_python(other, question),
                "command": by_command(other, question),
                "service": by_service(other, question),
                "gateway": by_gateway(str(other), question),
                "gateway of a service": by_gateway(service, question),
                "pyfunc": by_pyfunc(other, question, tmp_path / str(seed)),
            }
            assert set(picks.values()) == {expected}, picks
    assert different, "greedy responses would be picked"


@pytest.mark.parametrize("unknown", [float("-inf"), float("nan"), None])
def test_a_model_of_mlflow_does_without_likelihoods_if_one_is_unknown(
    scorer: Path, tmp_path: Path, unknown: float | None
) -> None:
    for seed in range(SEEDS):
        question = ask(seed, KNOWN[-1])
        assert question.likelihoods is not None
        partly: Any = (unknown, *question.likelihoods[1:])
        expected = in_python(scorer, replace(question, likelihoods=None))
        assert by_pyfunc(scorer, replace(question, likelihoods=partly), tmp_path / str(seed)) == expected


def test_a_registered_version_picks_what_its_report_is_about(make_scorer: Callable[..., Path], tmp_path: Path) -> None:
    """The evaluation fits the selector; the version that is downloaded later gets the mean label of the report."""
    uri, work = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "work"
    scorer = tmp_path / "scorer"
    shutil.copytree(make_scorer(seed=3), scorer)
    (scorer / MANIFEST).unlink()
    write_manifest(scorer, Manifest(step="finetuning", files=describe_files(scorer)))
    instances = [labelled(number, "test" if number % 2 else "validation") for number in range(80)]
    write(tmp_path / "annotated", instances)
    evaluation.run(
        evaluation.EvaluationConfig(
            source=tmp_path / "annotated", scorer=scorer, target=tmp_path / "report", work=work, probe=False
        )
    )
    registration.run(
        registration.RegistrationConfig(
            scorer=scorer, report=tmp_path / "report", target=tmp_path / "version", tracking_uri=uri, work=work
        )
    )
    report = read_report(tmp_path / "report")
    assert report.selectors["selector"].detail not in ("", "score"), "the score alone would prove less"
    version = Scorer.load(str(download("models:/cappy/1", tracking_uri=uri, cache=tmp_path / "cache")))
    picked = []
    for instance in instances:
        if instance.split == "test":
            pick = version.select(
                instance.instruction,
                [candidate.response for candidate in instance.candidates],
                likelihoods=[candidate.logprob_mean or 0.0 for candidate in instance.candidates],
                greedy=next(index for index, each in enumerate(instance.candidates) if each.decoding == "greedy"),
                truncated=[index for index, each in enumerate(instance.candidates) if each.status == "truncated"],
            )
            picked.append(instance.candidates[pick.index].labels["rougeL"])
    assert sum(picked) / len(picked) == pytest.approx(report.selectors["selector"].estimate.mean)


def labelled(number: int, split: Split) -> Instance:
    """An instance with labelled responses whose likelihoods say something of the labels."""
    question = ask(number, frozenset({"greedy"}))
    rng = random.Random(number)
    truncated = {rng.randrange(8)} if number % 3 == 0 else set()
    candidates = []
    for index, response in enumerate(question.responses):
        label = rouge_l(["one two three four"], response)
        known = {"logprob_mean": label - 1.5 + rng.random(), "labels": {"rougeL": label}}
        status: Status = "truncated" if index in truncated else "ok"
        decoding = "greedy" if index == question.greedy else "topp0.95"
        candidates.append(Candidate(response=response, generator="g", decoding=decoding, status=status, **known))  # type: ignore[arg-type]
    return Instance(
        instance_id=f"i{number}",
        instruction=f"{INSTRUCTION} {number}",
        references=("one two three four",),
        split=split,
        candidates=tuple(candidates),
    )


def test_a_gateway_picks_by_the_selector_of_the_scores_after_the_service_got_another_one(scorer: Path) -> None:
    """The same scorer with another selector is another version in the registry, but has the same scores."""
    models = Models(load(str(scorer)))
    greedy = Selector(rules=(Rule(features=("score", "mbr", "greedy"), weights=(0.0, 0.0, 1.0)),))
    least = Selector(rules=(Rule(features=("score",), weights=(-1.0,)),))

    async def selectors(service: str) -> list[Selector]:
        scoring = load_scoring(service)
        used = []
        for selector in (greedy, least):
            models.swap(replace(models.current, selector=selector))
            await scoring([(INSTRUCTION, "one")])
            used.append(scoring.selector)
            assert scoring.version() == models.current.version
        await scoring.close()
        return used

    with served(models) as service:
        assert asyncio.run(selectors(service)) == [greedy, least]


def test_the_pools_tell_the_rules_apart(scorer: Path) -> None:
    """Otherwise a way that knows less, or picks by the score alone, would pass above."""
    seeds: Sequence[int] = range(SEEDS)
    by_known = [tuple(evaluated(scorer, ask(seed, known)) for seed in seeds) for known in KNOWN]
    scores = tuple(_best_score(scorer, ask(seed, frozenset())) for seed in seeds)
    assert len({scores, *by_known}) == 1 + len(KNOWN), (scores, by_known)


def _best_score(folder: Path, question: Question) -> str:
    index, _ = Scorer.load(str(folder)).rank(INSTRUCTION, question.responses)[0]
    return question.responses[index]
