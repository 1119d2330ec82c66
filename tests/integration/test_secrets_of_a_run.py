"""Every variable that has a secret has a canary through a whole `cappy adapt`, with an MLflow server: none is left."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from canaries import CANARIES, OF_MLFLOW, VARIABLES, adapt, canaries_in, environment, search, tasks, watched
from chat_server import Model, serving
from processes import free_port, wait_for

pytestmark = [pytest.mark.timeout(600)]


@contextlib.contextmanager
def mlflow(folder: Path) -> Iterator[int]:
    """The port of an MLflow server that keeps all below the folder."""
    folder.mkdir()
    port = free_port()
    stores = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files")]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *stores]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, folder / "server.log", seconds=120)
            yield port
        finally:
            server.terminate()
            server.wait(30)


class Repeating(Model):
    """A model that writes the key of whoever asks into its responses."""

    def reply(self, body: dict[str, Any], key: str, path: str) -> tuple[int, dict[str, Any]]:
        status, answer = super().reply(body, key, path)
        for choice in answer.get("choices", ()):
            choice["message"]["content"] = f"{choice['message']['content']} {key}"
        return status, answer


def test_a_whole_run_with_a_password_in_mlflows_address_leaves_no_canary(tmp_path: Path) -> None:
    folder, model = tmp_path / "here", Repeating()
    folder.mkdir()
    tasks(folder)
    # From a mounted file, as a cluster gives it; the other runs have it in a variable.
    (tmp_path.parent / "mounted-key").write_text(VARIABLES["OPENAI_API_KEY"] + "\n")
    known = {name: value for name, value in environment().items() if name != "OPENAI_API_KEY"}
    known["OPENAI_API_KEY_FILE"] = str(tmp_path.parent / "mounted-key")
    with mlflow(tmp_path / "mlflow") as port, serving(model) as url:
        address = f"http://anna:{quote(OF_MLFLOW, safe='')}@127.0.0.1:{port}"
        run = watched(adapt(url, "--tracking-uri", address), folder, known)
    assert run.done.returncode == 0, run.done.stderr[-2000:]
    assert model.keys == {CANARIES["OPENAI_API_KEY"]}
    assert sum(model.answered.values()) == 60 * 8
    assert not canaries_in(run.done.stdout.encode() + run.done.stderr.encode())
    assert not search(tmp_path)
    # The registry's database, every run's log and request, each answer on disk; the processes of all the steps.
    assert [path for path in (tmp_path / "mlflow").rglob("*") if path.name == "MODEL_CARD.md"]
    assert list(folder.rglob("request.json"))
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) > 200
    beneath = [word for word in run.words if b"--executor_input" in word]
    assert len(beneath) > 5
    assert not canaries_in(b"\n".join(run.words))
