"""`cappy adapt` and `cappy pipeline`: what is asked of the pipelines, and what is told of their outcome."""

import json
import random
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from wording import assert_names, raises_naming

from cappy.cli.adapt import AdaptConfig, adapt, generators_for
from cappy.cli.outcome import describe, describe_step, facts
from cappy.cli.pipeline import PIPELINE_NAMES, settings_by_step
from cappy.cli.steps import summary
from cappy.config import build
from cappy.errors import ConfigError
from cappy.evaluation import evaluate
from cappy.records import Candidate, Instance, Manifest, write
from cappy.records.folder import describe_files, write_manifest
from cappy.sampling.step import SamplingConfig
from pipelines.definitions import PIPELINES
from pipelines.local import RunOutcome

Cappy = Callable[..., subprocess.CompletedProcess[str]]


def instances() -> list[Instance]:
    rng = random.Random(0)
    return [
        Instance(
            instance_id=str(index),
            instruction=f"Say {index}.",
            references=("yes",),
            split="test" if index % 2 else "validation",
            candidates=tuple(
                Candidate(response=f"{text} {index}", labels={"rougeL": value})
                for text, value in zip("abc", rng.sample([0.0, 0.5, 1.0], 3), strict=True)
            ),
        )
        for index in range(60)
    ]


def finished(folder: Path, files: Mapping[str, Any], step: str, result: Mapping[str, Any]) -> Path:
    folder.mkdir()
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    write_manifest(folder, Manifest(step=step, files=describe_files(folder), facts=result))
    return folder


@pytest.fixture
def make_outcome(tmp_path: Path) -> Callable[..., RunOutcome]:
    """make_outcome("hold") -> a run of adapt whose evaluation is real and whose other folders hold their facts."""

    def make(decision: str) -> RunOutcome:
        labels = {c.response: c.labels["rougeL"] for instance in instances() for c in instance.candidates}
        report = evaluate(instances(), score=lambda pairs: [labels[response] for _, response in pairs]).to_dict()
        alias = "champion" if decision == "promote" else "challenger"
        version = {"uri": "models:/mine/3", "alias": "challenger"}
        decided = {
            "decision": decision,
            "reasons": ["Because of this.", "And of that."],
            "serve": f"cappy serve --scorer models:/mine@{alias}",
        }
        outputs = {
            "evaluation": finished(tmp_path / "evaluation", {"report.json": report}, "evaluation", {}),
            "registration": finished(tmp_path / "registration", {}, "registration", version),
            "promotion": finished(tmp_path / "promotion", {}, "promotion", decided),
        }
        if decision == "promote":
            endpoint = {"command": f"{decided['serve']} --port 8080"}
            outputs["deployment"] = finished(tmp_path / "deployment", {}, "deployment", endpoint)
        return RunOutcome(
            run_id="adapt-1",
            folder=tmp_path,
            log=tmp_path / "run.log",
            outputs=outputs,
            cached=frozenset({"evaluation"}),
        )

    return make


def test_a_promotion_is_reported_with_the_table_the_reasons_and_the_champions_command(
    make_outcome: Callable[..., RunOutcome], tmp_path: Path
) -> None:
    outcome = make_outcome("promote")
    result = facts(outcome)
    text = describe(outcome, result)
    for row in ("random choice", "longest", "MBR", "scorer", "oracle", "95% interval"):
        assert row in text
    assert re.search(rf"^report +{re.escape(str(tmp_path))}/evaluation/report\.html$", text, re.MULTILINE)
    assert re.search(r"^version +models:/mine/3\b.*champion$", text, re.MULTILINE)
    assert re.search(r"^decision  .*champion\n +Because of this\.\n +And of that\.$", text, re.MULTILINE)
    assert re.search(r"^cache +evaluation ", text, re.MULTILINE)
    assert text.endswith(" cappy serve --scorer models:/mine@champion --port 8080")


def test_a_hold_is_reported_with_its_reasons_and_the_challengers_command(
    make_outcome: Callable[..., RunOutcome],
) -> None:
    outcome = make_outcome("hold")
    text = describe(outcome, facts(outcome))
    assert re.search(r"alias challenger\ndecision  hold.*\n +Because of this\.\n", text)
    assert text.endswith(" cappy serve --scorer models:/mine@challenger")


@pytest.mark.parametrize("because", ["9 updates, kept the scorer that training started from: it was better", ""])
def test_why_training_kept_other_weights_than_the_last_is_shown_at_the_end(
    make_outcome: Callable[..., RunOutcome], tmp_path: Path, because: str
) -> None:
    outcome = make_outcome("hold")
    trained = tmp_path / "finetuning"
    trained.mkdir()
    made = {"kept": "start" if because else "last", "kept_because": because}
    manifest = Manifest(step="finetuning", files=(), metrics={"updates": 9}, facts=made)
    write_manifest(trained, manifest)
    outcome = replace(outcome, outputs={**outcome.outputs, "finetuning": trained})
    result = facts(outcome)
    assert result["training"] == {"updates": 9, **made}
    lines = [line for line in describe(outcome, result).splitlines() if line.startswith("training")]
    assert lines == ([f"training  {because}"] if because else [])
    assert describe_step(manifest, trained) == lines
    assert summary(manifest, trained, 1.0).splitlines()[:-1] == lines
    assert "updates 9" in summary(manifest, trained, 1.0)


def test_d7_adapt_with_an_endpoint_and_no_strategy_draws_what_an_endpoint_can() -> None:
    def drawn(*generator: str) -> set[tuple[str, int]]:
        wanted = PIPELINES["adapt"].settings({"source": "tasks.jsonl", "generator": generator})["sampling"]
        decodings = build(SamplingConfig, {**wanted, "source": "in", "target": "out"}).decodings
        return {(one.name, one.max_new_tokens) for one in decodings}

    assert drawn("openai:m@http://h/v1") == {("temperature0", 512), ("sampling", 512), ("topp0.95", 512)}
    assert ("beam4", 64) in drawn("builtin")


def test_d2_and_c10_what_sampling_did_not_get_and_reasoning_are_reported_by_adapt_too(
    make_outcome: Callable[..., RunOutcome], tmp_path: Path
) -> None:
    outcome = make_outcome("hold")
    sampled = tmp_path / "sampling"
    sampled.mkdir()
    metrics = {"sampled": 40, "failed": 3, "reasoning": 30}
    unanswered = {"openai:m@http://h/v1": {"400 too long": 1, "400 too odd": 2}}
    write_manifest(sampled, Manifest(step="sampling", files=(), metrics=metrics, facts={"unanswered": unanswered}))
    text = describe(outcome, facts(replace(outcome, outputs={**outcome.outputs, "sampling": sampled})))
    (unanswered_line,) = (line for line in text.splitlines() if "openai:m@http://h/v1" in line)
    assert_names(unanswered_line, "3 candidates", "2 of them", "400 too odd")
    assert_names(text, "caution   30 of 40 responses ", "reasoning")
    assert "reasoning" not in describe(outcome, facts(outcome))


def test_the_facts_are_json_with_the_reports_numbers(make_outcome: Callable[..., RunOutcome]) -> None:
    result = facts(make_outcome("hold"))
    assert json.loads(json.dumps(result)) == result
    assert result["selectors"]["scorer"]["mean"] == result["selectors"]["oracle"]["mean"] == 1.0
    random_choice = result["selectors"]["random"]
    assert random_choice["low"] <= random_choice["mean"] <= random_choice["high"]
    assert random_choice["mean"] == pytest.approx(0.5)
    assert (result["decision"], result["version"], result["from_cache"]) == ("hold", "models:/mine/3", ["evaluation"])


def test_the_command_that_serves_names_another_mlflow(make_outcome: Callable[..., RunOutcome]) -> None:
    assert facts(make_outcome("hold"), "http://h:1/a b")["serve"] == (
        "MLFLOW_TRACKING_URI='http://h:1/a b' cappy serve --scorer models:/mine@challenger"
    )


def test_the_report_is_named_from_here(
    make_outcome: Callable[..., RunOutcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = make_outcome("hold")
    monkeypatch.chdir(outcome.folder)
    assert facts(outcome)["report"] == "evaluation/report.html"


def test_what_is_sampled_from_follows_from_the_instances(tmp_path: Path) -> None:
    bare, full, closed = tmp_path / "bare.jsonl", tmp_path / "full.jsonl", tmp_path / "closed.jsonl"
    row = {"instruction": "a", "reference": "b"}
    bare.write_text(json.dumps(row))
    full.write_text(json.dumps({**row, "responses": ["b", "c"]}))
    closed.write_text(json.dumps({**row, "choices": ["b", "c"]}))
    write(tmp_path / "records", instances())
    assert generators_for("builtin", [], {}) == ["builtin"]
    assert generators_for(str(full), [], {}) == generators_for(str(closed), [], {}) == []
    assert generators_for(str(tmp_path / "records"), [], {}) == []
    assert generators_for(str(bare), ["builtin", "openai:m@http://h/v1"], {}) == ["builtin", "openai:m@http://h/v1"]
    with pytest.raises(typer.BadParameter, match=r"bare\.jsonl:1.*responses"):
        generators_for(str(bare), [], {})
    named = tmp_path / "named.jsonl"
    named.write_text(json.dumps({"question": "a", "answer": "b", "responses": ["c"]}))
    columns = ["instruction=question", "reference=answer"]
    assert generators_for(str(named), [], {"columns": columns}) == []
    with raises_naming(ConfigError, "absent", "--instances"):
        generators_for(str(tmp_path / "absent"), [], {})


def test_instances_without_responses_and_without_an_llm_are_wrong_usage(here: Cappy, tmp_path: Path) -> None:
    (tmp_path / "bare.jsonl").write_text('{"instruction": "a", "reference": "b"}\n')
    done = here("adapt", "--instances", "bare.jsonl")
    assert done.returncode == 2
    assert_names(done.stderr, "--generator", "bare.jsonl:1", "responses")


def test_the_flags_have_the_defaults_of_the_plan_and_the_pipelines_their_names() -> None:
    config, choices = AdaptConfig(), PIPELINES["adapt"].parameters
    for name in set(choices) - {"source", "generator"}:
        assert getattr(config, name) == choices[name], name
    assert config.instances == choices["source"]
    assert set(PIPELINE_NAMES) == set(PIPELINES)


def test_settings_of_any_step_are_read_as_json_or_text() -> None:
    words = ["finetuning.epochs=2", "finetuning.learning-rate=1e-4", "preparation.task=a=b", 'sampling.generator=["x"]']
    assert settings_by_step("adapt", words) == {
        "finetuning": {"epochs": 2, "learning_rate": 1e-4},
        "preparation": {"task": "a=b"},
        "sampling": {"generator": ["x"]},
    }


def test_adapt_ends_with_the_cautions_of_its_steps(make_outcome: Callable[..., RunOutcome], tmp_path: Path) -> None:
    """D8, C10, C11: in the table's lines and in the JSON."""
    outcome = make_outcome("hold")
    counts: dict[str, dict[str, float]] = {
        "sampling": {"sampled": 320, "truncated": 32},
        "annotation": {"instances": 40, "responses": 320, "with_reasoning": 8, "partly_invisible_to_rougeL": 2},
    }
    folders = {}
    for step, metrics in counts.items():
        folders[step] = tmp_path / step
        folders[step].mkdir()
        config = {"decodings": [{"max_new_tokens": 64}]}
        write_manifest(folders[step], Manifest(step=step, files=(), config=config, metrics=metrics))
    assert "cautions" not in facts(outcome)
    outcome = replace(outcome, outputs={**folders, **outcome.outputs})
    result = facts(outcome)
    cut, reasoning, partly = result["cautions"]
    assert_names(cut, "32 of 320 responses", "10.0 %", "64 new tokens", "--max-new-tokens 512")
    assert_names(reasoning, "8 of 320 (2.5 %)", "reasoning")
    assert_names(partly, "2 of 40 (5.0 %)", "Rouge-L", "ignores")
    assert [line for line in describe(outcome, result).splitlines() if line.startswith("caution")] == [
        f"caution   {text}" for text in (cut, reasoning, partly)
    ]


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("epochs=2", ("'epochs=2'", "STEP.SETTING=VALUE")),
        ("finetuning.epochs", ("'finetuning.epochs'", "STEP.SETTING=VALUE")),
        ("finetuning.=1", ("'finetuning.=1'", "STEP.SETTING=VALUE")),
        ("pretraining.epochs=2", ("adapt", "'pretraining'", "preparation, sampling,")),
    ],
)
def test_a_setting_that_names_no_step_is_wrong_usage(word: str, names: tuple[str, ...]) -> None:
    with raises_naming(typer.BadParameter, *names):
        settings_by_step("adapt", [word])


def test_an_unknown_setting_is_refused_before_anything_runs(here: Cappy, tmp_path: Path) -> None:
    write(tmp_path / "records", instances())
    done = here("adapt", "--instances", "records", "--set", "annotation.colour=red")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert_names(done.stderr, "cappy adapt: annotation: --colour", "`cappy annotation --help`")


def test_a_setting_that_the_pipeline_fills_is_refused_before_anything_runs(here: Cappy, tmp_path: Path) -> None:
    write(tmp_path / "records", instances())
    done = here("adapt", "--instances", "records", "--set", "annotation.target=mine")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert_names(done.stderr, "cappy adapt: annotation: --target", "leave it out")


def test_compile_writes_the_yaml_to_a_file_or_prints_it(here: Cappy, tmp_path: Path) -> None:
    printed = here("pipeline", "compile", "adapt")
    assert "# Name: cappy-adapt" in printed.stdout
    written = here("pipeline", "compile", "adapt", "--target", "adapt.yaml")
    assert_names(written.stdout, "adapt.yaml", "local")
    assert (tmp_path / "adapt.yaml").read_text() == printed.stdout
    missing = here("pipeline", "compile", "adapt", "--target", "absent/adapt.yaml")
    assert_names(missing.stderr, "cappy pipeline: absent/adapt.yaml: ", "No such file")
    assert here("pipeline", "compile", "adopt").returncode == 2


@pytest.mark.parametrize(
    ("step", "result", "lines"),
    [
        (
            "registration",
            {"uri": "models:/cappy/3", "alias": "challenger"},
            ["version   models:/cappy/3, alias challenger"],
        ),
        (
            "promotion",
            {"decision": "hold", "reasons": ["Not shown."], "serve": "cappy serve --scorer x"},
            [
                "decision  hold: the version stays challenger\n          Not shown.",
                "serve it  cappy serve --scorer x",
            ],
        ),
        ("deployment", {"uri": "models:/cappy/3", "command": "do"}, ["version   models:/cappy/3", "next      do"]),
        ("annotation", {}, []),
    ],
)
def test_a_step_says_what_came_of_it(step: str, result: dict[str, Any], lines: list[str]) -> None:
    assert describe_step(Manifest(step=step, files=(), facts=result), Path("target")) == lines


def test_folds_reach_the_evaluation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[Mapping[str, Any]] = []
    monkeypatch.setattr("cappy.cli.pipeline.run_and_print", lambda recipe, *rest: given.append(recipe.settings))
    adapt(folds=5, setting=["evaluation.probe=false"])
    assert given[0]["evaluation"] == {"probe": False, "folds": 5}
    adapt()
    assert "evaluation" not in given[1]
