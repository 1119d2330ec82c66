"""Clients that hold connections, or waste them, keep nobody else out and fill no disk with the log."""

import contextlib
import json
import logging
import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from waiting import wait_until

from serving.connections import BUSY_KEEP_ALIVE_SECONDS, KEEP_ALIVE_SECONDS, MAX_SMALL_PARTS, Connections
from serving.listener import ACCESS_LOGGER_NAME, MAX_REPEATS, RepeatFilter

FILES = 300
PROGRAM = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[3]), int(sys.argv[3])))
sys.path.insert(0, sys.argv[1])
from scoring_function import FakeEngine, model
from serving import connections, server
from serving.config import ServeConfig

kind = sys.argv[2]
connections.READ_SECONDS = 1.0
connections.BUSY_KEEP_ALIVE_SECONDS = 1
if kind == "few":
    connections.MIN_CONNECTIONS, connections.MAX_CONNECTIONS = 4, 4
if kind == "gateway":
    from cappy.cli import main
    main(["gateway", "--upstream", "http://127.0.0.1:9/v1", "--scorer", "builtin:tiny", "--port", "0"])
engine = FakeEngine(score=lambda pair: float(len(pair[1])), delay=6.0 if kind == "few" else 0.0)
pem = Path(sys.argv[4]) if len(sys.argv) > 4 else None
server.serve(lambda: model(engine), ServeConfig(port=0, tls_certificate=pem, tls_key=pem))
"""
FAKES = str(Path(__file__).parents[1] / "fakes")
Start = Callable[..., tuple[str, int, Path]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(kind) -> host and port of a service that may open `FILES` files, and its log."""
    processes: list[subprocess.Popen[bytes]] = []

    def started(kind: str) -> tuple[str, int, Path]:
        log = tmp_path / f"{kind}.log"
        with log.open("wb") as file:
            command = [sys.executable, "-c", PROGRAM, FAKES, kind, str(FILES)]
            processes.append(subprocess.Popen(command, stderr=file))
        url = wait_for_address(processes[-1], log)
        if kind != "gateway":
            wait_until(
                lambda: httpx.get(f"{url}/ready").status_code == 200, f"{url} to be ready", details=log.read_text
            )
        host, port = url.removeprefix("http://").split(":")
        return host, int(port), log

    yield started
    for process in processes:
        process.kill()
        process.wait()


def wait_for_address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """The address that the service writes when it listens."""
    result = wait_until(
        lambda: re.search(r" at (https?://[\d.]+:\d+)", log.read_text()),
        "the line with the address", seconds=90, pause=0.05, process=process, details=log.read_text,
    )  # fmt: skip
    assert result is not None
    return result[1]


def connect(host: str, port: int) -> socket.socket:
    return socket.create_connection((host, port), timeout=20)


def ask(connection: socket.socket, path: str = "/health") -> bytes:
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return connection.recv(65_536)


def closed(connection: socket.socket, seconds: float) -> bool:
    """Whether the other side closes within so many seconds."""
    try:
        connection.settimeout(seconds)
        while connection.recv(65_536):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


@pytest.mark.parametrize("kind", ["serve", "gateway"])
def test_more_idle_clients_than_files_keep_no_new_client_out_and_the_log_stays_small(start: Start, kind: str) -> None:
    host, port, log = start(kind)
    with contextlib.ExitStack() as stack:
        idle = []
        for number in range(400):
            idle.append(stack.enter_context(connect(host, port)))
            if number % 2:
                idle[-1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for _ in range(5):
            began = time.monotonic()
            with connect(host, port) as new:
                assert ask(new).startswith(b"HTTP/1.1 200")
            assert time.monotonic() - began < 20
            time.sleep(0.2)
        assert closed(idle[0], 60), "the one that was idle for longest made room"
    assert log.stat().st_size < 1_000_000
    assert "out of system resource" not in log.read_text()


def test_where_every_connection_has_a_request_a_new_one_is_503_and_is_served_once_one_ends(start: Start) -> None:
    host, port, _ = start("few")
    body = json.dumps({"pairs": [["a", "b"]]}).encode()
    head = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with contextlib.ExitStack() as stack:
        busy = [stack.enter_context(connect(host, port)) for _ in range(4)]
        for connection in busy:
            connection.sendall(head % len(body) + body)
        time.sleep(2)
        with connect(host, port) as new:
            answer = new.recv(65_536)
            assert answer.startswith(b"HTTP/1.1 503")
            assert b"too many connections" in answer
            assert closed(new, 60)
        for connection in busy:
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200"), "those that had one are answered"
        with connect(host, port) as new:
            assert ask(new).startswith(b"HTTP/1.1 200")


def test_a_client_that_does_not_read_its_answer_loses_its_connection(start: Start) -> None:
    host, port, _ = start("serve")
    body = json.dumps({"query": "a", "documents": ["x" * 7500] * 1000}).encode()
    head = b"POST /rerank HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"

    def received(seconds: float) -> int:
        """How much of the answer a client still gets that reads nothing for so long."""
        size = 0
        with socket.socket() as lazy:
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.settimeout(60)
            lazy.connect((host, port))
            lazy.sendall(head % len(body) + body)
            time.sleep(seconds)
            with contextlib.suppress(ConnectionError):
                while part := lazy.recv(1 << 20):
                    size += len(part)
        return size

    # A busy machine may not even have begun its answer after five seconds.
    assert any(received(seconds) < len(body) for seconds in (5, 30)), "the rest of the answer was to be given up"
    with connect(host, port) as other:
        assert ask(other).startswith(b"HTTP/1.1 200")


def test_a_body_in_very_many_very_small_parts_is_refused_early(start: Start) -> None:
    host, port, _ = start("serve")
    with connect(host, port) as wasteful:
        head = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        wasteful.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(100):
                wasteful.sendall(b"1\r\n \r\n" * (MAX_SMALL_PARTS // 10))
        assert closed(wasteful, 60)


def test_a_body_in_thousands_of_small_parts_is_taken(start: Start) -> None:
    host, port, _ = start("serve")
    body = json.dumps({"pairs": [["a", "b"]] * 500}).encode()
    answer = httpx.post(
        f"http://{host}:{port}/score",
        content=iter([body[at : at + 3] for at in range(0, len(body), 3)]),
        headers={"content-type": "application/json"},
    )
    assert answer.json()["scores"] == [1.0] * 500


@pytest.mark.parametrize(("count", "length"), [(101, 3), (3, 12_000)], ids=["many", "long"])
def test_a_head_of_very_many_or_very_long_headers_is_refused(start: Start, count: int, length: int) -> None:
    host, port, _ = start("serve")
    with connect(host, port) as wasteful:
        lines = "".join(f"x-{number}: {'a' * length}\r\n" for number in range(count))
        wasteful.sendall(f"GET /health HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode())
        assert wasteful.recv(65_536).startswith(b"HTTP/1.1 400")


class Fake:
    """A connection."""

    def __init__(self) -> None:
        self.evicted = False

    def evict(self) -> None:
        self.evicted = True


def test_the_longest_idle_connection_is_closed_and_one_with_a_request_never_does() -> None:
    counted = Connections(3)
    first, second, third, fourth, fifth, sixth, seventh = (Fake() for _ in range(7))
    for one in (first, second, third):
        assert counted.admit(one)
    counted.mark(first, idle=False)
    counted.mark(second, idle=True)  # bytes of a head do not make it younger
    assert counted.admit(fourth)
    assert [one.evicted for one in (first, second, third)] == [False, True, False]
    counted.renew(third)
    assert counted.admit(fifth)
    assert (third.evicted, fourth.evicted) == (False, True)
    for one in (third, fifth):
        counted.mark(one, idle=False)
    assert not counted.admit(sixth)
    counted.remove(first)
    assert counted.admit(seventh)


def test_connections_are_kept_shorter_where_there_are_many() -> None:
    counted = Connections(4)
    one, other = Fake(), Fake()
    counted.admit(one)
    counted.admit(other)
    assert counted.keep_alive == KEEP_ALIVE_SECONDS
    counted.admit(Fake())
    assert counted.keep_alive == BUSY_KEEP_ALIVE_SECONDS


@pytest.fixture
def log() -> Iterator[tuple[logging.Logger, list[str]]]:
    """A logger behind the filter, and what it wrote."""
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, logger = Kept(), logging.getLogger("serving.repeats")
    handler.addFilter(RepeatFilter())
    tested = logging.getLogger("tested")
    for one in (logger, tested, logging.getLogger(ACCESS_LOGGER_NAME)):
        one.addHandler(handler)
        one.setLevel(logging.INFO)
    yield tested, lines
    for one in (logger, tested, logging.getLogger(ACCESS_LOGGER_NAME)):
        one.removeHandler(handler)


def test_of_the_same_line_a_few_are_written_and_the_rest_are_counted(
    log: tuple[logging.Logger, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger, lines = log
    now = [1000.0]
    monkeypatch.setattr("serving.listener.time.monotonic", lambda: now[0])
    for number in range(100):
        logger.error("no file for %s", number)
        logging.getLogger(ACCESS_LOGGER_NAME).info("{}")
    assert lines.count("{}") == 100, "the access log is whole"
    assert [line for line in lines if line != "{}"] == [f"no file for {number}" for number in range(MAX_REPEATS)]
    logger.error("something else")
    assert lines[-1] == "something else"
    now[0] += 11
    logging.getLogger(ACCESS_LOGGER_NAME).info("{}")
    assert [line for line in lines if re.match("tested: 95 .*: no file for %s$", line)]
    logger.error("no file for %s", "the next")
    assert lines[-1] == "no file for the next"


def test_lines_that_are_all_different_do_not_fill_the_memory_of_the_filter(
    log: tuple[logging.Logger, list[str]],
) -> None:
    logger, lines = log
    for number in range(5000):
        logger.error(f"line {number}")
    # Beside them stand the sums of what a test before this one repeated, where its period ends meanwhile.
    assert sum(line.startswith("line ") for line in lines) <= 1000 + MAX_REPEATS


def test_clients_that_never_finish_their_handshake_keep_nobody_out(tmp_path: Path) -> None:
    pem, log = tmp_path / "both.pem", tmp_path / "log"
    words = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["-keyout", str(pem), "-out", str(tmp_path / "certificate.pem")]
    subprocess.run(["openssl", "req", *words, *names, *made], check=True, capture_output=True)
    pem.write_text(pem.read_text() + (tmp_path / "certificate.pem").read_text())
    with log.open("wb") as file:
        command = [sys.executable, "-c", PROGRAM, FAKES, "tls", str(FILES), str(pem)]
        process = subprocess.Popen(command, stderr=file)
    trusted = ssl.create_default_context(cafile=str(pem))
    try:
        host, digits = wait_for_address(process, log).removeprefix("https://").split(":")
        port = int(digits)
        with contextlib.ExitStack() as held:
            for _ in range(FILES + 100):
                held.enter_context(contextlib.closing(connect(host, port)))
            for _ in range(5):
                answer = httpx.get(f"https://{host}:{port}/health", verify=trusted, timeout=30)
                assert answer.status_code == 200
            process.terminate()
            assert process.wait(60) == 0
        assert log.stat().st_size < 1_000_000
    finally:
        process.kill()
        process.wait()


def test_a_request_whose_body_has_two_ends_is_400_and_nothing_behind_it_is_answered(start: Start) -> None:
    """A proxy in front may have read the other end, and would take the second request for a part of the first."""
    host, port, _ = start("sound")
    with connect(host, port) as connection:
        head = "POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        ends = "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        connection.sendall(f"{head}{ends}GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        answer = b""
        while part := connection.recv(65_536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1") == 1
