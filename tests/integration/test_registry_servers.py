"""The registry's promises over PostgreSQL and buckets of two kinds, through MLflow's own server."""

import json
import os
import shutil
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from differences import difference
from processes import free_port, running, wait_for

from cappy import registry
from cappy.errors import RegistryError
from cappy.evaluation.findings import SCHEMA
from cappy.records import Manifest, read_manifest
from cappy.records.folder import describe_files, verify, write_manifest
from cappy.registry.promotion import PromotionConfig
from cappy.registry.promotion import run as promote
from cappy.registry.registration import RegistrationConfig
from cappy.registry.registration import run as register

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
GAINS = difference(0.19, 0.2)


@pytest.fixture
def uri(mlflow_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in mlflow_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    address: str = mlflow_server.address
    return address


@pytest.fixture
def name(uri: str, request: pytest.FixtureRequest) -> str:
    """A model of the test's own: the servers are shared."""
    return f"cappy-{abs(hash(request.node.nodeid)):x}"


@pytest.fixture
def scorers(scorer_folder: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies of a real, very small scorer, each with a manifest of its own."""

    def make(label: str) -> Path:
        folder = tmp_path / f"scorer-{label}"
        shutil.copytree(scorer_folder, folder)
        (folder / "manifest.json").unlink()
        write_manifest(folder, Manifest(step="finetuning", files=describe_files(folder), facts={"label": label}))
        return folder

    return make


def evaluated(folder: Path, scorer: Path, champion: Path | None = None) -> Path:
    versions = {"challenger": read_manifest(scorer).hash[:12]}
    others = ["random"]
    if champion is not None:
        versions["champion"] = read_manifest(champion).hash[:12]
        others.append("champion")
    folder.mkdir()
    comparisons = {f"selector-{other}": GAINS for other in others}
    values = {
        "schema": SCHEMA,
        "comparisons": comparisons,
        "versions": versions,
        "leaks": {},
        "facts": {"groups": 100},
        "tested_groups": "0" * 8,
    }
    (folder / "report.json").write_text(json.dumps(values))
    write_manifest(folder, Manifest(step="evaluation", files=describe_files(folder)))
    return folder


def registered(uri: str, name: str, scorer: Path, report: Path, target: Path) -> dict[str, Any]:
    config = RegistrationConfig(
        scorer=scorer, report=report, target=target, name=name, tracking_uri=uri, work=target.parent / "work"
    )
    return dict(register(config).facts)


def promoted(uri: str, version: Path, report: Path, target: Path) -> dict[str, Any]:
    work = target.parent / "work"
    config = PromotionConfig(version=version, report=report, target=target, tracking_uri=uri, work=work)
    return dict(promote(config).facts)


def test_a_scorer_goes_in_comes_out_whole_and_its_alias_moves_back(
    uri: str, name: str, scorers: Callable[[str], Path], tmp_path: Path
) -> None:
    one, two = scorers("one"), scorers("two")
    report = evaluated(tmp_path / "report-1", one)
    assert registered(uri, name, one, report, tmp_path / "version-1")["version"] == 1
    assert registered(uri, name, one, report, tmp_path / "version-1b")["version"] == 1
    assert promoted(uri, tmp_path / "version-1", report, tmp_path / "decision-1")["decision"] == "promote"
    later = evaluated(tmp_path / "report-2", two, champion=one)
    registered(uri, name, two, later, tmp_path / "version-2")
    assert promoted(uri, tmp_path / "version-2", later, tmp_path / "decision-2")["decision"] == "promote"
    folder = registry.download(f"models:/{name}@champion", tracking_uri=uri, cache=tmp_path / "models")
    assert verify(folder).hash == read_manifest(two).hash
    assert registry.rollback(name, why="a test", tracking_uri=uri).version == 1
    moves = registry.history(name, tracking_uri=uri)
    assert [(move.kind, move.version, move.former) for move in moves] == [
        ("promotion", 1, 0),
        ("promotion", 2, 1),
        ("rollback", 1, 2),
    ]


def test_a_byte_that_changed_in_the_bucket_is_refused_by_name(
    uri: str, name: str, scorers: Callable[[str], Path], tmp_path: Path, mlflow_server: Any
) -> None:
    scorer, bucket = scorers("one"), mlflow_server.bucket
    registered(uri, name, scorer, evaluated(tmp_path / "report", scorer), tmp_path / "version")
    source = registry.resolve(f"models:/{name}/1", tracking_uri=uri).source
    run = source.split("/artifacts")[0].rsplit("/", 1)[1]
    weights = next(result for result in bucket.names() if run in result and result.endswith(".safetensors"))
    data = bytearray(bucket.read(weights))
    assert data == (scorer / "model.safetensors").read_bytes()
    data[-1] ^= 1
    bucket.write(weights, bytes(data))
    with pytest.raises(RegistryError, match=r"model.safetensors: is damaged"):
        registry.download(f"models:/{name}/1", tracking_uri=uri, cache=tmp_path / "models")


def test_a_registry_that_cannot_be_written_registers_nothing_and_the_same_command_goes_on_later(
    uri: str, name: str, scorers: Callable[[str], Path], tmp_path: Path, mlflow_server: Any
) -> None:
    import sqlalchemy

    engine = sqlalchemy.create_engine(mlflow_server.store, isolation_level="AUTOCOMMIT")

    def read_only(on: bool) -> None:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"ALTER DATABASE {engine.url.database} SET default_transaction_read_only = {on}")
            others = "pid <> pg_backend_pid() AND datname = current_database()"
            connection.exec_driver_sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")

    scorer = scorers("one")
    report = evaluated(tmp_path / "report", scorer)
    read_only(True)
    try:
        with pytest.raises(RegistryError, match="MLflow failed"):
            registered(uri, name, scorer, report, tmp_path / "version")
    finally:
        read_only(False)
        engine.dispose()
    with pytest.raises(RegistryError, match="no such model"):
        registry.resolve(f"models:/{name}/1", tracking_uri=uri)
    assert not (tmp_path / "version" / "manifest.json").exists()
    assert registered(uri, name, scorer, report, tmp_path / "version")["version"] == 1


def test_mlflows_own_model_server_gives_our_scores(
    uri: str, name: str, scorers: Callable[[str], Path], tmp_path: Path, mlflow_server: Any
) -> None:
    from cappy.scoring import Scorer

    scorer = scorers("one")
    registered(uri, name, scorer, evaluated(tmp_path / "report", scorer), tmp_path / "version")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{name}/1", "--env-manager", "local"]
    log = tmp_path / "log"
    # It starts uvicorn by name, as an activated environment has it.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**mlflow_server.environment, "MLFLOW_TRACKING_URI": uri, "PATH": path}
    environment["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    pairs = [("who sat on the mat", "the cat"), ("who flew", "a bird")]
    with running([*command, "-h", "127.0.0.1", "-p", str(port)], log, **environment) as process:
        wait_for(f"http://127.0.0.1:{port}/ping", process, log, seconds=120)
        body = {"dataframe_split": {"columns": ["instruction", "response"], "data": pairs}}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            actual = json.loads(answer.read())["predictions"]
    assert actual == pytest.approx(Scorer.load(str(scorer)).score(pairs), abs=1e-4)


def test_the_database_address_alone_is_a_registry_too(
    database: Callable[[str], str], scorers: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without MLflow's server: the client writes to PostgreSQL itself, artifacts to a folder."""
    monkeypatch.chdir(tmp_path)
    postgresql, scorer = database("direct"), scorers("one")
    result = registered(
        postgresql, "cappy-direct", scorer, evaluated(tmp_path / "report", scorer), tmp_path / "version"
    )
    assert result["version"] == 1
    folder = registry.download("models:/cappy-direct/1", tracking_uri=postgresql, cache=tmp_path / "models")
    assert verify(folder).hash == read_manifest(scorer).hash
