"""Every variable that has a secret has a canary: none is in what a command leaves, even when it fails.

The whole `cappy adapt` is in tests/integration/test_secrets_of_a_run.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pyarrow.parquet as pq
import pytest
from canaries import (
    CANARIES,
    COMMAND,
    EVERY,
    OF_MLFLOW,
    VARIABLES,
    Watched,
    adapt,
    asking,
    canaries_in,
    environment,
    forms,
    search,
    tasks,
    watched,
)
from foreign_server import Foreign, answering, response

from cappy.config import build
from cappy.deployment.kserve import inference_service, to_yaml
from cappy.deployment.step import DeploymentConfig
from cappy.records import Instance, write
from cappy.registry.models import Version
from pipelines.builder import compile_pipeline as compiled
from pipelines.recipe import check_recipe

pytestmark = [pytest.mark.timeout(600)]


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
        assert not list(tmp_path.rglob("run.log"))
        check_refused(watched(adapt(url, "--no-checks"), tmp_path, environment()), tmp_path, "adapt")
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
