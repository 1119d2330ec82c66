"""Secrets that a step reads itself: into its environment, from the store's own address, and into nothing else."""

import base64
import json
import os
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler
from types import SimpleNamespace
from typing import Any

import google.auth
import pytest
from foreign_server import Foreign, answering, response
from google.auth.credentials import AnonymousCredentials
from local_server import handled_by
from wording import assert_names, raises_naming

from cappy import redaction
from cappy.config import encode
from cappy.errors import ConfigError
from cappy.google_cloud import VARIABLE, fill_environment
from cappy.registry import track_run, tracking
from pipelines.clients import kubeflow

NAME = "projects/p/secrets/llm/versions/3"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A store that knows one secret; credentials are those of nobody."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == f"/v1/{NAME}:access"
            data = base64.b64encode(b"a key").decode()
            payload = json.dumps({"payload": {"data": data}} if known else {"error": {}}).encode()
            self.send_response(200 if known else 403)
            self.send_header("content-length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    monkeypatch.setattr(google.auth, "default", lambda **_: (AnonymousCredentials(), "p"))
    monkeypatch.delenv("LLM_KEY", raising=False)
    with handled_by(Handler) as address:
        yield address


def test_a_named_secret_becomes_a_variable_and_its_name_goes(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, json.dumps({"LLM_KEY": NAME}))
    monkeypatch.setenv("LLM_KEY", "")
    fill_environment(store)
    assert os.environ["LLM_KEY"] == "a key"
    assert VARIABLE not in os.environ


def test_a_secret_that_may_not_be_read_is_one_line(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, json.dumps({"LLM_KEY": NAME.replace("llm", "other")}))
    with raises_naming(ConfigError, "secret 'projects/p/secrets/other/versions/3': ", " 403", "grant"):
        fill_environment(store)


def test_without_credentials_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(**_: Any) -> Any:
        raise google.auth.exceptions.DefaultCredentialsError("none found")

    monkeypatch.setattr(google.auth, "default", nobody)
    monkeypatch.setenv(VARIABLE, json.dumps({"LLM_KEY": NAME}))
    with raises_naming(ConfigError, "Google credentials", "service account"):
        fill_environment()


@pytest.mark.parametrize("broken", ["the service", "the credentials"])
def test_a_store_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    class Refused(AnonymousCredentials):
        def before_request(self, *_: object) -> None:
            raise google.auth.exceptions.RefreshError("no token\nfrom the metadata server")

    credentials = AnonymousCredentials() if broken == "the service" else Refused()
    monkeypatch.setattr(google.auth, "default", lambda **_: (credentials, "p"))
    monkeypatch.setenv(VARIABLE, json.dumps({"LLM_KEY": NAME}))
    with raises_naming(ConfigError, f"secret '{NAME}': ", "Secret Manager", "did not answer") as caught:
        fill_environment("http://127.0.0.1:9")
    assert "\n" not in str(caught.value)


def test_the_exit_step_has_its_secrets_before_it_asks_mlflow(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["Authorization"])
            self.send_error(401)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Quiet."""

    password = {"MLFLOW_TRACKING_USERNAME": NAME, "MLFLOW_TRACKING_PASSWORD": NAME}
    for variable in password:
        monkeypatch.setenv(variable, "")
    monkeypatch.setenv(VARIABLE, json.dumps(password))
    monkeypatch.setattr(tracking, "fill_environment", partial(fill_environment, store))
    with handled_by(Handler) as mlflow, pytest.raises(SystemExit):
        track_run({}, encode({"tracking_uri": mlflow}), run="run-1", state="SUCCEEDED")
    assert asked == [f"Basic {base64.b64encode(b'a key:a key').decode()}"]


def test_an_exit_step_without_its_secret_ends_with_one_line(
    store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, json.dumps({"LLM_KEY": NAME.replace("llm", "other")}))
    monkeypatch.setattr(tracking, "fill_environment", partial(fill_environment, store))
    with pytest.raises(SystemExit):
        track_run({}, "", run="run-1", state="SUCCEEDED")
    actual = capsys.readouterr().err
    assert_names(actual, "cappy tracking: secret 'projects/p/secrets/other/versions/3': ", "403")
    assert actual.count("\n") == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"payload": {}}',
        b'{"payload": {"data": 5}}',
        b'{"payload": {"data": "/w=="}}',
        b"[" * 90_000,
    ],
)
def test_an_answer_without_a_secret_is_one_line(monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    monkeypatch.setattr(google.auth, "default", lambda **_: (AnonymousCredentials(), "p"))
    monkeypatch.setenv(VARIABLE, json.dumps({"LLM_KEY": NAME}))
    with (
        answering(Foreign(parts=[response(body)])) as url,
        raises_naming(ConfigError, f"'{NAME}'", "no text") as caught,
    ):
        fill_environment(url)
    assert "\n" not in str(caught.value)


def test_of_an_endless_answer_little_is_read_and_no_redirect_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(google.auth, "default", lambda **_: (AnonymousCredentials(), "p"))
    for first in (b"HTTP/1.1 200 X\r\n\r\n" + b" " * 30_000_000, response(b"", "Location: /other", status=302)):
        monkeypatch.setenv(VARIABLE, json.dumps({"LLM_KEY": NAME}))
        foreign = Foreign(parts=[first])
        with answering(foreign) as url, raises_naming(ConfigError, f"'{NAME}'", "Secret Manager"):
            fill_environment(url)
        assert len(foreign.seen) == 1


@pytest.mark.parametrize("text", ["[]", '{"a": 1}', "5"])
def test_a_list_of_secrets_that_is_none_is_one_line(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with raises_naming(ConfigError, VARIABLE, "JSON object"):
        fill_environment()


def test_a_secret_that_was_read_stands_in_no_text_whatever_its_variable_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(redaction, "_registered", set())
    monkeypatch.setattr(google.auth, "default", lambda **_: (AnonymousCredentials(), "p"))
    monkeypatch.setenv(VARIABLE, json.dumps({"SOMETHING": NAME}))
    monkeypatch.setenv("SOMETHING", "")
    body = json.dumps({"payload": {"data": base64.b64encode(b"of-the-store").decode()}}).encode()
    with answering(Foreign(parts=[response(body)])) as url:
        fill_environment(url)
    monkeypatch.delenv("SOMETHING")
    assert str(ConfigError("it is of-the-store")) == "it is ***"


def test_what_platforms_say_is_shown_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "key-of-the-llm")
    said = SimpleNamespace(message="the key key-of-the-llm is wrong")
    task = SimpleNamespace(display_name="sampling", error=said, state="FAILED", start_time=None, end_time=None)
    result = kubeflow._task_state(task)
    assert result is not None
    assert result.error == "the key *** is wrong"
