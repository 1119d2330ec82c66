"""What a verb says when the extra that it needs is not installed, or its address is taken."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable

from wording import assert_names

Cappy = Callable[..., subprocess.CompletedProcess[str]]


EACH = """
import contextlib, io, json, sys
cases = json.loads(sys.argv[1])
sys.modules.update({missing: None for missing, _ in cases})
from cappy.cli import main
for missing, _ in cases:
    sys.modules.pop(missing, None)
for missing, words in cases:
    sys.modules[missing] = None
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as ended:
            status = ended.code
    del sys.modules[missing]
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""


def test_a_missing_extra_is_one_line_with_the_command_that_installs_it() -> None:
    """All in one process, the one that is imported first comes first: what was imported is not missed later."""
    cases = [
        ("fastapi", ["serve"], "serve"),
        ("uvicorn", ["serve"], "serve"),
        ("prometheus_client", ["gateway", "--upstream", "http://localhost/v1"], "serve"),
        ("kfp", ["pipeline", "run", "pretrain"], "pipelines"),
        ("kfp", ["adapt"], "pipelines"),
    ]
    given = json.dumps([(missing, words) for missing, words, _ in cases])
    done = subprocess.run([sys.executable, "-c", EACH, given], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for (missing, words, extra), line in zip(cases, done.stdout.splitlines(), strict=True):
        status, out, err = json.loads(line)
        assert (status, out, err.count("\n")) == (1, "", 1), err
        assert_names(err, f"cappy {words[0]}: {missing}", f"pip install -e '.[{extra}]'")


def test_a_taken_port_is_one_line(here: Cappy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = here("serve", "--scorer", "absent", "--port", str(port))
    assert done.returncode == 1
    assert_names(done.stderr, f"cappy serve: 127.0.0.1:{port}: ", "in use", "--port")
    assert done.stderr.count("\n") == 1
