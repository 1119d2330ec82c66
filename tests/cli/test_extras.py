"""What a verb says when the extra that it needs is not installed, or its address is taken."""

import socket
import subprocess
import sys
from collections.abc import Callable

import pytest

Cappy = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(
    ("missing", "words", "line"),
    [
        (
            "fastapi",
            ["serve"],
            "cappy serve: fastapi is not installed; install the serve extra: pip install -e '.[serve]'",
        ),
        (
            "uvicorn",
            ["serve"],
            "cappy serve: uvicorn is not installed; install the serve extra: pip install -e '.[serve]'",
        ),
        (
            "prometheus_client",
            ["gateway", "--upstream", "http://localhost/v1"],
            "cappy gateway: prometheus_client is not installed; install the serve extra: pip install -e '.[serve]'",
        ),
        (
            "kfp",
            ["pipeline", "run", "pretrain"],
            "cappy pipeline: kfp is not installed; install the pipelines extra: pip install -e '.[pipelines]'",
        ),
        (
            "kfp",
            ["adapt"],
            "cappy adapt: kfp is not installed; install the pipelines extra: pip install -e '.[pipelines]'",
        ),
    ],
)
def test_a_missing_extra_is_one_line_with_the_command_that_installs_it(
    missing: str, words: list[str], line: str
) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None\nfrom cappy.cli import main\nmain({words!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{line}\n")


def test_a_taken_port_is_one_line(here: Cappy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = here("serve", "--scorer", "absent", "--port", str(port))
    assert done.returncode == 1
    assert done.stderr.startswith(f"cappy serve: 127.0.0.1:{port}: is in use by another process; stop it or choose")
    assert done.stderr.count("\n") == 1
