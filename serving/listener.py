"""How both services listen, speak HTTP, log and end: notice is given before they take no more connections."""

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
"""Different lines that are remembered at once."""
ACCESS_LOGGER_NAME = "serving.access"
LOGGER = logging.getLogger("serving.repeats")

LineKey = tuple[str, int, str]
"""Logger, level, first line of the message before its values are put in."""


class ShutdownState(Protocol):
    """Whether the service is shutting down."""

    shutting_down: bool


@dataclass
class Shutdown:
    """Whether the service is shutting down."""

    shutting_down: bool = False


class GracefulServer(uvicorn.Server):
    """Answers for `notice` seconds after SIGTERM, while `shutdown.closing` is true, and takes no connections then."""

    def __init__(self, config: uvicorn.Config, shutdown: ShutdownState, notice: float) -> None:
        super().__init__(config)
        self._shutdown = shutdown
        self._notice = notice

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first SIGTERM: not ready, and closed a little later; any other signal at once."""
        if sig != signal.SIGTERM or self._shutdown.shutting_down or not self.started:
            super().handle_exit(sig, frame)
            return
        self._shutdown.shutting_down = True
        self._captured_signals.append(sig)
        self._loop.call_soon_threadsafe(self._loop.call_later, self._notice, self._request_exit)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves until it is asked to stop."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens; asyncio takes few connections in a turn, and the system keeps many waiting."""
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
    """How both services speak HTTP: punctual clients, patient connections, a time to finish in.

    `upstream` says that the service opens connections itself, and needs files for them.
    """
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
    """Signals, log and limits of a process that serves: SIGTERM ends it with status 0."""
    signal.signal(signal.SIGTERM, _exit_process)
    _log_to_stderr()
    raise_file_limit()


def _exit_process(signum: int, frame: FrameType | None) -> None:
    """uvicorn raises the signal again after its own graceful stop, so this decides the status."""
    raise SystemExit(0)


def check_tls(certificate: Path | None, key: Path | None) -> None:
    """ConfigError where a certificate and its key do not go together."""
    if certificate is None or key is None:
        return
    try:
        # An empty passphrase, or OpenSSL would ask for one at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except OSError as error:  # SSLError is one
        text = f"--tls-certificate {certificate}: cannot be used with --tls-key {key}"
        remedy = "give a certificate and the private key that belongs to it, both in PEM form, without a passphrase"
        raise ConfigError(f"{text} ({error.strerror or error}); {remedy}") from error


@contextlib.contextmanager
def bind(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that holds the address and does not listen yet; ConfigError if it cannot be had."""
    with address_errors(host, port):
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with address_errors(host, port):
            listener.bind(address)
        yield listener


@contextlib.contextmanager
def address_errors(host: str, port: int) -> Iterator[None]:
    """What keeps a socket from its address becomes one line with its remedy."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            text = f"{host}:{port}: is in use by another process; stop it or choose another --port (0: any free one)"
        elif error.errno == errno.EACCES:
            text = f"{host}:{port}: may not be used without root's rights; choose a --port above 1023"
        else:
            text = f"{host}:{port}: is not an address of this machine ({error.strerror}); try --host 127.0.0.1"
        raise ConfigError(text) from error


def format_url(listener: socket.socket, scheme: str = "http") -> str:
    """The address that a socket listens on."""
    host, port = listener.getsockname()[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


@dataclass
class _RepeatCount:
    expires_at: float
    count: int = 0


class RepeatFilter(logging.Filter):
    """Lets `REPEATS_WRITTEN` records of the same logger, level and first line of a message through in `REPEAT_SECONDS`.

    Records of the access log pass: they are one a request. What was left out is counted in a line of its own.
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
            LOGGER.log(level, "%s: %d more like this were left out: %s", name, line.count - MAX_REPEATS, text)
        return is_written

    def _count_record(self, record: logging.LogRecord) -> int:
        """How many of the record's line there were in its time, this one included."""
        key = (record.name, record.levelno, str(record.msg).partition("\n")[0][:200])
        if key not in self._lines and len(self._lines) >= MAX_TRACKED_LINES:
            key = (record.name, record.levelno, "lines of many kinds")
        line = self._lines.setdefault(key, _RepeatCount(time.monotonic() + REPEAT_SECONDS))
        line.count += 1
        return line.count

    def _pop_expired(self, now: float) -> list[tuple[LineKey, _RepeatCount]]:
        """Forgets lines whose time is over, and gives those of which some were left out; looks once a second."""
        if now < self._next_check:
            return []
        self._next_check = now + 1.0
        expired = [(key, line) for key, line in self._lines.items() if line.expires_at <= now]
        for key, _ in expired:
            del self._lines[key]
        return [(key, line) for key, line in expired if line.count > MAX_REPEATS]


def _log_to_stderr() -> None:
    """The log of a service: plain lines on stderr, repeated ones counted."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    for handler in logging.getLogger().handlers:
        if not any(isinstance(existing, RepeatFilter) for existing in handler.filters):
            handler.addFilter(RepeatFilter())
