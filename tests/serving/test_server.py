"""The service as a process of its own on a free port, with a function in place of a scorer."""

import json
import re
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which
from typing import Any

import httpx
import pytest
from waiting import wait_until
from wording import assert_names, raises_naming

from cappy.errors import ConfigError
from serving.config import ServeConfig
from serving.guards import read_keys
from serving.listener import bind
from serving.server import run

PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from scoring_function import FakeEngine, model
from cappy.errors import CappyError
from serving import connections, server
from serving.config import ServeConfig

connections.HEAD_SECONDS = 0.5
kind, *tls = sys.argv[2:]

def score(pair):
    return float("nan") if kind == "damaged" else float(len(pair[1]))

engine = FakeEngine(score=score, delay=0.3 if kind == "slow" else 0.0)
certificate, key = map(Path, tls) if tls else (None, None)
try:
    server.serve(
        lambda: model(engine, version="0123456789ab"),
        ServeConfig(
            port=0,
            tls_certificate=certificate,
            tls_key=key,
            notice=2.0 if kind == "slow" else 0.1,
            batch_tokens=3 if kind == "slow" else 0,
        ),
    )
except CappyError as error:
    sys.exit(f"cappy serve: {error}")
"""
FAKES = str(Path(__file__).parents[1] / "fakes")
Start = Callable[..., tuple[subprocess.Popen[str], str]]


@pytest.fixture
def start() -> Iterator[Start]:
    processes: list[subprocess.Popen[str]] = []

    def started(kind: str, *tls: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-c", PROGRAM, FAKES, kind, *tls]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stderr is not None
        assert select.select([process.stderr], [], [], 60)[0]
        line = process.stderr.readline()
        address = re.fullmatch(r"cappy serve: scorer 0123456789ab at (https?://127\.0\.0\.1:\d+) \(.*\)\n", line)
        assert address, line + process.stderr.read()
        return process, address[1]

    yield started
    for process in processes:
        process.kill()
        process.communicate()


def until_ready(address: str, **settings: Any) -> None:
    wait_until(
        lambda: httpx.get(f"{address}/ready", **settings).status_code == 200, f"{address} to be ready", seconds=10
    )


def queued(address: str) -> float:
    text = httpx.get(f"{address}/metrics").text
    return float(re.search(r"^cappy_queue_tokens (\S+)$", text, re.MULTILINE)[1])  # type: ignore[index]


def test_a_real_server_scores_and_sigterm_ends_it_with_status_0(start: Start) -> None:
    process, address = start("sound")
    until_ready(address)
    answer = httpx.post(f"{address}/score", json={"pairs": [["a", "xyz"], ["a", "x"]]})
    assert answer.json()["scores"] == [3.0, 1.0]
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "Traceback" not in log


def test_after_sigterm_it_is_not_ready_answers_those_who_still_come_and_ends_with_status_0(start: Start) -> None:
    process, address = start("slow")
    until_ready(address)
    answers: list[httpx.Response] = []

    def ask(number: int) -> None:
        body = {"pairs": [[str(number), "x"], [str(number), "xy"]]}
        answers.append(httpx.post(f"{address}/score", json=body, timeout=30))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    # Three requests have 21 tokens.
    wait_until(lambda: queued(address) >= 22, "a fourth request in the queue", seconds=10, pause=0.0)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    ready = httpx.get(f"{address}/ready")
    assert (ready.status_code, "shutting down" in ready.json()["reason"]) == (503, True)
    assert ready.headers["Connection"] == "close"
    late = httpx.post(f"{address}/score", json={"pairs": [["a", "b"]]}, timeout=30)
    assert (late.status_code, late.json()["scores"]) == (200, [1.0]), "a balancer may not have looked elsewhere yet"
    for thread in threads:
        thread.join(30)
    assert [(answer.status_code, answer.json()["scores"]) for answer in answers] == [(200, [1.0, 2.0])] * 4
    assert process.wait(20) == 0


def test_a_client_that_hangs_up_is_taken_out_of_the_queue(start: Start) -> None:
    process, address = start("slow")
    until_ready(address)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}/score", json={"pairs": [["a", str(number)] for number in range(50)]}, timeout=0.5)
    started = time.monotonic()

    def scores() -> object:
        """None while the queue is full: the service notices a moment later that the client is gone."""
        return httpx.post(f"{address}/score", json={"pairs": [["b", "xyz"]]}, timeout=20).json().get("scores")

    assert wait_until(scores, "a place in the queue", seconds=5) == [3.0]
    assert time.monotonic() - started < 5, "50 batches of 0.3 s were waiting"
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=20)
    records = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert 499 in [record["status"] for record in records]


def test_a_client_that_hangs_up_while_it_sends_is_no_defect_of_the_service(start: Start) -> None:
    process, address = start("sound")
    until_ready(address)
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b'Content-Length: 100\r\n\r\n{"pairs"')
        time.sleep(0.3)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=20)
    assert "Traceback" not in log
    records = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert [record["status"] for record in records if record["path"] == "/score"] == [499]


def test_a_client_that_sends_its_request_too_slowly_loses_its_connection_and_others_do_not_wait(start: Start) -> None:
    _, address = start("sound")
    until_ready(address)
    host, port = address.removeprefix("http://").split(":")
    slow = [socket.create_connection((host, int(port)), timeout=10) for _ in range(50)]
    for number, connection in enumerate(slow):
        if number % 3 == 0:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            while connection.recv(1) != b"}":
                pass
        if number % 3 != 1:
            connection.sendall(b"POST /score HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
    assert httpx.post(f"{address}/score", json={"pairs": [["b", "xyz"]]}).json()["scores"] == [3.0]
    for connection in slow:
        assert connection.recv(1) == b""
        connection.close()


def test_a_scorer_that_fails_its_probe_ends_the_process_with_one_line(start: Start) -> None:
    process, _ = start("damaged")
    _, log = process.communicate(timeout=20)
    assert process.returncode == 1
    assert re.search(r"^cappy serve: .*\[nan\].*weights", log, re.MULTILINE)
    assert "Traceback" not in log


@pytest.mark.skipif(which("openssl") is None, reason="no openssl here; apt-get install openssl")
def test_with_a_certificate_it_speaks_https(start: Start, tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    words = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", *words, *names, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    _, address = start("sound", str(certificate), str(key))
    assert address.startswith("https://")
    until_ready(address, verify=ssl.create_default_context(cafile=str(certificate)))


def test_a_certificate_without_its_key_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "c.pem").write_text("")
    with raises_naming(ConfigError, "--tls-certificate and --tls-key"):
        run(ServeConfig(scorer="no/such/folder", port=0, tls_certificate=tmp_path / "c.pem"))
    with raises_naming(ConfigError, f"--tls-key {tmp_path}/k.pem", "PEM"):
        run(ServeConfig(scorer="no/such/folder", tls_certificate=tmp_path / "c.pem", tls_key=tmp_path / "k.pem"))


@pytest.mark.parametrize("passphrase", [False, True])
@pytest.mark.skipif(which("openssl") is None, reason="no openssl here; apt-get install openssl")
def test_a_certificate_that_is_none_or_a_key_that_asks_for_a_passphrase_is_refused_in_one_line(
    tmp_path: Path, passphrase: bool
) -> None:
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    words = ["-x509", "-newkey", "rsa:2048", "-days", "1", "-subj", "/CN=localhost"]
    protection = ["-passout", "pass:secret"] if passphrase else ["-nodes"]
    command = ["openssl", "req", *words, *protection, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    given = (certificate, key) if passphrase else (key, certificate)
    config = ServeConfig(scorer="no/such/folder", port=0, tls_certificate=given[0], tls_key=given[1])
    with raises_naming(ConfigError, f"--tls-certificate {given[0]}", f"--tls-key {given[1]}", "passphrase"):
        run(config)


def test_a_port_in_use_is_said_in_one_line_before_the_scorer_is_looked_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with raises_naming(ConfigError, f"127.0.0.1:{port}: ", "in use", "--port"):
            run(ServeConfig(scorer="no/such/folder", port=port))


def test_an_address_of_another_machine_is_said_in_one_line() -> None:
    with raises_naming(ConfigError, "192.0.2.1:0: ", "--host 127.0.0.1"), bind("192.0.2.1", 0):
        pass


def test_keys_come_from_a_file_or_the_environment_and_short_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys"
    assert not read_keys(None)
    monkeypatch.setenv("CAPPY_API_KEYS", "first-key, second-key")
    assert read_keys(None).allow({"authorization": "Bearer second-key"})
    path.write_text("# of-the-batch-job\nthird-key\n\n")
    assert read_keys(path).allow({"authorization": "Bearer third-key"})
    assert not read_keys(path).allow({"authorization": "Bearer first-key"})
    assert not read_keys(path).allow({"authorization": "Bearer # of-the-batch-job"})
    monkeypatch.setenv("CAPPY_API_KEYS", " , ")
    with pytest.raises(ConfigError, match="CAPPY_API_KEYS: holds no key"):
        read_keys(None)
    for text, said in (("\n", "holds no key"), ("short\n", "key shorter than 8 ")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_keys(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "none")


@pytest.mark.parametrize("origin", ["app.example", "https://app.example/path", "null"])
def test_what_no_browser_sends_as_its_origin_is_refused(origin: str, capsys: pytest.CaptureFixture[str]) -> None:
    from cappy.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["serve", "--scorer", "no/such/folder", "--allow-origin", origin])
    assert ended.value.code == 1
    assert_names(capsys.readouterr().err, f"--allow-origin {origin}: ", "https://app.example")
