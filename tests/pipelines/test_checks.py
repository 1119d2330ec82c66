"""What a run on this machine checks before its first step: all problems together, nothing paid, nothing written."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from chat_server import Model
from chat_server import serving as serving_chat
from local_server import handled_by
from wording import assert_names, raises_naming

from cappy.builtin import LLM_FOLDER, TINY_SCORER_FOLDER
from cappy.config import build
from cappy.errors import CappyError, ProblemsError, error_lines
from cappy.records import Instance, write
from cappy.sampling.step import SamplingConfig, run
from pipelines import checks
from pipelines.recipe import check_recipe

COMMIT = "ab" * 20
Answer = tuple[int, Any]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a file of tasks and no key in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "OPENAI_API_KEY_FILE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    rows = [{"instruction": f"say {index}", "reference": "x"} for index in range(30)]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@contextmanager
def listing(answer: Callable[[str, str], Answer]) -> Iterator[str]:
    """The address of an endpoint that answers `GET path` with a key by `answer(path, key)`; it must not get a POST."""
    posts: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            key = (self.headers["Authorization"] or "").removeprefix("Bearer ")
            status, body = answer(self.path, key)
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self) -> None:
            posts.append(self.path)

    with handled_by(Handler) as address:
        yield f"{address}/v1"
    assert posts == [], "a request was sent that may cost something"


def models(*names: str, **more: object) -> Answer:
    return 200, {"object": "list", "data": [{"id": name, **more} for name in names]}


def problems(**values: Any) -> list[str]:
    """The lines of the problems of an adaptation with these parameters; `settings` are by step."""
    settings = values.pop("settings", {})
    others: dict[str, Any] = {name: values.pop(name) for name in ("tracking_uri", "work") if name in values}
    recipe = check_recipe(
        {"pipeline": "adapt", "parameters": {"source": "tasks.jsonl", **values}, "settings": settings, **others}
    )
    before = sorted(Path().rglob("*"))
    try:
        checks.check(recipe)
    except CappyError as error:
        return error_lines(error)
    finally:
        assert sorted(Path().rglob("*")) == before, "a check wrote a file"
    return []


def test_what_can_work_has_no_problem() -> None:
    with listing(lambda path, key: models("m", "n")) as url:
        assert problems(generator=[f"openai:m@{url}"]) == []
    assert problems(generator=["builtin"], scorer="builtin:tiny") == []
    assert problems(generator=[str(LLM_FOLDER)], scorer=str(TINY_SCORER_FOLDER)) == []


def test_all_problems_are_shown_together_one_line_each() -> None:
    with listing(lambda path, key: models("m")) as url:
        lines = problems(
            generator=[f"openai:n@{url}", "gpt-4o-mini"],
            scorer="nowhere",
            strategy="endpoint8",
            metric="rogueL",
            tracking_uri="http://127.0.0.1:9",
            settings={
                "finetuning": {"epoch": 2, "sead": 1},
                "promotion": {"guard": ["rte"]},
                "preparation": {"columns": ["instruction=question"]},
            },
        )
    expected = [
        ("annotation", "--metric", "rogueL"),
        ("finetuning", "--epoch", "did you mean epochs"),
        ("finetuning", "--sead", "did you mean seed"),
        ("promotion", "--guard", "rte", "TASK=MARGIN"),
        ("tasks.jsonl:1", "question", "--columns"),
        (f"openai:n@{url}", "no model 'n'", "'m'"),
        ("sampling", "gpt-4o-mini", "openai:gpt-4o-mini@https://api.openai.com/v1"),
        ("finetuning", "--scorer", "nowhere"),
        ("http://127.0.0.1:9", "MLflow does not answer", "--tracking-uri"),
    ]
    assert len(lines) == len(expected), lines
    for parts in expected:
        matching = [line for line in lines if all(part.casefold() in line.casefold() for part in parts)]
        assert len(matching) == 1, parts
        assert "\n" not in matching[0]


def test_recorded_samples_that_are_missing_hide_no_other_problem() -> None:
    lines = problems(generator=["recorded:missing.jsonl"], scorer="nowhere", metric="rogueL")
    assert len(lines) == 3
    for parts in (("missing.jsonl",), ("nowhere",), ("rogueL",)):
        assert any(all(part in line for part in parts) for line in lines), lines


def test_a_folder_that_cannot_be_trained_is_no_scorer(tmp_path: Path, make_scorer: Callable[..., Path]) -> None:
    (line,) = problems(generator=["builtin"], scorer=str(LLM_FOLDER))
    assert_names(line, str(LLM_FOLDER), "ForConditionalGeneration", "neither a scorer nor an encoder")
    bare = tmp_path / "bare"
    shutil.copytree(make_scorer(), bare)
    for path in bare.glob("*.json"):
        if path.name != "config.json":
            path.unlink()
    (line,) = problems(generator=["builtin"], scorer=str(bare))
    assert_names(line, str(bare), "no tokenizer")


def test_an_endpoint_that_refuses_the_connection_or_the_key_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = problems(generator=["openai:m@http://127.0.0.1:9/v1"])
    assert_names(line, "openai:m@http://127.0.0.1:9/v1", "refused", "check the address")

    def locked(path: str, key: str) -> Answer:
        return models("m") if key == "the-right-key" else (401, {"error": {"message": f"Incorrect API key: {key}"}})

    with listing(locked) as url:
        (line,) = problems(generator=[f"openai:m@{url}"])
        assert_names(line, "401", "OPENAI_API_KEY")
        monkeypatch.setenv("OPENAI_API_KEY", "the-wrong-key")
        (line,) = problems(generator=[f"openai:m@{url}"])
        assert_names(line, "401", "OPENAI_API_KEY")
        assert "the-wrong-key" not in line
        monkeypatch.setenv("OPENAI_API_KEY", "the-right-key")
        assert problems(generator=[f"openai:m@{url}"]) == []


def test_a_provider_that_needs_a_key_is_not_asked_without_one() -> None:
    (line,) = problems(generator=["openai:gpt-4o-mini@https://api.openai.com/v1"])
    assert_names(line, "api.openai.com", "needs a key", "OPENAI_API_KEY")


@pytest.mark.parametrize(
    "answer",
    [
        (404, {"error": "not found"}),
        (405, {}),
        (503, {"error": {"message": "Loading model"}}),
        (403, {"error": {"message": "Missing scopes: api.model.read"}}),
        (401, {"error": {"message": "You have insufficient permissions. Missing scopes: api.model.read"}}),
        (200, {"models": []}),
        (200, {"data": []}),
        (200, []),
        models("other", "*"),
        models("other.gguf", owned_by="llamacpp"),
        models("M"),
        models("models/m"),
        models("m:latest"),
        models("org/m"),
    ],
)
def test_an_endpoint_is_not_refused_for_what_it_need_not_have(answer: Answer) -> None:
    with listing(lambda path, key: answer) as url:
        assert problems(generator=[f"openai:m@{url}"]) == []


def test_a_decoding_that_the_endpoint_cannot_do_is_refused() -> None:
    with listing(lambda path, key: models("m")) as url:
        (line,) = problems(generator=[f"openai:m@{url}"], strategy="beam4")
    assert_names(line, "beam4", "--strategy endpoint8")


def test_answers_of_an_earlier_run_are_used_without_the_endpoint(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "tasks.jsonl").read_text().splitlines()]
    instances = [
        Instance(instance_id=str(index), instruction=row["instruction"], references=("x",))
        for index, row in enumerate(rows)
    ]
    write(folder / "in", instances)
    with serving_chat(Model()) as url:
        generator = f"openai:m@{url}"
        values = {"source": "in", "target": "out", "generator": [generator], "work": ".cappy/work"}
        run(build(SamplingConfig, values))
    assert problems(generator=[generator]) == []
    (line,) = problems(generator=[generator], sampling_seed=9)
    assert_names(line, generator, "refused")


def test_a_folder_that_is_no_llm_or_no_scorer_is_refused(folder: Path) -> None:
    for name in ("empty", "pickled"):
        (folder / name).mkdir()
    (folder / "pickled" / "config.json").write_text("{}")
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"")
    lines = problems(generator=[str(TINY_SCORER_FOLDER), "empty"], scorer="pickled")
    assert len(lines) == 3
    assert_names(lines[0], str(TINY_SCORER_FOLDER), "ForSequenceClassification", "cannot generate text")
    assert_names(lines[1], "empty", "config.json")
    assert_names(lines[2], "pickled/pytorch_model.bin", "safetensors")


def test_a_repository_that_is_not_in_the_cache_is_refused_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (line,) = problems(generator=[f"hub:no/such@{COMMIT}"])
    assert_names(line, f"hub:no/such@{COMMIT}", "cannot be downloaded", "check name, revision and network")


def test_a_database_that_cannot_be_created_or_has_no_versions_is_refused(folder: Path) -> None:
    (line,) = problems(generator=["builtin"], tracking_uri=f"sqlite:///{folder}/tasks.jsonl/mlflow.db")
    assert_names(line, "tasks.jsonl", "cannot be created", "--tracking-uri")
    (line,) = problems(generator=["builtin"], scorer="models:/mine@champion")
    assert_names(line, "models:/mine@champion", "no versions yet")


def test_a_full_disk_is_refused_with_what_is_needed_and_free(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(checks, "free_bytes", lambda folder: 1_000_000)
    (line,) = problems(generator=["builtin"], work=str(folder / "deep" / "work"))
    assert_names(line, str(folder), "0.0 GB free", "0.1 GB", "--work")


def test_a_recipe_without_an_llm_and_without_responses_is_refused() -> None:
    (line,) = problems(generator=[])
    assert_names(line, "tasks.jsonl:1", "no responses", "--generator")


def test_generators_are_checked_even_if_a_setting_of_sampling_is_wrong() -> None:
    generator = ["openai:m@http://127.0.0.1:9/v1", "openai:llama3"]
    lines = problems(generator=generator, settings={"sampling": {"concurency": 3}})
    assert len(lines) == 3
    for line, parts in zip(lines, (("did you mean concurrency",), ("refused",), ("openai:llama3@URL",)), strict=True):
        assert_names(line, *parts)


def test_one_problem_is_raised_as_it_is() -> None:
    with raises_naming(CappyError, "rogueL") as caught:
        checks.check(check_recipe({"pipeline": "adapt", "parameters": {"metric": "rogueL"}}))
    assert not isinstance(caught.value, ProblemsError)
