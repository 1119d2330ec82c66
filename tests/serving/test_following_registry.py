"""The service as a process of its own behind a real registry: two versions, promoted and rolled back while it runs."""

import json
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from waiting import wait_until

from cappy.evaluation.findings import SCHEMA
from cappy.records import Manifest, read_manifest
from cappy.records.folder import describe_files, write_manifest
from cappy.registry.client import connect
from cappy.registry.registration import RegistrationConfig, run
from cappy.scoring import Scorer

PAIRS = [("who sat on the mat", "the cat"), ("who flew", "a bird"), ("who flew", "the tree is not red")]
KEY = "a-key-of-tests"


def wait_for_version(client: httpx.Client, number: int) -> None:
    def current() -> str:
        return str(client.get("/model").json()["current"]["registered"])

    wait_until(lambda: current() == f"models:/cappy/{number}", f"version {number}", details=current)


def report(folder: Path, scorer: Path, shift: float = 0.0) -> list[float]:
    """Writes the folder of an evaluation; the scores that it stores, moved by `shift`."""
    folder.mkdir()
    scores = [score + shift for score in Scorer.load(str(scorer)).score(PAIRS)]
    versions = {"challenger": read_manifest(scorer).hash[:12]}
    (folder / "report.json").write_text(json.dumps({"schema": SCHEMA, "comparisons": {}, "versions": versions}))
    triples = [[*pair, score] for pair, score in zip(PAIRS, scores, strict=True)]
    (folder / "probe.json").write_text(json.dumps(triples))
    write_manifest(folder, Manifest(step="evaluation", files=describe_files(folder)))
    return scores


def test_a_running_service_follows_the_alias_of_a_real_registry(
    make_scorer: Callable[..., Path], tmp_path: Path, monkeypatch: Any
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("CAPPY_API_KEYS", KEY)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    folders = {number: make_scorer(seed=number) for number in (1, 2, 3)}
    scores = {
        number: report(tmp_path / f"report-{number}", folder, shift=0.1 if number == 3 else 0.0)
        for number, folder in folders.items()
    }
    for number, folder in folders.items():
        places: dict[str, Any] = {"report": tmp_path / f"report-{number}", "target": tmp_path / f"version-{number}"}
        run(RegistrationConfig(scorer=folder, work=tmp_path / "work", **places))

    def promote(number: int) -> None:
        with connect(uri) as client:
            client.set_registered_model_alias("cappy", "champion", str(number))

    promote(1)
    command = [sys.executable, "-m", "serving", "--port", "0", "--follow-seconds", "0.2", "--notice", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert select.select([process.stderr], [], [], 120)[0]
            line = process.stderr.readline()
            result = re.fullmatch(r"cappy serve: scorer \w+ at (http://127\.0\.0\.1:\d+) \(.*\)\n", line)
            assert result, line + process.stderr.read()
            headers = {"Authorization": f"Bearer {KEY}"}
            with httpx.Client(base_url=result[1], headers=headers, timeout=30) as client:
                wait_until(lambda: client.get("/ready").status_code == 200, "a ready service")

                def answers(number: int) -> bool:
                    actual = client.post("/score", json={"pairs": PAIRS}).json()
                    expected = scores[int(client.get("/model").json()["current"]["registered"].rpartition("/")[2])]
                    assert max(abs(one - other) for one, other in zip(actual["scores"], expected, strict=True)) < 5e-3
                    return bool(actual["version"] == read_manifest(folders[number]).hash[:12])

                assert answers(1)
                promote(2)
                wait_for_version(client, 2)
                assert answers(2)
                promote(3)
                wait_until(lambda: client.get("/model").json()["refused"], "a refused version")
                assert "scored" in client.get("/model").json()["refused"]["models:/cappy/3"]
                assert answers(2)
                promote(1)
                wait_for_version(client, 1)
                assert answers(1)
                process.send_signal(signal.SIGTERM)
                _, log = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert sum("models:/cappy/3 is refused" in line for line in log.splitlines()) == 1
    assert "Traceback" not in log
