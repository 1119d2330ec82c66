"""What is handed to an orchestrator: nothing in it moves, and a fingerprint changes with whatever it points to."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from wording import raises_naming

from cappy.config import decode
from cappy.errors import CappyError, ConfigError
from cappy.records import Instance, write
from pipelines.builder import build
from pipelines.definitions import PIPELINES
from pipelines.recipe import check_recipe
from pipelines.submission import fingerprints, prepare


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A person's instances, in a folder without a registry."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "notes.jsonl"
    path.write_text('{"instruction": "Add 1 and 1.", "references": ["2"], "responses": ["2", "3"]}\n')
    return path


def plan(file: Path, **choices: Any) -> dict[str, dict[str, Any]]:
    settings, uri = choices.pop("settings", {}), choices.pop("tracking_uri", "")
    return PIPELINES["adapt"].settings({"source": str(file), "generator": (), **choices}, settings, uri)


def changed(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    return [step for step in one if one[step] != other[step]]


def test_a_password_for_one_step_alone_is_refused_since_nothing_would_bring_it(file: Path, tmp_path: Path) -> None:
    steps = plan(file, tracking_uri="https://anna:pass-of-one@host")
    steps["promotion"] = {**steps["promotion"], "tracking_uri": "https://anna:pass-of-other@host"}
    with raises_naming(ConfigError, "promotion: --tracking-uri: ", "password"):
        prepare("adapt", steps, work=tmp_path / "work")


def test_one_byte_of_the_input_changes_every_fingerprint(file: Path, tmp_path: Path) -> None:
    before = prepare("adapt", plan(file), work=tmp_path / "work").fingerprints
    assert prepare("adapt", plan(file), work=tmp_path / "work").fingerprints == before
    file.write_text(file.read_text().replace("3", "4"))
    after = prepare("adapt", plan(file), work=tmp_path / "work").fingerprints
    assert changed(before, after) == list(PIPELINES["adapt"].steps)


def test_a_setting_changes_the_fingerprints_of_its_step_and_of_those_after_it(file: Path, tmp_path: Path) -> None:
    before = fingerprints(_with_paths(plan(file), tmp_path))
    more = plan(file, settings={"evaluation": {"folds": 5}})
    after = fingerprints(_with_paths(more, tmp_path))
    assert changed(before, after) == ["evaluation", "registration", "promotion", "deployment"]


def test_where_things_lie_changes_no_fingerprint(file: Path, tmp_path: Path) -> None:
    one = fingerprints(_with_paths(plan(file), tmp_path))
    assert fingerprints(_with_paths(plan(file, tracking_uri="sqlite:///elsewhere.db"), tmp_path / "elsewhere")) == one


def test_a_generator_folder_that_changes_is_sampled_again(file: Path, tmp_path: Path) -> None:
    llm = tmp_path / "llm"
    llm.mkdir()
    (llm / "model.safetensors").write_bytes(b"one")
    for spec in (str(llm), f"vllm:{llm}"):
        before = fingerprints(_with_paths(plan(file, generator=(spec,), strategy="greedy"), tmp_path))
        with (llm / "model.safetensors").open("ab") as weights:
            weights.write(b"two")
        after = fingerprints(_with_paths(plan(file, generator=(spec,), strategy="greedy"), tmp_path))
        assert changed(before, after) == list(PIPELINES["adapt"].steps)[1:]


def test_an_initial_scorer_that_changes_is_evaluated_again(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "initial"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"one")
    settings = {"evaluation": {"initial": str(folder)}}
    before = fingerprints(_with_paths(plan(file, settings=settings), tmp_path))
    (folder / "model.safetensors").write_bytes(b"two")
    after = fingerprints(_with_paths(plan(file, settings=settings), tmp_path))
    assert changed(before, after) == ["evaluation", "registration", "promotion", "deployment"]


def test_recorded_samples_that_change_are_sampled_again(file: Path, tmp_path: Path) -> None:
    samples = tmp_path / "samples.jsonl"
    samples.write_text('{"prompt": "Add 1 and 1.", "response": "2"}\n')
    before = fingerprints(_with_paths(plan(file, generator=(f"recorded:{samples}",)), tmp_path))
    samples.write_text('{"prompt": "Add 1 and 1.", "response": "3"}\n')
    after = fingerprints(_with_paths(plan(file, generator=(f"recorded:{samples}",)), tmp_path))
    assert changed(before, after) == list(PIPELINES["adapt"].steps)[1:]


def test_a_file_of_decodings_that_changes_is_sampled_again(file: Path, tmp_path: Path) -> None:
    decodings = tmp_path / "mine.yaml"
    decodings.write_text("- topk40x4")
    before = fingerprints(_with_paths(plan(file, strategy=str(decodings)), tmp_path))
    decodings.write_text("- topk40x8")
    after = fingerprints(_with_paths(plan(file, strategy=str(decodings)), tmp_path))
    assert changed(before, after) == list(PIPELINES["adapt"].steps)[1:]


def test_another_image_changes_the_fingerprints_of_its_step_and_of_those_after_it(file: Path, tmp_path: Path) -> None:
    one, other = (
        prepare("adapt", plan(file), work=tmp_path, images={"evaluation": f"worker@sha256:{digit * 64}"}).fingerprints
        for digit in "12"
    )
    assert changed(one, other) == ["evaluation", "registration", "promotion", "deployment"]


@pytest.mark.parametrize("name", ["templates", "local", "against"])
def test_a_folder_beside_the_source_that_changes_is_read_again(name: str, file: Path, tmp_path: Path) -> None:
    """As preparation's settings name it: a path alone, or a list of them."""
    folder = tmp_path / "beside"
    folder.mkdir()
    (folder / "data.jsonl").write_text("one")
    places: dict[str, Any] = {"against": [str(folder)], "templates": folder}
    given = places.get(name, str(folder))
    mixture = {"mixture": "t0"} if name == "local" else {}
    own = {"preparation": {name: given, **mixture}}
    source = {"source": "builtin"} if mixture else {}
    before = fingerprints(_with_paths(plan(file, settings=own, **source), tmp_path))
    (folder / "data.jsonl").write_text("two")
    after = fingerprints(_with_paths(plan(file, settings=own, **source), tmp_path))
    assert changed(before, after) == list(PIPELINES["adapt"].steps)


def test_an_edited_part_of_a_folder_of_records_is_refused(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "records"
    write(folder, [Instance(instance_id="1", instruction="Add 1 and 1.", references=("2",))])
    prepare("adapt", plan(folder), work=tmp_path / "work")
    part = next(folder.glob("*.parquet"))
    part.write_bytes(part.read_bytes() + b" ")
    with raises_naming(CappyError, part.name, "damaged"):
        prepare("adapt", plan(folder), work=tmp_path / "work")


def test_a_wrong_setting_is_said_before_anything_runs(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation: --folds: .*20.*, got 50"):
        prepare("adapt", plan(file, settings={"evaluation": {"folds": 50}}), work=tmp_path)
    with raises_naming(ConfigError, "adapt: ", "step pretraining"):
        prepare("adapt", {**plan(file), "pretraining": {}}, work=tmp_path)
    with raises_naming(ConfigError, "adopt", "adapt, pretrain"):
        prepare("adopt", plan(file), work=tmp_path)
    with raises_naming(ConfigError, "--metric", "whole pipeline"):
        prepare("adapt", plan(file, settings={"evaluation": {"metric": "chrf"}}), work=tmp_path)


def test_every_setting_reaches_its_step_as_a_parameter_or_encoded(file: Path, tmp_path: Path) -> None:
    choices = plan(file, name="notes", seed=7, tracking_uri="sqlite:///my.db", settings={"promotion": {"margin": 0.1}})
    result = prepare("adapt", choices, work=tmp_path / "work").arguments
    assert (result["name"], result["training_seed"], result["margin"], result["source"]) == ("notes", 7, 0.1, str(file))
    work = str(tmp_path / "work")
    assert decode(str(result["registration_settings"])) == {"tracking_uri": "sqlite:///my.db", "work": work}
    assert decode(str(result["tracking_settings"])) == {"tracking_uri": "sqlite:///my.db", "work": work}
    assert set(json.loads(str(result["fingerprints"]))) == set(PIPELINES["adapt"].steps)
    known = build(check_recipe({"pipeline": "adapt"})).pipeline_spec.root.input_definitions.parameters
    assert set(result) <= set(known)


def test_pretraining_on_the_builtin_tasks_is_judged_on_validation(tmp_path: Path) -> None:
    steps = PIPELINES["pretrain"].settings({})
    assert steps["preparation"]["pool"] == "pretraining"
    assert steps["evaluation"]["split"] == "validation"
    result = prepare("pretrain", steps, work=tmp_path).arguments
    known = build(check_recipe({"pipeline": "pretrain"})).pipeline_spec.root.input_definitions.parameters
    assert set(result) <= set(known)


def test_a_missing_version_is_said_before_anything_runs(file: Path, tmp_path: Path, empty_database: Path) -> None:
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(CappyError, match="models:/general@champion: "):
        prepare("adapt", plan(file, scorer="models:/general@champion", tracking_uri=uri), work=tmp_path)


def _with_paths(steps: dict[str, dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    return {step: {**values, "work": str(folder / "work")} for step, values in steps.items()}
