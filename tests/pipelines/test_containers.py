"""A container engine is asked before a run begins, that it has the images; the keys that containers get."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from local_server import handled_by
from wording import assert_names, raises_naming

from cappy.cli import main
from cappy.config import to_values
from cappy.errors import ConfigError
from pipelines.builder import compile_pipeline as compiled
from pipelines.definitions import PIPELINES
from pipelines.execution import _container_runner
from pipelines.local import KEY_VARIABLES, check_images
from pipelines.recipe import check_recipe

HERE = "registry.example/worker:1"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An engine that has one image and can pull none."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.reply(200, {})

        def do_GET(self) -> None:
            if self.path.endswith("/_ping"):
                self.reply(200, {})
            elif self.path.endswith("/version"):
                self.reply(200, {"ApiVersion": "1.44"})
            elif f"/images/{HERE}/json" in self.path:
                self.reply(200, {"Id": "sha256:1", "RepoTags": [HERE]})
            else:
                self.reply(404, {"message": "No such image"})

        def do_POST(self) -> None:
            self.reply(404, {"message": "pull access denied"})

        def reply(self, status: int, body: dict[str, object]) -> None:
            payload = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(payload)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(payload)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with handled_by(Handler) as address:
        monkeypatch.setenv("DOCKER_HOST", address.replace("http://", "tcp://"))
        yield


def test_an_image_that_is_here_will_do_and_one_that_cannot_be_pulled_is_one_line(engine: None) -> None:
    result = check_images(check_recipe({"pipeline": "adapt", "images": {"worker": HERE, "trainer": HERE}}))
    assert result == dict.fromkeys(PIPELINES["adapt"].steps, "sha256:1")
    with raises_naming(ConfigError, "mine:2: ", "denied", "make"):
        check_images(check_recipe({"pipeline": "adapt", "images": {"worker": HERE, "trainer": "mine:2"}}))
    exit_step = {"resources": {"tracking": {"image": "mine:3"}}}
    with pytest.raises(ConfigError, match="mine:3: "):
        check_images(check_recipe({"pipeline": "adapt", "images": {"worker": HERE, "trainer": HERE}, **exit_step}))


def test_no_engine_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:9")
    with raises_naming(ConfigError, "docker: ", "start Docker"):
        check_images(check_recipe({"pipeline": "adapt"}))


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A folder to stand in, and this machine's keys: in variables, in a file beside the folder and in one inside."""
    inside, outside = tmp_path / "here" / "hub.key", tmp_path / "openai.key"
    inside.parent.mkdir()
    for path in (inside, outside):
        path.write_text("a key")
    monkeypatch.chdir(inside.parent)
    given = {"LLM_KEY": "k-1", "MLFLOW_TRACKING_PASSWORD": "k-2", "HF_TOKEN_FILE": "hub.key"}
    given |= {"OPENAI_API_KEY_FILE": "../openai.key"}
    for name in KEY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in {**given, "AN_OTHER_KEY": "k-3"}.items():
        monkeypatch.setenv(name, value)
    return given


def mine(*variables: str) -> Any:
    secrets = [{"variable": variable, "name": "llm"} for variable in variables]
    return check_recipe({"pipeline": "adapt", "resources": {"sampling": {"secrets": secrets}}})


def test_containers_get_the_keys_that_are_set_here_and_no_other_variable(given: dict[str, str], tmp_path: Path) -> None:
    recipe = mine("LLM_KEY", "OPENAI_API_KEY")
    runner: Any = _container_runner(to_values(recipe), "run-1")
    run_args = runner.container_run_args
    environment = {
        name: value for name, value in run_args["environment"].items() if name not in ("HOME", "CAPPY_PROGRESS")
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    assert environment == given
    mounts = {mount["Target"]: mount["ReadOnly"] for mount in run_args["mounts"]}
    assert mounts == {str(tmp_path / "here"): False, str(tmp_path / "openai.key"): True}
    assert not [key for key in ("k-1", "k-2", "LLM_KEY") if key in compiled(recipe, "docker")]


def test_a_secret_of_the_recipe_that_is_not_set_here_is_one_line(
    given: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(to_values(mine("LLM_KEY", "OPENAI_API_KEY", "SECOND_KEY"))))
    with pytest.raises(SystemExit):
        main(["pipeline", "run", str(file), "--on", "docker"])
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert_names(
        line, "cappy pipeline: resources.sampling.secrets: SECOND_KEY ", "export SECOND_KEY", "SECOND_KEY_FILE"
    )
