"""MLflow's database is there whole or not at all."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cappy.registry.client import connected

CONNECT = """
import sys
from cappy.registry.client import connected
with connected(sys.argv[1]):
    pass
"""


def killed_among_the_tables(folder: Path) -> None:
    """Kills a process that has made some of MLflow's tables and not all."""
    with subprocess.Popen([sys.executable, "-c", CONNECT, f"sqlite:///{folder / 'mlflow.db'}"]) as process:
        drafts = [folder / "mlflow.db", folder / ".mlflow.db.new"]
        while not any(path.exists() and path.stat().st_size > 100_000 for path in drafts):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL


def test_a_run_killed_while_the_tables_are_made_leaves_nothing_that_the_next_one_refuses(tmp_path: Path) -> None:
    killed_among_the_tables(tmp_path)
    with connected(f"sqlite:///{tmp_path / 'mlflow.db'}") as client:
        assert [found.name for found in client.search_experiments()] == ["Default"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [".mlflow.db.lock", "mlflow.db"]


@pytest.mark.parametrize("start", ["missing", "empty"])
def test_a_missing_and_an_empty_file_become_a_database(tmp_path: Path, start: str) -> None:
    path = tmp_path / "mlflow.db"
    if start == "empty":
        path.touch()
    with connected(f"sqlite:///{path}") as client:
        client.create_experiment("kept")
    with connected(f"sqlite:///{path}") as client:
        assert client.get_experiment_by_name("kept") is not None
