"""MLflow's database is there whole or not at all."""

import base64
import os
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from local_server import handled_by
from waiting import wait_until
from wording import raises_naming

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


def test_a_database_whose_driver_is_missing_is_one_line_without_its_password() -> None:
    with (
        raises_naming(RegistryError, "//…@h/db", "pg8000", "pip install") as error,
        connect("postgresql+pg8000://anna:se@cr/et-1@h/db"),
    ):
        pass
    assert "et-1" not in str(error.value)
