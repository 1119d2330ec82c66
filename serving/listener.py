"""Listening, HTTP settings, logging and graceful shutdown of both services."""

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Protocol

import uvicorn

from cappy.errors import ConfigError
from cappy.runs import reset_garbage_collector
from serving.config import ListenerConfig
from serving.connections import (
    ACCEPTS_PER_TURN,
    BACKLOG,
    PARSE_BYTES,
    BoundedProtocol,
    Connections,
    max_client_connections,
    raise_file_limit,
    wrap_tls,
)

MAX_REPEATS = 5
REPEAT_SECONDS = 10.0
MAX_TRACKED_LINES = 1000
"""Maximum number of different lines that are counted at once."""
ACCESS_LOGGER_NAME = "serving.access"
LOGGER = logging.getLogger("serving.repeats")

LineKey = tuple[str, int, str]
"""(logger, level, first line of the message before formatting)."""


class ShutdownState(Protocol):
    """`GracefulServer` sets `shutting_down` on SIGTERM, so that the service reports that it is not ready."""

    shutting_down: bool


@dataclass
class ShutdownFlag:
    """A `ShutdownState` without other fields."""

    shutting_down: bool = False


class GracefulServer(uvicorn.Server):
    """After SIGTERM sets `shutdown.shutting_down`, answers for another `drain_seconds` and then stops listening."""

    def __init__(self, config: uvicorn.Config, shutdown: ShutdownState, drain_seconds: float) -> None:
        super().__init__(config)
        self._shutdown = shutdown
        self._drain_seconds = drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Delays the shutdown on the first SIGTERM; any other signal shuts down immediately."""
        if sig != signal.SIGTERM or self._shutdown.shutting_down or not self.started:
            super().handle_exit(sig, frame)
            return
        self._shutdown.shutting_down = True
        self._captured_signals.append(sig)
        self._loop.call_soon_threadsafe(self._loop.call_later, self._drain_seconds, self._request_exit)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves until a signal stops it."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to listen.

        asyncio accepts up to `backlog` connections per turn of the event loop, so uvicorn gets a small backlog, and the
        sockets then listen with the large one.
        """
        if self.config.ssl is not None:
            protocol, context = self.config.http_protocol_class, self.config.ssl
            self.config.http_protocol_class, self.config.ssl = wrap_tls(protocol, context), None  # type: ignore[assignment, arg-type]
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)

    def _request_exit(self) -> None:
        self.should_exit = True


def http_config(
    app: object,
    config: ListenerConfig,
    *,
    certificate: Path | None = None,
    key: Path | None = None,
    upstream: bool = False,
) -> uvicorn.Config:
    """uvicorn's settings for both services; `upstream` reserves open files for connections that the service opens."""
    connections = Connections(max_client_connections(upstream=upstream))
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=partial(BoundedProtocol, connections=connections),  # type: ignore[arg-type]
        backlog=ACCEPTS_PER_TURN,
        h11_max_incomplete_event_size=PARSE_BYTES,
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=config.grace,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )


def prepare_process() -> None:
    """Sets up signals, logging, limits and garbage collection of a serving process; SIGTERM ends it with status 0."""
    signal.signal(signal.SIGTERM, _exit_process)
    _log_to_stderr()
    raise_file_limit()
    reset_garbage_collector()


def _exit_process(signum: int, frame: FrameType | None) -> None:
    """Exits with status 0: uvicorn raises the signal again after its graceful shutdown."""
    raise SystemExit(0)


def check_tls(certificate: Path | None, key: Path | None) -> None:
    """Raises ConfigError if a certificate and its key cannot be used together."""
    if certificate is None or key is None:
        return
    try:
        # Without a passphrase OpenSSL would prompt for one at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except OSError as error:  # SSLError is a subclass
        text = f"--tls-certificate {certificate}: cannot be used with --tls-key {key}"
        remedy = "give a certificate and its private key, both in PEM format, without a passphrase"
        raise ConfigError(f"{text} ({error.strerror or error}); {remedy}") from error


@contextlib.contextmanager
def bind(host: str, port: int) -> Iterator[socket.socket]:
    """Yields a socket that is bound to the address and not listening yet; raises ConfigError if it cannot be bound."""
    with address_errors(host, port):
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with address_errors(host, port):
            listener.bind(address)
        yield listener


@contextlib.contextmanager
def address_errors(host: str, port: int) -> Iterator[None]:
    """Translates errors of binding an address to ConfigError with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            text = f"{host}:{port}: in use by another process; stop it or choose another --port (0: any free one)"
        elif error.errno == errno.EACCES:
            text = f"{host}:{port}: needs root privileges; choose a --port above 1023"
        else:
            text = f"{host}:{port}: not an address of this machine ({error.strerror}); try --host 127.0.0.1"
        raise ConfigError(text) from error


def format_url(listener: socket.socket, scheme: str = "http") -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


@dataclass
class _RepeatCount:
    expires_at: float
    count: int = 0


class RepeatFilter(logging.Filter):
    """Passes at most `MAX_REPEATS` records with the same logger, level and first line per `REPEAT_SECONDS`.

    The access log is exempt. The number of suppressed records is logged in a separate line.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lines: dict[LineKey, _RepeatCount] = {}
        self._next_check = 0.0
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written."""
        if record.name == LOGGER.name:
            return True
        with self._lock:
            suppressed = self._pop_expired(time.monotonic())
            is_written = record.name == ACCESS_LOGGER_NAME or self._count_record(record) <= MAX_REPEATS
        for (name, level, text), line in suppressed:
            LOGGER.log(level, "%s: %d more lines like this were suppressed: %s", name, line.count - MAX_REPEATS, text)
        return is_written

    def _count_record(self, record: logging.LogRecord) -> int:
        """Counts a record; returns the number of similar ones in the current interval, including this one."""
        key = (record.name, record.levelno, str(record.msg).partition("\n")[0][:200])
        if key not in self._lines and len(self._lines) >= MAX_TRACKED_LINES:
            key = (record.name, record.levelno, "other lines")
        line = self._lines.setdefault(key, _RepeatCount(time.monotonic() + REPEAT_SECONDS))
        line.count += 1
        return line.count

    def _pop_expired(self, now: float) -> list[tuple[LineKey, _RepeatCount]]:
        """Removes expired lines and returns those with suppressed records; checks once a second."""
        if now < self._next_check:
            return []
        self._next_check = now + 1.0
        expired = [(key, line) for key, line in self._lines.items() if line.expires_at <= now]
        for key, _ in expired:
            del self._lines[key]
        return [(key, line) for key, line in expired if line.count > MAX_REPEATS]


def _log_to_stderr() -> None:
    """Logs plain lines to stderr, with repeated ones suppressed and counted."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    for handler in logging.getLogger().handlers:
        if not any(isinstance(existing, RepeatFilter) for existing in handler.filters):
            handler.addFilter(RepeatFilter())
