"""A registry of its own for every test, and scorers and reports small enough to write on the spot."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from differences import difference

from cappy.evaluation.findings import SCHEMA
from cappy.records import Manifest
from cappy.records.folder import describe_files, write_manifest


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once: it takes seconds."""
    from cappy.registry.client import connect

    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    with connect(f"sqlite:///{path}"):
        return path


@dataclass(frozen=True)
class RegistryEnv:
    """A folder with an MLflow database, and what a test writes into it."""

    folder: Path
    uri: str

    def scorer(self, name: str, value: float = 0.0) -> Path:
        """A folder that has a scorer's files (its weights are four numbers)."""
        import numpy as np
        from safetensors.numpy import save_file

        folder = self.folder / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        save_file({"weight": np.full(4, value, dtype=np.float32)}, folder / "model.safetensors")
        write_manifest(folder, Manifest(step="finetuning", files=describe_files(folder)))
        return folder

    def report(self, name: str, scorer: Path, champion: Path | None = None, **changes: Any) -> Path:
        """The folder of an evaluation that found the scorer better than everything by 19 to 21."""
        folder = self.folder / name
        folder.mkdir()
        result = difference(0.19, 0.2)
        others = ("random", "likelihood", "mbr") if champion is None else ("random", "likelihood", "mbr", "champion")
        values: dict[str, Any] = {
            "schema": SCHEMA,
            "verdict": ["The scorer beats random choice."],
            "metric": "rougeL",
            "split": "test",
            "facts": {"instances": 240, "groups": 100},
            "tested_groups": "0000000100000002",
            "selectors": {"selector": {"estimate": {"mean": 0.5, "low": 0.4, "high": 0.6}}},
            "comparisons": {f"selector-{other}": result for other in others},
            "leaks": {"challenger": 0},
            "versions": {"challenger": version_of(scorer), **({"champion": version_of(champion)} if champion else {})},
        }
        (folder / "report.json").write_text(json.dumps(values | changes))
        write_manifest(folder, Manifest(step="evaluation", files=describe_files(folder)))
        return folder

    def register(self, scorer: Path, report: Path, **changes: Any) -> Mapping[str, Any]:
        """What registration says of a scorer."""
        from cappy.registry.registration import RegistrationConfig, run

        values = {"tracking_uri": self.uri, "work": self.folder / "work", "target": self._target("version"), **changes}
        return run(RegistrationConfig(scorer=scorer, report=report, **values)).facts

    def promote(self, report: Path, **changes: Any) -> Mapping[str, Any]:
        """What the gate says of the scorer registered last."""
        from cappy.registry.promotion import PromotionConfig, run

        values = {"tracking_uri": self.uri, "work": self.folder / "work", "target": self._target("decision"), **changes}
        newest = max(self.folder.glob("version-*"), key=lambda path: int(path.name.partition("-")[2]))
        return run(PromotionConfig(version=newest, report=report, **values)).facts

    def _target(self, kind: str) -> Path:
        return self.folder / f"{kind}-{len(list(self.folder.glob(f'{kind}-*')))}"


def version_of(scorer: Path) -> str:
    from cappy.records import read_manifest

    return read_manifest(scorer).hash[:12]


@pytest.fixture
def env(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> RegistryEnv:
    """An empty registry in a folder of its own, which is also the current folder."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    return RegistryEnv(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}")


@pytest.fixture
def registered(env: RegistryEnv) -> Callable[..., tuple[Path, Path]]:
    """registered("a", 1.0) -> (scorer, report) of a scorer that is registered."""

    def make(name: str, value: float = 0.0, champion: Path | None = None, **changes: Any) -> tuple[Path, Path]:
        scorer = env.scorer(name, value)
        report = env.report(f"report-{name}", scorer, champion, **changes)
        env.register(scorer, report)
        return scorer, report

    return make
