"""Every variable that carries a secret carries a canary through a whole `cappy adapt`: none stands in what is left."""

import base64
import contextlib
import html
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow.parquet as pq
import pytest
from chat_server import Model, serving
from foreign_server import Foreign, answering, response
from processes import free_port, wait_for

from cappy.config import build
from cappy.deployment.kserve import inference_service, to_yaml
from cappy.deployment.step import DeploymentConfig
from cappy.records import Instance, write
from cappy.registry.models import Version
from pipelines.builder import compile_pipeline as compiled
from pipelines.recipe import check_recipe

pytestmark = [pytest.mark.timeout(600)]

CANARIES = {
    name: f"canary-{number:02}-{name[::-1].lower()}"
    for number, name in enumerate(
        (
            *("OPENAI_API_KEY", "CAPPY_WEBHOOK_SECRET", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"),
            *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_CLIENT_SECRET", "AZURE_STORAGE_ACCESS_KEY"),
            *("GOOGLE_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "KUBE_TOKEN", "SOME_LLM_KEY"),
        )
    )
}
IN_OTHERS = ("canary-of-keys-1", "canary-of-keys-2", "canary-of-headers", "canary-of-a-proxy", "canary-of-database")
OF_MLFLOW = "canary-of/mlflow"
"""In its address, so percent-encoded there."""
EVERY = (*CANARIES.values(), *IN_OTHERS, OF_MLFLOW)
VARIABLES = {
    **{name: f"{value}\n" if name.startswith("MLFLOW") else value for name, value in CANARIES.items()},
    "CAPPY_API_KEYS": f"{IN_OTHERS[0]},{IN_OTHERS[1]}",
    "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer%20{IN_OTHERS[2]}",
    "HTTPS_PROXY": f"http://me:{IN_OTHERS[3]}@127.0.0.1:9",
    "DATABASE_URL": f"postgresql://me:{IN_OTHERS[4]}@127.0.0.1:9/db",
    "MLFLOW_TRACKING_USERNAME": "anna",
    "NO_PROXY": "127.0.0.1,localhost",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def forms(canary: str) -> set[bytes]:
    """What a canary may look like: plain, percent-encoded, in base64 alone and as a password, as JSON and HTML."""
    plain = canary.encode()
    pairs = (f"{user}:{canary}".encode() for user in ("anna", "me"))
    encoded = {base64.b64encode(data).rstrip(b"=") for data in (plain, *pairs)}
    return {plain, quote(canary, safe="").encode(), html.escape(canary).encode(), *encoded}


def canaries_in(data: bytes) -> list[str]:
    return [canary for canary in EVERY if any(form in data for form in forms(canary))]


def content(path: Path) -> bytes:
    """What a file holds, tables as their values."""
    data = path.read_bytes()
    return data + repr(pq.read_table(path).to_pylist()).encode() if path.suffix == ".parquet" else data


def search(folder: Path) -> dict[str, list[str]]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    names = {str(path): canaries_in(str(path).encode()) + canaries_in(content(path)) for path in files}
    return {name: result for name, result in names.items() if result}


@dataclass
class Watched:
    """A finished command, and the words of every process beneath it."""

    done: subprocess.CompletedProcess[str]
    words: set[bytes]


def watched(command: list[str], folder: Path, environment: Mapping[str, str]) -> Watched:
    """Runs a command; a thread reads what stands in the process list meanwhile."""
    words: set[bytes] = set()
    with (folder / "stdout").open("w+") as out, (folder / "stderr").open("w+") as err:
        process = subprocess.Popen(command, cwd=folder, env=dict(environment), stdout=out, stderr=err)

        def look() -> None:
            while process.poll() is None:
                words.update(_words_beneath(process.pid))
                time.sleep(0.05)

        thread = threading.Thread(target=look)
        thread.start()
        process.wait()
        thread.join()
    written = ((folder / name).read_text() for name in ("stdout", "stderr"))
    return Watched(subprocess.CompletedProcess(command, process.returncode, *written), words)


def _words_beneath(top: int) -> Iterator[bytes]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    for pid in parents:
        above = parents[pid]
        while above not in (0, 1, top):
            above = parents.get(above, 0)
        if above == top:
            with contextlib.suppress(OSError):
                yield Path(f"/proc/{pid}/cmdline").read_bytes()


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


COMMAND = [sys.executable, "-c", "from cappy.cli import main; main()"]


def asking(url: str) -> list[str]:
    return ["--generator", f"openai:m@{url}", "--strategy", "endpoint8"]


def adapt(url: str, *more: str) -> list[str]:
    settings = ["finetuning.epochs=0.1", "sampling.max_retries=1"]
    flags = [word for setting in settings for word in ("--set", setting)]
    return [*COMMAND, "adapt", "--instances", "tasks.jsonl", *asking(url), *flags, *more]


def tasks(folder: Path) -> None:
    rows = [f'{{"instruction": "Say word {i}.", "references": ["SAY WORD {i}. once"]}}' for i in range(60)]
    (folder / "tasks.jsonl").write_text("\n".join(rows) + "\n")


def environment() -> dict[str, str]:
    return {**os.environ, **VARIABLES}


class Repeating(Model):
    """A model that writes the key of whoever asks into its responses."""

    def reply(self, body: dict[str, Any], key: str, path: str) -> tuple[int, dict[str, Any]]:
        status, answer = super().reply(body, key, path)
        for choice in answer.get("choices", ()):
            choice["message"]["content"] = f"{choice['message']['content']} {key}"
        return status, answer


@pytest.mark.pulse
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


def check_refused(run: Watched, folder: Path, verb: str) -> None:
    assert run.done.returncode == 1
    assert run.done.stderr.startswith(f"cappy {verb}: ")
    assert not canaries_in(run.done.stdout.encode() + run.done.stderr.encode())
    # Nor the beginning of one.
    assert "canary-" not in run.done.stderr
    assert not search(folder)
    assert not canaries_in(b"\n".join(run.words))


def test_a_server_that_repeats_the_key_in_an_error_leaves_no_canary(tmp_path: Path) -> None:
    tasks(tmp_path)
    text = f"<p>{'x' * 180}{CANARIES['OPENAI_API_KEY']}</p>"
    with answering(Foreign(parts=[response(text.encode(), status=401)])) as url:
        check_refused(watched(adapt(url), tmp_path, environment()), tmp_path, "adapt")
    assert list(tmp_path.rglob("run.log"))


@pytest.mark.parametrize(
    "body",
    [
        response(b"{}")[:-2] + f'"{CANARIES["OPENAI_API_KEY"]}'.encode(),
        response(f"{'x' * 80}{CANARIES['OPENAI_API_KEY'][:15]}".encode(), status=401),
    ],
    ids=["more than it says", "ends within the key"],
)
def test_a_server_that_breaks_off_with_the_key_leaves_no_canary(tmp_path: Path, body: bytes) -> None:
    """The step alone: what a pipeline makes of its line is the test above."""
    write(tmp_path / "in", [Instance(instance_id="1", instruction="Say a word.", references=("a",))])
    with answering(Foreign(parts=[body])) as url:
        words = ["sampling", "--source", "in", "--target", "out", *asking(url), "--max-retries", "1"]
        check_refused(watched([*COMMAND, *words], tmp_path, environment()), tmp_path, "sampling")


ADDRESSES = (
    "http://anna:{}@127.0.0.1:9",
    "http://127.0.0.1:9/?token={}",
    "postgresql://anna:{}@127.0.0.1:9/db",
    "http://{}@h:x",
)
EACH = """
import sys
from cappy.cli import main
statuses = []
for address in sys.argv[2:]:
    try:
        main([*sys.argv[1].split(), "--tracking-uri", address])
    except SystemExit as ended:
        statuses.append(ended.code)
print(statuses)
"""


@pytest.mark.parametrize("verb", ["promotion --history --name m", "doctor"])
def test_an_address_that_leads_nowhere_is_shown_without_its_secret(tmp_path: Path, verb: str) -> None:
    """All addresses in one process: importing MLflow takes longer than the rest."""
    given = [address.format("canary-01/w@rd?x#y") for address in ADDRESSES]
    command = [sys.executable, "-c", EACH, verb, *given]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    statuses = json.loads(done.stdout.splitlines()[-1])
    assert len(statuses) == len(ADDRESSES), done.stderr[-2000:]
    assert verb == "doctor" or statuses == [1] * len(ADDRESSES)
    assert "canary" not in done.stdout + done.stderr
    assert "w@rd" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_no_specification_of_a_cluster_holds_a_canary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    secrets = [{"variable": "OPENAI_API_KEY", "name": "llm", "key": "api-key"}]
    for address in (f"https://anna:{quote(OF_MLFLOW, safe='')}@host", f"https://host/?token={OF_MLFLOW}"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        from cappy.training.remote import run

        written = [json.dumps(run._job_environment(tmp_path, "finetuning"))]
        values = {"version": "v", "report": "r", "target": "t", "platform": "kserve", "image": f"a/b@sha256:{'0' * 64}"}
        config = build(DeploymentConfig, values)
        version = Version(name="m", number=3, source="", tags={"cappy.manifest": "3" * 64})
        written.append(to_yaml(inference_service(config, version)))
        for platform in ("local", "kubeflow", "vertex"):
            resources = {"sampling": {"secrets": secrets}} if platform == "kubeflow" else {}
            written.append(compiled(check_recipe({"pipeline": "adapt", "resources": resources}), platform))
        assert not canaries_in("\n".join(written).encode())


def test_the_search_finds_what_was_planted(tmp_path: Path) -> None:
    import pyarrow as pa

    for number, form in enumerate(sorted(forms(EVERY[0]))):
        (tmp_path / f"{number}").write_bytes(b"{" + form + b"}")
    table = pa.table({"a": [f"x {OF_MLFLOW}"] * 1000})
    pq.write_table(table, tmp_path / "t.parquet", compression="zstd")
    result = search(tmp_path)
    assert len(result) == len(forms(EVERY[0])) + 1
    assert result[str(tmp_path / "t.parquet")] == [OF_MLFLOW]
    planted = [sys.executable, "-c", "import subprocess, sys; subprocess.run([*sys.argv[1:]])"]
    words = watched(
        [*planted, sys.executable, "-c", "import time; time.sleep(2)", EVERY[1]], tmp_path, os.environ
    ).words
    assert canaries_in(b"\n".join(words)) == [EVERY[1]]
