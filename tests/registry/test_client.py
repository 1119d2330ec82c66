"""MLflow's database is there whole or not at all."""

import base64
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from local_server import handled_by
from waiting import wait_until
from wording import raises_naming

from cappy import registry
from cappy.errors import RegistryError, UnreachableError
from cappy.registry.client import connect

CONNECT = """
import sys
from cappy.registry.client import connect
with connect(sys.argv[1]):
    pass
"""


def killed_among_the_tables(folder: Path) -> None:
    """Kills a process that has made some of MLflow's tables and not all."""
    with subprocess.Popen([sys.executable, "-c", CONNECT, f"sqlite:///{folder / 'mlflow.db'}"]) as process:
        drafts = [folder / "mlflow.db", folder / ".mlflow.db.new"]
        wait_until(
            lambda: any(path.exists() and path.stat().st_size > 100_000 for path in drafts),
            "some of the tables", pause=0.002, process=process,
        )  # fmt: skip
        process.kill()
    assert process.returncode == -signal.SIGKILL


def test_a_run_killed_while_the_tables_are_made_leaves_nothing_that_the_next_one_refuses(tmp_path: Path) -> None:
    killed_among_the_tables(tmp_path)
    with connect(f"sqlite:///{tmp_path / 'mlflow.db'}") as client:
        assert [result.name for result in client.search_experiments()] == ["Default"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [".mlflow.db.lock", "mlflow.db"]


@pytest.mark.parametrize("start", ["missing", "empty"])
def test_a_missing_and_an_empty_file_become_a_database(tmp_path: Path, start: str) -> None:
    path = tmp_path / "mlflow.db"
    if start == "empty":
        path.touch()
    with connect(f"sqlite:///{path}") as client:
        client.create_experiment("kept")
    with connect(f"sqlite:///{path}") as client:
        assert client.get_experiment_by_name("kept") is not None


@pytest.mark.parametrize("bearer", [False, True])
def test_the_newline_that_echo_puts_behind_a_secret_is_not_sent(monkeypatch: pytest.MonkeyPatch, bearer: bool) -> None:
    asked: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["Authorization"])
            self.send_error(401, "no " + (self.headers["Authorization"] or ""))

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Quiet."""

    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "")
    given = {"TOKEN": "token-1\n"} if bearer else {"USERNAME": "anna\n", "PASSWORD": " password-1\r\n"}
    for name, value in given.items():
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    with handled_by(Handler) as url, pytest.raises(UnreachableError) as error, connect(url):
        pass
    basic = base64.b64encode(b"anna:password-1").decode()
    assert asked[-1] == ("Bearer token-1" if bearer else f"Basic {basic}")
    assert "token-1" not in str(error.value)
    assert basic not in str(error.value)
    assert os.environ["MLFLOW_TRACKING_TOKEN"] in ("", "token-1")


def answering(status: int, body: str, kind: str = "text/html") -> type[BaseHTTPRequestHandler]:
    """A server that gives this answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Quiet."""

    return Handler


@pytest.mark.parametrize(
    ("status", "body", "names"),
    [
        (200, "<html><form>Sign in</form></html>", ("not MLflow", "login page", "MLFLOW_TRACKING_URI")),
        (401, "who are you", ("credentials", "401", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_TOKEN")),
        (403, "<html>Forbidden</html>", ("credentials", "403", "MLFLOW_TRACKING_TOKEN")),
        (404, "<html>Not Found</html>", ("not MLflow", "another path")),
        (502, "<html>Bad Gateway</html>", ("proxy", "502", "start MLflow")),
        (503, "no healthy upstream", ("proxy", "503")),
        (500, '{"error_code": "INTERNAL_ERROR", "message": "disk full"}', ("MLflow failed", "500", "see its log")),
    ],
)
def test_what_answers_instead_of_mlflow_is_one_line_with_the_remedy(
    status: int, body: str, names: tuple[str, ...]
) -> None:
    started = time.monotonic()
    with handled_by(answering(status, body)) as url, raises_naming(UnreachableError, url, *names), connect(url):
        pass
    assert time.monotonic() - started < 10
    with handled_by(answering(status, body)) as url, raises_naming(UnreachableError, url):
        registry.check_tracking(url)


@pytest.mark.parametrize(
    ("address", "names"),
    [
        ("http://127.0.0.1:9", ("does not answer", "start it")),
        ("postgresql://anna:secret-1@127.0.0.1:9/mlflow", ("database does not answer", "refused", "start it")),
        ("mysql+pymysql://anna:secret-1@127.0.0.1:9/mlflow", ("pymysql", "pip install")),
        ("nonsense://x", ("nonsense://x", "MLFLOW_TRACKING_URI")),
        ("databricks", ("databricks", "MLFLOW_TRACKING_URI")),
    ],
)
def test_an_address_where_nothing_answers_is_one_line_within_seconds(address: str, names: tuple[str, ...]) -> None:
    started = time.monotonic()
    with raises_naming(RegistryError, *names) as error, connect(address):
        pass
    assert "\n" not in str(error.value)
    assert "secret-1" not in str(error.value)
    assert time.monotonic() - started < 10


def test_limits_of_the_first_request_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    body = '{"experiments": []}'
    with handled_by(answering(200, body, "application/json")) as url:
        with connect(url):
            assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"

        def connect_once(_: int) -> None:
            with connect(url):
                pass

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(connect_once, range(12)))
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"


def test_a_database_whose_driver_is_missing_is_one_line_without_its_password() -> None:
    with (
        raises_naming(RegistryError, "//…@h/db", "pg8000", "pip install") as error,
        connect("postgresql+pg8000://anna:se@cr/et-1@h/db"),
    ):
        pass
    assert "et-1" not in str(error.value)
