"""What is sent to clouds, held against types that others wrote: KServe's own models, an older Vertex AI SDK."""

import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from manifests import only, rendered
from vertex_scenario import IMAGE, version

from cappy.config import build
from cappy.deployment.kserve import inference_service
from cappy.deployment.step import DeploymentConfig

ROOT = Path(__file__).parents[2]
SERVERS = ROOT / ".venv-servers"


def packages() -> Path:
    result = next(SERVERS.glob("lib/python*/site-packages"), None)
    if result is None:
        pytest.skip("neither KServe's models nor another Vertex AI SDK here; make integration installs them")
    return result


@pytest.fixture(scope="module")
def kserve_models() -> Any:
    """kserve.models, without the server that its package imports."""
    place = packages() / "kserve"
    bare = types.ModuleType("kserve")
    bare.__path__ = [str(place)]
    sys.modules["kserve"] = bare
    yield importlib.import_module("kserve.models")
    for name in [name for name in sys.modules if name.split(".")[0] == "kserve"]:
        del sys.modules[name]


def check(value: Any, kind: str, models: Any, path: str) -> None:
    """Every key must be one that the type knows, at every depth."""
    from kubernetes import client

    if kind.startswith("list["):
        for index, item in enumerate(value):
            check(item, kind[5:-1], models, f"{path}[{index}]")
    elif kind.startswith("dict("):
        for key, item in value.items():
            check(item, kind[5:-1].split(", ", 1)[1], models, f"{path}.{key}")
    elif (made := getattr(models, kind, None) or getattr(client, kind, None)) is not None:
        known = {json_name: made.openapi_types[name] for name, json_name in made.attribute_map.items()}
        assert set(value) <= set(known), f"{path}: {set(value) - set(known)}"
        for key, item in value.items():
            check(item, known[key], models, f"{path}.{key}")
    elif kind in ("str", "int", "bool", "float"):
        types: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "bool": (bool,), "float": (int, float)}
        assert isinstance(value, types[kind]), f"{path}: {value}"


@pytest.mark.parametrize(
    "changed",
    [{}, {"traffic": 10, "kserve": {"gpus": 1, "secret": "login"}}, {"kserve": {"storage": "gs://bucket/a"}}],
)
def test_kserves_own_models_know_every_field_of_our_service(kserve_models: Any, changed: dict[str, Any]) -> None:
    places = {"version": "version", "report": "report", "target": "target", "platform": "kserve", "image": IMAGE}
    config = build(DeploymentConfig, {**places, "tracking_uri": "http://mlflow:5000", **changed})
    service: Any = inference_service(config, version(1))
    check(service, "V1beta1InferenceService", kserve_models, "service")
    service["spec"]["predictor"]["canaryTraffic"] = 10
    with pytest.raises(AssertionError, match="canaryTraffic"):
        check(service, "V1beta1InferenceService", kserve_models, "service")


def test_kserves_own_models_know_every_field_of_the_overlay(kserve_models: Any) -> None:
    check(only(rendered("serving-kserve"), "InferenceService"), "V1beta1InferenceService", kserve_models, "service")


def test_the_vertex_sdk_of_the_first_major_does_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages()
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    python = SERVERS / "bin" / "python"
    wanted = [str(ROOT / "tests" / "fakes" / "vertex_scenario.py"), str(tmp_path)]
    runs = {}
    for name, program in (("first", python), ("second", Path(sys.executable))):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([str(program), *wanted], capture_output=True, text=True, env=environment, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
        runs[name] = json.loads(done.stdout)
        asked = [str(program), "-c", "from google.cloud import aiplatform; print(aiplatform.__version__)"]
        runs[name]["sdk"] = subprocess.run(asked, capture_output=True, text=True, check=True).stdout[0]
    assert (runs["first"].pop("sdk"), runs["second"].pop("sdk")) == ("1", "2")
    for run in runs.values():
        run["model"].pop("artifactUri")  # has the time in it
    assert runs["first"] == runs["second"]
