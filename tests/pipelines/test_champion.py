"""The champion that a run compares with is a version, found when the run is submitted."""

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cappy.runs import StepRecord, record_path
from pipelines.definitions import PIPELINES
from pipelines.submission import Submission, prepare


class Registry:
    """A model registry with the versions that a test names, without files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = f"sqlite:///{folder}/mlflow.db"

    def add(self, manifest_hash: str, *, champion: bool = False, former: int = 0) -> None:
        from cappy.registry.client import MlflowException, connect

        with connect(self.uri) as client:
            try:
                client.create_registered_model("cappy")
            except MlflowException as error:
                assert error.error_code == "RESOURCE_ALREADY_EXISTS"  # noqa: PT017 (another one is not a part of the test)
            tags = {"cappy.manifest": manifest_hash, **({"cappy.former": str(former)} if former else {})}
            made = client.create_model_version("cappy", source=self.folder.as_uri(), tags=tags)
            if champion:
                client.set_registered_model_alias("cappy", "champion", made.version)

    def submitted(self, **choices: Any) -> Submission:
        steps = PIPELINES["adapt"].settings({"generator": (), **choices}, tracking_uri=self.uri)
        return prepare("adapt", steps, work=self.folder / "work")

    def finetuned(self, submission: Submission, manifest_hash: str) -> None:
        """Writes what a finetuning under the submission's fingerprint would leave."""
        actual = StepRecord(
            step="finetuning",
            fingerprint=submission.fingerprints["finetuning"],
            run="run-1",
            status="done",
            started=time.time(),
            seconds=1.0,
            config={},
            target="",
            manifest_hash=manifest_hash,
        )
        path = record_path(self.folder / "work", actual.fingerprint)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(actual)))


@pytest.fixture
def registry(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return Registry(tmp_path)


def test_the_champion_is_passed_by_number_and_a_moved_alias_changes_evaluation_alone(registry: Registry) -> None:
    none = registry.submitted()
    assert none.arguments["champion"] == ""
    registry.add("aaaa", champion=True)
    one = registry.submitted()
    assert one.arguments["champion"] == "models:/cappy/1"
    registry.add("bbbb", champion=True)
    two = registry.submitted()
    assert two.arguments["champion"] == "models:/cappy/2"
    steps = PIPELINES["adapt"].steps
    moved = [step for step in steps if one.fingerprints[step] != two.fingerprints[step]]
    assert moved == ["evaluation", "registration", "promotion", "deployment"]


def test_a_champion_that_this_finetuning_made_is_compared_with_its_predecessor(registry: Registry) -> None:
    before = registry.submitted()
    registry.finetuned(before, "bbbb")
    registry.add("bbbb", champion=True)
    assert registry.submitted().fingerprints == before.fingerprints
    registry.add("aaaa", champion=True)
    compared = registry.submitted()
    registry.add("bbbb", champion=True, former=2)
    assert registry.submitted().fingerprints == compared.fingerprints
    assert registry.submitted().arguments["champion"] == "models:/cappy/2"
    assert registry.submitted(seed=8).arguments["champion"] == "models:/cappy/3"


def test_a_scorer_named_by_alias_is_passed_by_number(registry: Registry) -> None:
    registry.add("aaaa", champion=True)
    result = registry.submitted(scorer="models:/cappy@champion")
    assert result.arguments["scorer"] == "models:/cappy/1"
    registry.add("bbbb", champion=True)
    assert (
        registry.submitted(scorer="models:/cappy@champion").fingerprints["finetuning"]
        != result.fingerprints["finetuning"]
    )
