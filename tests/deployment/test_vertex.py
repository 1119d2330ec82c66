"""Vertex AI, against a server that parses what the SDK sends into the SDK's own messages.

It shows what is asked of Vertex AI and in which order, not that Google grants it: no request ever left this machine.
"""

from pathlib import Path
from typing import Any

import pytest
from google.api_core.exceptions import GoogleAPIError, RetryError
from vertex_scenario import IMAGE, connect, deployment_facts, life, settings, version
from vertex_server import vertex_server
from wording import raises_naming

from cappy.config import build
from cappy.deployment import vertex
from cappy.deployment.step import DeploymentConfig
from cappy.errors import ConfigError

# The SDK warns of its own protobuf and of REST being in preview.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def scorer(tmp_path: Path) -> Path:
    folder = tmp_path / "scorer"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    return folder


def test_a_first_version_a_canary_and_the_whole_traffic(scorer: Path) -> None:
    result = life(scorer)
    first, canary, again, whole, back = result["steps"]
    assert first["shares"] == {"cappy-1": 100}
    assert canary["shares"] == again["shares"] == {"cappy-1": 80, "cappy-2": 20}
    assert whole["shares"] == {"cappy-2": 100}
    assert whole["undeployed"] == ["cappy-1"]
    assert back["shares"] == {"cappy-1": 50, "cappy-2": 50}
    assert result["models"] == 2, "a version that was uploaded once is found again"
    assert result["changes"] == [
        "models:upload",
        "endpoints",
        "2000:deployModel",
        "models:upload",
        "2000:deployModel",
        "2000",
        "2000:undeployModel",
        "2000:deployModel",
    ]


def test_the_model_has_our_image_its_routes_and_the_verified_files(scorer: Path) -> None:
    result = life(scorer)
    container = result["model"]["containerSpec"]
    assert container["imageUri"] == IMAGE
    assert (container["predictRoute"], container["healthRoute"]) == ("/predict", "/ready")
    assert {"name": "MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "value": "false"} in container["env"]
    assert result["objects"] == ["config.json", "model.safetensors"]
    assert result["model"]["artifactUri"].startswith("gs://bucket/")
    assert result["dedicated"] is True
    assert result["resources"]["machineSpec"]["machineType"] == "g2-standard-8"
    assert result["resources"]["machineSpec"]["acceleratorCount"] == 1


@pytest.mark.parametrize(
    ("present", "share", "expected"),
    [
        ({}, 20, {"0": 100}),
        ({"a": 100}, 100, {"0": 100}),
        ({"a": 100, "b": 0}, 20, {"0": 20, "a": 80}),
        ({"a": 80, "b": 20}, 50, {"0": 50, "a": 40, "b": 10}),
        ({"a": 33, "b": 33, "c": 34}, 1, {"0": 1, "a": 32, "b": 32, "c": 35}),
    ],
)
def test_the_rest_of_the_traffic_is_shared_as_it_was(
    present: dict[str, int], share: int, expected: dict[str, int]
) -> None:
    result = vertex.split_traffic(present, share)
    assert result == expected
    assert sum(result.values()) == 100


def test_a_refusal_is_one_line_and_the_same_command_goes_on(scorer: Path) -> None:
    with vertex_server() as server:
        connect(server)
        server.refuse = (429, "Quota exceeded for aiplatform.googleapis.com/custom_model_serving_nvidia_l4_gpus")
        with raises_naming(ConfigError, "my-project", "Quota exceeded", "same command") as caught:
            vertex.deploy(settings(), version(1), scorer)
        assert "\n" not in str(caught.value)
        server.refuse = None
        assert deployment_facts(server, scorer, 1)["shares"] == {"cappy-1": 100}


def test_what_the_sdk_itself_refuses_is_one_line_too(scorer: Path) -> None:
    with vertex_server() as server:
        connect(server)
        with raises_naming(ConfigError, "nowhere", "setting"):
            vertex.deploy(
                settings(vertex={"project": "my-project", "bucket": "gs://bucket", "region": "nowhere"}),
                version(1),
                scorer,
            )


@pytest.mark.parametrize(
    ("raised", "named"),
    [
        (RetryError("Timeout of 120.0s exceeded", ConnectionError("reset\nby peer")), ("120.0s", "reset by peer")),
        (GoogleAPIError("what came is\nnot JSON"), ("what came is not JSON",)),
    ],
)
def test_a_service_that_gives_no_answer_is_one_line_and_the_same_command_goes_on(
    scorer: Path, monkeypatch: pytest.MonkeyPatch, raised: GoogleAPIError, named: tuple[str, ...]
) -> None:
    def silent(*given: Any, **named: Any) -> Any:
        raise raised

    with vertex_server() as server:
        connect(server)
        with monkeypatch.context() as away:
            away.setattr("google.cloud.aiplatform.Model.upload", silent)
            with raises_naming(ConfigError, "my-project", *named, "same command") as caught:
                vertex.deploy(settings(), version(1), scorer)
        assert "\n" not in str(caught.value)
        assert deployment_facts(server, scorer, 1)["shares"] == {"cappy-1": 100}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"image": "registry.example/cappy:latest"}, "the digest"),
        ({"vertex": {"bucket": "gs://bucket"}}, "needs --vertex.project and --vertex.bucket"),
        ({"vertex": {"project": "p", "bucket": "s3://bucket"}}, "needs --vertex.project and --vertex.bucket"),
        ({"kserve": {"gpus": 1}}, "--kserve.gpus: .* --platform kserve"),
        ({"gpus": 1}, "--gpus is now --kserve.gpus"),
        ({"machine": "n1"}, "--machine is now --vertex.machine"),
        ({"min_replicas": 4, "max_replicas": 2}, "below min-replicas"),
        ({"traffic": 0}, "traffic"),
        ({"service": "My Service"}, "service"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_asked(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(**changed)


def test_a_local_deployment_needs_none_of_it() -> None:
    assert build(DeploymentConfig, {"version": "v", "report": "r", "target": "t"}).platform == "local"
