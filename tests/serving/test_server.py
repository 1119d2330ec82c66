"""The service as a process of its own on a free port, with a function in place of a scorer."""

import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from cappy.errors import ConfigError, FolderError
from serving.server import bound, probe, run

PROGRAM = """
import sys, time
from cappy.errors import CappyError
from serving.server import serve

def lengths(pairs):
    time.sleep(0.5 if pairs[0][0] == "slow" else 0)
    return [float("nan") if sys.argv[1] == "damaged" else float(len(response)) for _, response in pairs]

try:
    serve(lambda: (lengths, "0123456789ab"), host="127.0.0.1", port=0)
except CappyError as error:
    sys.exit(f"cappy serve: {error}")
"""

Start = Callable[[str], tuple[subprocess.Popen[str], str]]


@pytest.fixture
def start() -> Iterator[Start]:
    processes: list[subprocess.Popen[str]] = []

    def started(kind: str) -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, kind], stderr=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stderr is not None
        assert select.select([process.stderr], [], [], 60)[0]
        line = process.stderr.readline()
        address = re.fullmatch(r"cappy serve: scorer 0123456789ab at (http://127\.0\.0\.1:\d+) \(.*\)\n", line)
        assert address, line
        return process, address[1]

    yield started
    for process in processes:
        process.kill()
        process.communicate()


def test_a_real_server_scores_and_sigterm_ends_it_with_status_0(start: Start) -> None:
    process, address = start("sound")
    answer = httpx.post(f"{address}/score", json={"pairs": [["a", "xyz"], ["a", "x"]]})
    assert answer.json() == {"scores": [3.0, 1.0], "version": "0123456789ab"}
    deadline = time.monotonic() + 10
    while httpx.get(f"{address}/ready").status_code != 200:
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "Traceback" not in log


def test_sigterm_lets_a_running_request_finish(start: Start) -> None:
    process, address = start("sound")
    answers: list[httpx.Response] = []
    request = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{address}/score", json={"pairs": [["slow", "xyz"]]}))
    )
    request.start()
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    request.join(20)
    process.communicate(timeout=20)
    assert [answer.json()["scores"] for answer in answers] == [[3.0]]
    assert process.returncode == 0


def test_a_scorer_that_fails_its_probe_ends_the_process_with_one_line(start: Start) -> None:
    process, _ = start("damaged")
    _, log = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "cappy serve: the scorer answers [nan] to one pair; its weights are damaged" in log
    assert "Traceback" not in log


def test_a_port_in_use_is_said_in_one_line_before_the_scorer_is_looked_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as error:
            run("no/such/folder", port=port)
    assert str(error.value) == (
        f"127.0.0.1:{port}: is in use by another process; stop it or choose another --port (0: any free one)"
    )


def test_an_address_of_another_machine_is_said_in_one_line() -> None:
    refusal = pytest.raises(ConfigError, match=r"^192\.0\.2\.1:0: is no address of this machine .*; try --host 127")
    with refusal, bound("192.0.2.1", 0):
        pass


def test_the_probe_refuses_what_is_no_finite_number() -> None:
    probe(lambda pairs: [0.5])
    for answer in ([float("inf")], []):
        with pytest.raises(FolderError, match="its weights are damaged"):
            probe(lambda pairs, answer=answer: answer)  # type: ignore[misc]
