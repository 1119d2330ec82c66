"""`cappy adapt` and `cappy pipeline`: what is asked of the pipelines, and what is told of their outcome."""

import json
import random
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from chat_server import Model, serving
from wording import assert_names, raises_naming

from cappy.builtin import LLM_FOLDER
from cappy.cli.adapt import SAMPLING_FLAGS, AdaptConfig, adapt, generators_for
from cappy.cli.outcome import describe, describe_step, facts
from cappy.cli.pipeline import PIPELINE_NAMES, settings_by_step
from cappy.cli.steps import summary
from cappy.config import build, flag, to_values
from cappy.errors import ConfigError
from cappy.evaluation import evaluate
from cappy.evaluation.findings import OUT_OF_FOLD
from cappy.records import Candidate, Instance, Manifest, write
from cappy.records.folder import describe_files, write_manifest
from cappy.registry.models import EVALUATION_TAGS, Version
from cappy.runs import StepRecord
from cappy.sampling.step import SamplingConfig
from cappy.scorers import scorer_folder
from cappy.training.meter import estimate_seconds
from pipelines.definitions import PIPELINES
from pipelines.local import RunOutcome
from pipelines.planning import configs_of
from pipelines.preview import describe_seconds, measured_seconds
from pipelines.recipe import check_recipe

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
    monkeypatch.setattr("cappy.cli.pipeline.run_and_print", lambda recipe, *_, **__: given.append(recipe.settings))
    adapt(folds=5, setting=["evaluation.probe=false"])
    assert given[0]["evaluation"] == {"probe": False, "folds": 5}
    assert given[0]["preparation"] == {"test": 0.0}, "the scorer is trained on all but a held-out share"
    adapt(folds=5, setting=["preparation.test=0.3"])
    assert given[1]["preparation"] == {"test": 0.3}
    adapt()
    assert "evaluation" not in given[2]


def own_rows(path: Path, count: int, **fields: object) -> str:
    """A file of a user's own instances with two responses each."""
    rows = [
        {
            "instruction": f"Say {index}.",
            "references": [f"say {index}"],
            "candidates": [{"text": f"say {index}"}, {"text": "no"}],
            **fields,
        }
        for index in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize(
    ("count", "values", "fields", "folds", "text"),
    [
        (150, {}, {}, 5, "150 groups, of which a test split would have 30; 5 folds test on all of them"),
        (150, {"folds": 0}, {}, None, ""),
        (150, {"cross_fitting_minutes": 0.0}, {}, None, "over the limit of 0 min: --cross-fitting-minutes or --folds"),
        (150, {"scorer": "models:/mine@champion"}, {}, None, "not known before models:/mine@champion is downloaded"),
        (500, {"scorer": "models:/mine@champion"}, {}, None, ""),
        (150, {"setting": ["preparation.test=0.1"]}, {}, None, ""),
        (150, {"setting": ["evaluation.split=validation"]}, {}, None, ""),
        (150, {}, {"split": "train"}, None, ""),
        (500, {}, {}, None, ""),
        (4, {}, {}, None, ""),
    ],
)
def test_cross_fitting_is_chosen_where_a_test_split_would_be_small_and_there_is_time(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    count: int,
    values: dict[str, Any],
    fields: dict[str, object],
    folds: int | None,
    text: str,
) -> None:
    given: list[Mapping[str, Any]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cappy.cli.pipeline.run_and_print", lambda recipe, *_, **__: given.append(recipe.settings))
    adapt(instances=own_rows(tmp_path / "own.jsonl", count, **fields), work=tmp_path / "work", **values)
    assert given[0].get("evaluation", {}).get("folds") == folds
    assert (given[0].get("preparation", {}).get("test") == 0.0) is (folds is not None)
    printed = capsys.readouterr().err
    assert text in printed
    assert bool(printed) is bool(text)
    assert printed.count("\n") == bool(text)


def test_the_estimate_counts_the_samples_of_every_llm_and_the_responses_in_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pairs: list[float] = []

    def estimate(folder: Path, count: float, mean_tokens: float) -> float:
        pairs.append(count)
        return 1.0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cappy.cli.pipeline.run_and_print", lambda *_, **__: None)
    monkeypatch.setattr("cappy.training.meter.estimate_seconds", estimate)
    source = own_rows(tmp_path / "own.jsonl", 150)
    for generator in ((), ("builtin",), ("builtin", str(LLM_FOLDER))):
        work = tmp_path / str(len(generator))
        adapt(instances=source, work=work, generator=generator, strategy="greedy+topp0.9x4")
    # Each row has a reference and two responses, and five samples from each LLM.
    assert [count / pairs[0] for count in pairs] == pytest.approx([1, 8 / 3, 13 / 3])


def test_a_rerun_decides_the_same_even_if_the_machine_is_slower_then(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[Mapping[str, Any]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cappy.cli.pipeline.run_and_print", lambda recipe, *_, **__: given.append(recipe.settings))
    source, work = own_rows(tmp_path / "own.jsonl", 150), tmp_path / "work"
    for seconds in (60.0, 1e6):
        monkeypatch.setattr("cappy.training.meter.estimate_seconds", lambda *_: seconds)  # noqa: B023
        adapt(instances=source, work=work)
    assert [settings["evaluation"]["folds"] for settings in given] == [5, 5]
    adapt(instances=own_rows(tmp_path / "own.jsonl", 151), work=work)
    assert "evaluation" not in given[2], "other instances are estimated anew"


@pytest.mark.parametrize("tags", [{}, {EVALUATION_TAGS[OUT_OF_FOLD]: "0" * 64}])
def test_where_the_champion_was_not_cross_fitted_a_report_must_be_on_a_test_split_to_compare(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tags: dict[str, str]
) -> None:
    given: list[Mapping[str, Any]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cappy.cli.pipeline.run_and_print", lambda recipe, *_, **__: given.append(recipe.settings))
    version = Version(name="cappy", number=1, source="s", tags=tags)
    monkeypatch.setattr("cappy.registry.champion", lambda name, tracking_uri: version)
    monkeypatch.setattr("cappy.registry.models.no_database_yet", lambda uri: False)
    adapt(instances=own_rows(tmp_path / "own.jsonl", 150), work=tmp_path / "work")
    assert given[0].get("evaluation", {}).get("folds") == (5 if tags else None)


def test_the_estimated_time_of_training_grows_with_pairs_and_tokens() -> None:
    folder = scorer_folder("builtin:tiny")
    once, twice = estimate_seconds(folder, 1000, 60), estimate_seconds(folder, 4000, 60)
    assert 2 < twice / once < 8, "the rate is measured each time"
    assert estimate_seconds(folder, 1000, 240) > 2 * once > 0


def test_flags_of_what_requests_may_cost_reach_sampling_and_only_if_they_are_passed(
    here: Cappy, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Mapping[str, Any]] = []
    monkeypatch.setattr("cappy.cli.pipeline.run_and_print", lambda recipe, *_, **__: given.append(recipe.settings))
    flags = "--concurrency 3 --max-total-cost 2.5 --price-input 1 --price-output 2 --max-total-requests 9".split()
    assert here("adapt", *flags, "--max-total-tokens", "99", "--set", "sampling.timeout=5").returncode == 0
    assert here("adapt").returncode == 0
    assert given[0]["sampling"] == {
        "concurrency": 3,
        "max_total_cost": 2.5,
        "price_input": 1.0,
        "price_output": 2.0,
        "max_total_requests": 9,
        "max_total_tokens": 99,
        "timeout": 5,
    }
    assert not given[1].get("sampling")


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--concurrency", "8", "--set", "sampling.concurrency=4"], ("--concurrency", "sampling.concurrency")),
        (["--columns", "id=a", "--set", 'preparation.columns=["id=b"]'], ("--columns", "preparation.columns")),
    ],
)
def test_a_setting_that_is_passed_twice_is_refused(here: Cappy, tmp_path: Path, flags: list[str], names: Any) -> None:
    write(tmp_path / "records", instances())
    done = here("adapt", "--instances", "records", *flags)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert_names(done.stderr, *names, "leave one of them out")


def test_the_flags_of_the_budget_are_those_of_sampling_in_both_helps(
    here: Cappy, flag_rows: Callable[[str], dict[str, str]]
) -> None:
    for help_flag, shown in (("--help", 4), ("--help-all", 6)):
        ours, others = (flag_rows(here(verb, help_flag).stdout) for verb in ("adapt", "sampling"))
        common = [name for name in map(flag, SAMPLING_FLAGS) if name in others]
        assert len(common) == shown
        assert {name: ours.get(name) for name in common} == {name: others[name] for name in common}


def test_an_estimate_knows_cached_answers_and_sends_and_writes_nothing(here: Cappy, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"instruction": f"prompt {index}", "reference": "x"} for index in range(60)]
    rows += [{"instruction": "choose", "reference": "x", "choices": ["x", "y"]}]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = Model()
    with serving(model) as url:
        words = ["adapt", "--instances", "tasks.jsonl", "--generator", f"openai:m@{url}", "--estimate"]
        printed = here(*words, "--price-output", "2")
        values = json.loads(here(*words, "--json").stdout)
        assert model.asked == []
        assert [path.name for path in tmp_path.iterdir()] == ["tasks.jsonl"]
        write(tmp_path / "in", [Instance(instance_id="1", instruction="prompt 7", references=("x",))])
        assert here("sampling", "--source", "in", "--target", "out", "--generator", f"openai:m@{url}").returncode == 0
        after = json.loads(here(*words, "--json").stdout)
    lines = {line.split()[0]: line for line in printed.stdout.splitlines()}
    assert_names(lines["requests"], "480", "180")
    assert lines["cost"].split() == ["cost", "0.49"]
    assert_names(printed.stdout, "finetuning", "not estimated")
    assert (values["sampling"][0]["requests"], values["seconds"]) == (480, {})
    assert (after["sampling"][0]["requests"], after["sampling"][0]["answered"]) == (472, 8)


def test_an_estimate_of_a_source_that_is_not_here_says_so(here: Cappy) -> None:
    words = ["adapt", "--generator", "openai:m@http://h/v1", "--estimate", "--instances"]
    done = here(*words, f"hub:org/name@{'a' * 40}")
    assert done.returncode == 0
    assert_names(done.stdout, "sampling: not estimated", "cappy sampling --estimate")


def test_several_problems_are_one_line_each_and_nothing_is_written(here: Cappy, tmp_path: Path) -> None:
    write(tmp_path / "records", instances())
    flags = ["--instances", "records", "--set", "annotation.colour=red", "--set", "finetuning.epoch=2"]
    done = here("adapt", *flags, "--scorer", "nowhere")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["cappy adapt"] * 3
    for line, names in zip(lines, (("--colour",), ("--epoch", "epochs"), ("--scorer", "nowhere")), strict=True):
        assert_names(line, *names)
    assert [path.name for path in tmp_path.iterdir()] == ["records"]
    no_checks = here("adapt", *flags, "--no-checks", "--estimate")
    assert no_checks.returncode == 2
    assert_names(no_checks.stderr, "--no-checks")


def test_the_time_of_other_steps_is_that_of_an_earlier_run_with_equal_settings(tmp_path: Path) -> None:
    recipe = check_recipe({"pipeline": "adapt", "work": str(tmp_path)})
    configs = configs_of(recipe)
    (tmp_path / "records").mkdir()
    for step, seconds, metrics in (("annotation", 2.0, {"instances": 20.0}), ("finetuning", 40.0, {})):
        record = StepRecord(
            step=step,
            fingerprint=step,
            run="adapt-1",
            status="done",
            started=1.0,
            seconds=seconds,
            config=to_values(configs[step]),
            target="made",
            metrics=metrics,
        )
        (tmp_path / "records" / f"{step}.json").write_text(json.dumps(asdict(record)))
    (tmp_path / "records" / "damaged.json").write_text("{")
    assert measured_seconds(configs, tmp_path, 60) == {"annotation": 6.0, "finetuning": 120.0}
    lines = describe_seconds(recipe.steps, measured_seconds(configs, tmp_path, 60))
    assert_names("\n".join(lines), "finetuning   about 2 min 00 s", "evaluation: not estimated")
    other = configs_of(replace(recipe, settings={"finetuning": {"epochs": 7}}))
    assert measured_seconds(other, tmp_path, 60) == {"annotation": 6.0}
