"""What Vertex AI's variables make of `cappy serve`."""

import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import httpx
import pytest
from fastapi.testclient import TestClient
from processes import free_port, running, wait_for
from wording import raises_naming

from cappy.builtin import TINY_SCORER_FOLDER
from cappy.cli import main
from cappy.errors import ConfigError, FolderError
from cappy.scoring import Scorer
from serving.app import Options
from serving.config import Environment, ServeConfig, read_environment
from serving.server import local_scorer

Serve = Callable[..., TestClient]
ROOT = Path(__file__).parents[2]
PLACE = "/v1/endpoints/1/deployedModels/2"
PAIRS = [["Sort: pear fig", "fig pear"], ["Sort: pear fig", "pear fig"]]


def test_without_the_variables_the_usual_is_served() -> None:
    empty = {"AIP_HTTP_PORT": "", "AIP_PREDICT_ROUTE": "", "AIP_STORAGE_URI": "", "CAPPY_ALLOWED_HOSTS": ""}
    assert read_environment({}) == Environment() == read_environment(empty)
    config = ServeConfig()
    assert (config.scorer, config.host, config.port) == ("models:/cappy@champion", "127.0.0.1", 8080)


def test_the_variables_say_where_the_model_lies_and_where_to_answer() -> None:
    result = read_environment(
        {
            "AIP_STORAGE_URI": "gs://bucket/models/7/",
            "AIP_HTTP_PORT": "9000",
            "AIP_PREDICT_ROUTE": f"{PLACE}:predict",
            "AIP_HEALTH_ROUTE": PLACE,
        }
    )
    assert result == Environment(
        settings={"scorer": "gs://bucket/models/7", "host": "0.0.0.0", "port": 9000, "allowed_hosts": ("*",)},
        routes={f"{PLACE}:predict": "vertex"},
        ready_path=PLACE,
    )
    named = read_environment({"AIP_HTTP_PORT": "9000", "CAPPY_ALLOWED_HOSTS": "a.example"})
    assert named.settings["allowed_hosts"] == ("a.example",)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AIP_HTTP_PORT", "http"),
        ("AIP_HTTP_PORT", "65536"),
        ("AIP_HTTP_PORT", "²"),
        ("AIP_PREDICT_ROUTE", "predict"),
        ("AIP_HEALTH_ROUTE", "/{health}"),
    ],
)
def test_a_variable_that_holds_nonsense_is_named(name: str, value: str) -> None:
    with raises_naming(ConfigError, f"{name}: '{value}'"):
        read_environment({name: value})


@pytest.mark.parametrize("route", [f"{PLACE}:predict", "/predict", "/score", "/rerank"])
def test_predictions_are_had_at_the_route_whatever_else_is_there(serve: Serve, route: str) -> None:
    client = serve(options=Options(routes={route: "vertex"}, ready_path=PLACE))
    answer = client.post(route, json={"instances": [["ab", "x"]]})
    assert answer.json() == {"predictions": [{"score": 2.001}]}
    assert client.get(PLACE).json()["ready"] is True
    assert client.post("/predict", json={"inputs": ["ab", "x"]}).status_code == 200
    assert client.get("/openapi.json").status_code == 200


@pytest.mark.parametrize("path", ["/ready", "/health", "/startup", ""])
def test_a_ready_path_that_is_there_already_stays_what_it_was(serve: Serve, path: str) -> None:
    client = serve(options=Options(ready_path=path))
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json()["ready"] is True


def test_a_buckets_folder_is_copied_whole_and_gone_afterwards() -> None:
    bucket = fsspec.filesystem("memory")
    bucket.pipe({"/models/7/manifest.json": b"{}", "/models/7/deep/weights": b"w", "/models/77/other": b"o"})
    with local_scorer("memory://models/7") as place:
        result = {path.relative_to(place).as_posix() for path in Path(place).rglob("*") if path.is_file()}
        assert result == {"manifest.json", "deep/weights"}
        assert Path(place).name == "7"
    assert not Path(place).exists()
    with local_scorer("builtin:tiny") as place:
        assert place == "builtin:tiny"


def test_a_bucket_that_cannot_be_read_or_holds_no_manifest_is_reported_in_one_line() -> None:
    fsspec.filesystem("memory").pipe({"/models/8/weights": b"w"})
    with (
        raises_naming(FolderError, "'memory://models/8'", "manifest.json"),
        local_scorer("memory://models/8"),
    ):
        pass
    for uri in ("memory://models/none", "nonsense://a/b"):
        with raises_naming(ConfigError, f"'{uri}'", "URI"), local_scorer(uri):
            pass


def test_cappy_serve_without_flags_serves_what_the_variables_say(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    address = f"http://127.0.0.1:{port}"
    variables = {
        "AIP_STORAGE_URI": TINY_SCORER_FOLDER.as_uri(),
        "AIP_HTTP_PORT": str(port),
        "AIP_PREDICT_ROUTE": f"{PLACE}:predict",
        "AIP_HEALTH_ROUTE": PLACE,
        "PYTHONPATH": str(ROOT),
    }
    with running([sys.executable, "-m", "serving"], log, **variables) as process:
        wait_for(f"{address}{PLACE}", process, log)
        answer = httpx.post(f"{address}{PLACE}:predict", json={"instances": PAIRS})
    scores = [prediction["score"] for prediction in answer.json()["predictions"]]
    expected = Scorer.load("builtin:tiny").score([(pair[0], pair[1]) for pair in PAIRS])
    assert scores == pytest.approx(expected, abs=5e-3)


def test_a_flag_goes_before_a_variable(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("AIP_STORAGE_URI", "gs://bucket/a")
    monkeypatch.setenv("AIP_HTTP_PORT", "80")
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--scorer", "no/such/folder", "--port", "0"])
    assert ended.value.code == 1
    assert "no/such/folder: " in capsys.readouterr().err
