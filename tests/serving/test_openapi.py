"""What the service says of itself in /openapi.json, held against what it does, by Schemathesis."""

import subprocess
import sys
from pathlib import Path

from processes import free_port, running, wait_for

FAKES = Path(__file__).parents[1] / "fakes"


def test_every_route_answers_generated_requests_as_its_openapi_document_says(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "service.log"
    address = f"http://127.0.0.1:{port}"
    with running([sys.executable, str(FAKES / "serve_function.py"), str(port)], log) as process:
        wait_for(f"{address}/ready", process, log)
        command = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{address}/openapi.json"]
        command += ["--phases", "examples,coverage,fuzzing", "--max-examples", "20", "--seed", "1"]
        # Some rules join two fields (as many responses as instructions), and a schema cannot say so.
        command += [
            "--exclude-checks",
            "positive_data_acceptance",
            "--suppress-health-check",
            "all",
            "--warnings",
            "off",
        ]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout[-5000:]
    assert "No issues found" in run.stdout
    assert "Traceback" not in log.read_text()
