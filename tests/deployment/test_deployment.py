"""Deployment: what is registered answers as it was evaluated, or nothing is said to be deployed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from differences import difference
from wording import raises_naming

from cappy.deployment.step import TOLERANCES, DeploymentConfig, run
from cappy.errors import FolderError
from cappy.evaluation.findings import SCHEMA
from cappy.records import Manifest, read_manifest
from cappy.records.folder import describe_files, write_manifest
from cappy.registry.promotion import PromotionConfig
from cappy.registry.promotion import run as promote
from cappy.registry.registration import RegistrationConfig
from cappy.registry.registration import run as register
from cappy.scoring import Scorer

PAIRS = [("who sat on the mat", "the cat"), ("who flew", "a bird"), ("who flew", "the tree is not red")]


@pytest.fixture(scope="module")
def registered(scorer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A real scorer, registered, with the scores that it gave."""
    from cappy.scoring import Scorer

    folder = tmp_path_factory.mktemp("registry")
    places: dict[str, Any] = {"work": folder / "work", "tracking_uri": f"sqlite:///{folder}/mlflow.db"}
    scores = Scorer.load(str(scorer_folder)).score(PAIRS)
    report = folder / "report"
    write_report(report, scorer_folder, [[*pair, score] for pair, score in zip(PAIRS, scores, strict=True)])
    register(RegistrationConfig(scorer=scorer_folder, report=report, target=folder / "version", **places))
    return {"version": folder / "version", "report": report, "models": folder / "models", **places}


def write_report(folder: Path, scorer: Path, probes: list[list[object]]) -> None:
    folder.mkdir()
    values = {
        "schema": SCHEMA,
        "comparisons": {"selector-random": difference(0.1)},
        "facts": {"groups": 100},
        "tested_groups": "00000001",
        "versions": {"challenger": read_manifest(scorer).hash[:12]},
    }
    (folder / "report.json").write_text(json.dumps(values))
    (folder / "probe.json").write_text(json.dumps(probes))
    write_manifest(folder, Manifest(step="evaluation", files=describe_files(folder)))


def test_a_version_that_answers_the_stored_pairs_gets_the_command_that_serves_it(
    registered: dict[str, Any], tmp_path: Path
) -> None:
    run(DeploymentConfig(target=tmp_path / "challenger", **registered))
    actual = json.loads((tmp_path / "challenger" / "endpoint.json").read_text())
    assert actual["uri"] == "models:/cappy/1"
    assert actual["command"] == "cappy serve --scorer models:/cappy@challenger --port 8080"
    assert actual["verified_pairs"] == 3
    assert actual["max_difference"] <= 1e-4
    given = {key: registered[key] for key in ("version", "report", "work", "tracking_uri")}
    promote(PromotionConfig(target=tmp_path / "decision", **given))
    facts = run(DeploymentConfig(target=tmp_path / "champion", port=9000, **registered)).facts
    assert facts["command"] == "cappy serve --scorer models:/cappy@champion --port 9000"


def test_a_report_on_another_scorer_is_refused_before_anything_is_scored(
    registered: dict[str, Any], make_scorer: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_scorer(head="mse")
    Scorer.load(str(other), precision="fp32").save(tmp_path / "other")
    write_report(tmp_path / "report", tmp_path / "other", [["a", "b", 0.5]])
    with raises_naming(FolderError, "another scorer", "models:/cappy/1", read_manifest(tmp_path / "other").hash[:12]):
        run(DeploymentConfig(target=tmp_path / "endpoint", **(registered | {"report": tmp_path / "report"})))


def test_a_version_that_answers_otherwise_is_refused(
    registered: dict[str, Any], scorer_folder: Path, tmp_path: Path
) -> None:
    stored = json.loads((registered["report"] / "probe.json").read_text())
    stored[1][2] += 1.1 * TOLERANCES[Scorer.load(str(scorer_folder)).precision]
    write_report(tmp_path / "report", scorer_folder, stored)
    with raises_naming(FolderError, "models:/cappy/1", "differ", "0.0"):
        run(DeploymentConfig(target=tmp_path / "endpoint", **(registered | {"report": tmp_path / "report"})))
    assert not (tmp_path / "endpoint" / "manifest.json").exists()


def test_a_report_without_stored_pairs_is_refused(
    registered: dict[str, Any], scorer_folder: Path, tmp_path: Path
) -> None:
    write_report(tmp_path / "report", scorer_folder, [])
    with raises_naming(FolderError, "probe.json", "evaluate again"):
        run(DeploymentConfig(target=tmp_path / "endpoint", **(registered | {"report": tmp_path / "report"})))


def test_mlflows_own_loader_scores_as_we_do(registered: dict[str, Any], make_scorer: Callable[..., Path]) -> None:
    import warnings

    import pandas  # type: ignore[import-untyped]

    from cappy.registry import resolve
    from cappy.scoring import Scorer

    source = resolve("models:/cappy/1", tracking_uri=registered["tracking_uri"]).source
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow.pyfunc

        model = mlflow.pyfunc.load_model(source)
    answers = model.predict(pandas.DataFrame(PAIRS, columns=["instruction", "response"]))
    folder = Path(source.removeprefix("file://")) / "artifacts" / "scorer"
    assert answers == pytest.approx(Scorer.load(str(folder)).score(PAIRS), abs=1e-6)
