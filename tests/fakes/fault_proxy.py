"""A proxy that does to a client what networks and busy servers do, in front of a real server."""

import http.client
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

from local_server import handled_by

FAULTS = (
    "429",
    "429-later",
    "429-date",
    "500",
    "503",
    "hang-up",
    "mid-body",
    "stall",
    "malformed",
    "html",
    "no-choices",
)
BEFORE = ("429", "429-later", "429-date", "500", "503", "hang-up", "html")
"""Faults that keep the request from the server: nothing is answered, nothing paid."""


@dataclass
class Weather:
    """Which faults blow, how often, and what blew: `plan` first, in order ("" passes), then `rate` by the seed."""

    faults: Sequence[str] = FAULTS
    rate: float = 0.0
    plan: list[str] = field(default_factory=list)
    seed: int = 0
    stall: float = 1.0
    later: float = 0.05
    blown: Counter[str] = field(default_factory=Counter)
    arrivals: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def fault(self) -> str:
        """What happens to the next request; nothing for an empty text."""
        with self.lock:
            self.arrivals.append(time.monotonic())
            if self.plan:
                fault = self.plan.pop(0)
            else:
                fault = self._random.choice(list(self.faults)) if self._random.random() < self.rate else ""
            if fault:
                self.blown[fault] += 1
            return fault


@contextmanager
def proxying(upstream: str, weather: Weather) -> Iterator[str]:
    """The address of a proxy for the server at `upstream`."""
    target = urlsplit(upstream)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            fault = weather.fault()
            later = {
                "429-later": {"Retry-After": str(weather.later)},
                "429-date": {"Retry-After": formatdate(time.time() + weather.later, usegmt=True)},
            }
            if fault == "hang-up":
                return self.hang_up()
            if fault == "html":
                return self.send(200, b"<html><body>One moment, please</body></html>", kind="text/html")
            if fault in BEFORE:
                error = json.dumps({"error": {"message": f"try again ({fault})"}}).encode()
                return self.send(int(fault[:3]), error, headers=later.get(fault))
            status, data = self.forward(body)
            if fault == "stall":
                time.sleep(weather.stall)
            if fault == "malformed":
                data = data[: len(data) // 2]
            if fault == "no-choices":
                data = b'{"object": "chat.completion", "choices": []}'
            if fault == "mid-body":
                self.wfile.write(self.head(status, len(data), "application/json", None) + data[: len(data) // 2])
                return self.hang_up()
            return self.send(status, data)

        def forward(self, body: bytes) -> tuple[int, bytes]:
            connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
            try:
                headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
                connection.request("POST", self.path, body, headers)
                response = connection.getresponse()
                return response.status, response.read()
            finally:
                connection.close()

        def hang_up(self) -> None:
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

        def send(
            self, status: int, data: bytes, *, kind: str = "application/json", headers: dict[str, str] | None = None
        ) -> None:
            self.wfile.write(self.head(status, len(data), kind, headers) + data)

        @staticmethod
        def head(status: int, length: int, kind: str, headers: dict[str, str] | None) -> bytes:
            lines = {"Content-Type": kind, "Content-Length": str(length), **(headers or {})}
            stated = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in lines.items())]
            return ("\r\n".join(stated) + "\r\n\r\n").encode()

    with handled_by(Handler) as address:
        yield f"{address}{target.path}"
