"""What a verb says when the extra that it needs is not installed, or its address is taken."""

import socket
import subprocess
import sys
from collections.abc import Callable

import pytest
from wording import assert_names

Cappy = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(
    ("missing", "words", "extra"),
    [
        ("fastapi", ["serve"], "serve"),
        ("uvicorn", ["serve"], "serve"),
        ("prometheus_client", ["gateway", "--upstream", "http://localhost/v1"], "serve"),
        ("kfp", ["pipeline", "run", "pretrain"], "pipelines"),
        ("kfp", ["adapt"], "pipelines"),
    ],
)
def test_a_missing_extra_is_one_line_with_the_command_that_installs_it(
    missing: str, words: list[str], extra: str
) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None\nfrom cappy.cli import main\nmain({words!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert_names(done.stderr, f"cappy {words[0]}: {missing}", f"pip install -e '.[{extra}]'")


def test_a_taken_port_is_one_line(here: Cappy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = here("serve", "--scorer", "absent", "--port", str(port))
    assert done.returncode == 1
    assert_names(done.stderr, f"cappy serve: 127.0.0.1:{port}: ", "in use", "--port")
    assert done.stderr.count("\n") == 1
