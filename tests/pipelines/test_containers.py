"""A container engine is asked before a run begins: that it is there, and that it has the images."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest
from local_server import handled_by

from cappy.errors import ConfigError
from pipelines import STEPS
from pipelines.containers import check_images
from pipelines.recipe import checked

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
    found = check_images(checked({"pipeline": "adapt", "images": {"worker": HERE, "trainer": HERE}}))
    assert found == dict.fromkeys(STEPS["adapt"], "sha256:1")
    with pytest.raises(
        ConfigError, match=r"mine:2: is not here and cannot be pulled \(.*denied.*\); build it with make"
    ):
        check_images(checked({"pipeline": "adapt", "images": {"worker": HERE, "trainer": "mine:2"}}))
    exit_step = {"resources": {"tracking": {"image": "mine:3"}}}
    with pytest.raises(ConfigError, match=r"mine:3: is not here"):
        check_images(checked({"pipeline": "adapt", "images": {"worker": HERE, "trainer": HERE}, **exit_step}))


def test_no_engine_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"docker: no engine answers .*; start Docker"):
        check_images(checked({"pipeline": "adapt"}))
