"""Server processes for tests: started on a free port, waited for, ended with the block."""

import contextlib
import os
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from waiting import wait_until

BUCKET = "cappy-artifacts"
S3_KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


def free_port() -> int:
    with socket.socket() as connection:
        connection.bind(("127.0.0.1", 0))
        port: int = connection.getsockname()[1]
        return port


@contextlib.contextmanager
def running(command: list[str], log: Path, **changed: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server process, ended with the block."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env={**os.environ, **changed}, start_new_session=True
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 15)
            process.wait(30)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 60) -> None:
    """Until the address answers with success; AssertionError with the end of the log where it never does."""

    def answers() -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return True
        return False

    def logged() -> str:
        return log.read_text()[-2000:]

    wait_until(answers, f"an answer of {url}", seconds=seconds, pause=0.2, process=process, details=logged)
