"""The service, asked by clients that others wrote: Cohere's, Triton's and KServe's own, Haystack's, MLflow's."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
import pytest
from processes import free_port, running, wait_for

from cappy.builtin import TINY_SCORER_FOLDER

FAKES = Path(__file__).parents[1] / "fakes"
ROOT = Path(__file__).parents[2]
SERVERS = ROOT / ".venv-servers" / "bin"
SCORES = [3.001, 3.004, 3.002]
TOKENS = sum(3 + 1 + len(text) for text in ("x", "xxxx", "yy"))
Ask = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The service with a function in place of a scorer."""
    port, log = free_port(), tmp_path_factory.mktemp("service") / "log"
    with running([sys.executable, str(FAKES / "serve_function.py"), str(port)], log) as process:
        wait_for(f"http://127.0.0.1:{port}/ready", process, log)
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def ask(address: str) -> Ask:
    """ask("client") -> what that client got."""
    python = SERVERS / "python"
    if not python.exists():
        pytest.skip("no clients here; make integration installs them")

    def asked(client: str) -> dict[str, Any]:
        command = [str(python), "-W", "ignore", str(FAKES / "serving_clients.py"), client, address]
        quiet = {**os.environ, "HAYSTACK_TELEMETRY_ENABLED": "False", "PYTHONPATH": ""}
        run = subprocess.run(command, env=quiet, capture_output=True, text=True, timeout=120, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
        result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
        return result

    return asked


def test_coheres_sdk_reranks_by_both_of_its_versions(ask: Ask) -> None:
    result = ask("cohere")
    assert result["first"] == [[1, 3.004, "xxxx"], [0, 3.001, "x"]]
    assert result["second"] == [[1, 3.004], [2, 3.002]]
    assert result["tokens"] == TOKENS
    assert result["unknown"].startswith("NotFoundError: ")
    assert "use cappy" in result["unknown"]
    assert result["empty"].startswith("BadRequestError: ")
    assert "documents: " in result["empty"]


def test_haystacks_ranker_for_jina_ranks(ask: Ask) -> None:
    result = ask("jina")
    assert result["ranked"] == [["xxxx", 3.004], ["yy", 3.002]]
    assert result["meta"] == {"model": "cappy", "usage": {"prompt_tokens": TOKENS, "total_tokens": TOKENS}}
    assert "use cappy" in result["unknown"]


def test_haystacks_ranker_for_text_embeddings_inference_ranks(ask: Ask) -> None:
    result = ask("tei")
    assert result["scores"] == [["xxxx", 3.004], ["yy", 3.002]]
    assert result["raw"] == [["xxxx", pytest.approx(30.04)], ["yy", pytest.approx(30.02)]]


def test_tritons_client_infers_with_binary_tensors_and_with_json(ask: Ask) -> None:
    result = ask("triton")
    assert result["binary"] == result["json"] == [[score] for score in SCORES]
    assert (result["live"], result["ready"]) == (True, True)
    assert result["metadata"]["inputs"][0] == {"name": "instruction", "datatype": "BYTES", "shape": [-1]}
    assert result["server"]["name"] == "cappy"
    assert "use cappy" in result["unknown"]


def test_kserves_client_predicts_and_infers(ask: Ask) -> None:
    result = ask("kserve")
    assert result["first"] == {"predictions": [{"score": score} for score in SCORES]}
    assert result["second"] == SCORES
    assert (result["live"], result["ready"], result["models"]) == (True, True, [True, True])


def test_mlflows_client_of_its_scoring_server_gets_the_scores(address: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow warns of its own type hints
        from mlflow.pyfunc.scoring_server.client import ScoringServerClient
    host, port = address.removeprefix("http://").split(":")
    client = ScoringServerClient(host, int(port))
    client.wait_server_ready(timeout=10)
    table = pd.DataFrame({"instruction": ["abc"] * 3, "response": ["x", "xxxx", "yy"]})
    assert client.invoke(table)["predictions"] == SCORES
    with pytest.raises(Exception, match=r"error code 400, response: .*BAD_REQUEST.*no column response"):
        client.invoke(table[["instruction"]])


def test_cappy_serve_reads_its_scorer_from_a_bucket_of_googles(gcs: Any, tmp_path: Path) -> None:
    for path in TINY_SCORER_FOLDER.rglob("*"):
        if path.is_file():
            gcs.write(f"models/7/{path.relative_to(TINY_SCORER_FOLDER).as_posix()}", path.read_bytes())
    port, log = free_port(), tmp_path / "log"
    place = {"AIP_STORAGE_URI": f"{gcs.address}/models/7", "AIP_HTTP_PORT": str(port), "PYTHONPATH": str(ROOT)}
    credentials = {"GOOGLE_CLOUD_PROJECT": "test"}
    with running([sys.executable, "-m", "serving"], log, **place, **credentials, **gcs.environment) as process:
        wait_for(f"http://127.0.0.1:{port}/ready", process, log)
    assert "cappy serve: scorer " in log.read_text()
