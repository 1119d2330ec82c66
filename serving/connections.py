"""Connections of a service: their number, and an HTTP/1.1 protocol with limits on slow and wasteful clients.

The number stays below the process's limit on open files: a new connection closes the one that has been idle longest.
uvicorn only closes connections that are idle between requests. It has no limit on the number of connections, on the
time until the head of a request is complete, or on clients that do not read their response.
"""

import asyncio
import math
import resource
import ssl
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

KEEP_ALIVE_SECONDS = 620
"""How long a connection may be idle. Longer than clients and load balancers keep it (httpx 5 s, Google's load balancers
600 s): if we closed it first, a request that they have just sent on it would fail."""
BUSY_KEEP_ALIVE_SECONDS = 5
"""How long a connection may be idle while more than half of the allowed connections are open."""
MAX_CONNECTIONS = 8192
"""Maximum connections, whatever the limit on open files is: an idle connection takes about 20 KB."""
MAX_FILES = 65_536
"""The limit on open files is not raised beyond this: some programs loop over all descriptors below it."""
MIN_CONNECTIONS = 8
RESERVED_FILES = 96
"""Open files for models, logs, DNS, and connections that are accepted but not counted yet (three turns of the event
loop)."""
ACCEPTS_PER_TURN = 16
"""Connections accepted in one turn of the event loop."""
BACKLOG = 2048
"""Connections that the operating system queues until they are accepted."""
HEAD_SECONDS = 10.0
"""Time limit for the head of a request, and for the rest of a body whose request has been answered already."""
READ_SECONDS = 30.0
MIN_BYTES_PER_SECOND = 1000
"""Minimum rate at which a client must read its response, checked every `READ_SECONDS`."""
MAX_HEADERS = 100
SMALL_PART_BYTES = 64
MAX_SMALL_PARTS = 16_384
"""Maximum parts of a body with fewer than `SMALL_PART_BYTES`; each costs as much work as one of 64 KB."""
PARSE_BYTES = 16_384
"""Bytes that are parsed at once, so that the length of a head is checked before all of it is parsed."""
_OVERLOAD_BODY = b'{"error": "the service has too many connections; try again later"}'
OVERLOAD_RESPONSE = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_OVERLOAD_BODY), _OVERLOAD_BODY)
)


class Connection(Protocol):
    """A connection that can be counted and closed."""

    def evict(self) -> None:
        """Closes the connection immediately."""


@dataclass(eq=False)
class Connections:
    """The open connections. Those without a request are idle; they are kept in order, longest idle first."""

    max_connections: int = MAX_CONNECTIONS
    _open: set[Connection] = field(default_factory=set)
    _idle: dict[Connection, None] = field(default_factory=dict)

    def admit(self, connection: Connection) -> bool:
        """Adds a connection; at the limit it closes the longest idle one, or returns False if none is idle."""
        if len(self._open) >= self.max_connections:
            oldest_idle = next(iter(self._idle), None)
            if oldest_idle is None:
                return False
            self.remove(oldest_idle)
            oldest_idle.evict()
        self._open.add(connection)
        self._idle[connection] = None
        return True

    def mark(self, connection: Connection, *, idle: bool) -> None:
        """Marks a connection as idle or busy; if it was already idle, it keeps its place in the order."""
        if connection not in self._open:
            return
        if not idle:
            self._idle.pop(connection, None)
        elif connection not in self._idle:
            self._idle[connection] = None

    def renew(self, connection: Connection) -> None:
        """Restarts the idle time of a connection."""
        self._idle.pop(connection, None)
        self.mark(connection, idle=True)

    def remove(self, connection: Connection) -> None:
        """Removes a connection."""
        self._open.discard(connection)
        self._idle.pop(connection, None)

    @property
    def keep_alive(self) -> int:
        """Seconds that a connection may stay idle."""
        return BUSY_KEEP_ALIVE_SECONDS if 2 * len(self._open) > self.max_connections else KEEP_ALIVE_SECONDS


def raise_file_limit() -> None:
    """Raises the soft limit on open files to the hard limit, at most `MAX_FILES`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    new_limit = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < new_limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (new_limit, hard))


def max_client_connections(*, upstream: bool = False) -> int:
    """How many client connections fit below the limit on open files, given the files that are open now.

    With `upstream` half of the files are reserved for connections that the service opens itself, see
    `max_upstream_connections`.
    """
    spare = _spare_files() // 2 if upstream else _spare_files()
    return max(MIN_CONNECTIONS, min(spare, MAX_CONNECTIONS))


def max_upstream_connections() -> int:
    """How many connections a gateway may open in total, to LLMs and to the scorer's service."""
    return max(MIN_CONNECTIONS, min(_spare_files() // 2, MAX_CONNECTIONS))


def _spare_files() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_FILES
    folder = next((path for path in (Path("/proc/self/fd"), Path("/dev/fd")) if path.exists()), None)
    num_open = sum(1 for _ in folder.iterdir()) if folder else 32
    return soft - num_open - RESERVED_FILES


class _BoundedParser(h11.Connection):
    """Refuses requests with too many headers and bodies in too many small parts."""

    _num_small_parts = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA | h11.PAUSED]:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._num_small_parts = 0
            if {b"content-length", b"transfer-encoding"} <= {name for name, _ in event.headers}:
                # RFC 9112, section 6.3: a proxy in front may have seen a different end of the body.
                raise h11.RemoteProtocolError("both Content-Length and Transfer-Encoding")
            if len(event.headers) > MAX_HEADERS:
                raise h11.RemoteProtocolError("too many headers", error_status_hint=431)
        elif isinstance(event, h11.Data) and len(event.data) < SMALL_PART_BYTES:
            self._num_small_parts += 1
            if self._num_small_parts > MAX_SMALL_PARTS:
                raise h11.RemoteProtocolError("too many small parts", error_status_hint=413)
        return event


class BoundedProtocol(H11Protocol):
    """HTTP/1.1. Closes connections that send no complete head within `HEAD_SECONDS`, or do not read their response.

    It is counted in `connections`, which may close it while it is idle.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, object],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        connections: Connections | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = _BoundedParser(h11.SERVER, self.config.h11_max_incomplete_event_size or PARSE_BYTES)
        self._connections = connections or Connections()
        self._handshake: Connection | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # always a Transport
        """Starts the timer for the first head, or answers 503 if there are too many connections."""
        super().connection_made(transport)
        if self._handshake is not None:
            self._connections.remove(self._handshake)
        if self._connections.admit(self):
            self._start_head_timer()
        else:
            transport.write(OVERLOAD_RESPONSE)
            transport.close()

    def data_received(self, data: bytes) -> None:
        """Stops the head timer once a request has started; starts it for an incomplete head."""
        for start in range(0, len(data), PARSE_BYTES):
            if self.transport.is_closing():
                return
            super().data_received(data[start : start + PARSE_BYTES])
        answering = self._is_answering()
        self._connections.mark(self, idle=not answering)
        if answering or not (self.conn.trailing_data[0] or self.conn.their_state is h11.SEND_BODY):
            self._stop_head_timer()
        elif self._head_timer is None:
            self._start_head_timer()

    def on_response_complete(self) -> None:
        """Sets the keep-alive time by the number of open connections."""
        self.timeout_keep_alive = self._connections.keep_alive
        super().on_response_complete()
        if not self._is_answering():
            self._connections.renew(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops all timers."""
        self._connections.remove(self)
        self._stop_head_timer()
        self._stop_read_timer()
        super().connection_lost(exc)

    def evict(self) -> None:
        """Closes the connection immediately."""
        self.transport.abort()

    def pause_writing(self) -> None:
        """Starts to check that the client reads the response."""
        super().pause_writing()
        self._start_read_timer(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Stops the check: the client has read enough."""
        self._stop_read_timer()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Closes an idle connection, immediately if the client has not read its last response."""
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answers invalid HTTP with 400, unless another response is being sent."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._on_head_timeout)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_head_timeout(self) -> None:
        self._head_timer = None
        if not self._is_answering() and not self.transport.is_closing():
            self.transport.close()

    def _start_read_timer(self, size: int) -> None:
        self._stop_read_timer()
        self._read_timer = self.loop.call_later(READ_SECONDS, self._check_progress, size)

    def _check_progress(self, previous_size: int) -> None:
        """Closes the connection if the client has read less than `MIN_BYTES_PER_SECOND` since the last check."""
        size = self.transport.get_write_buffer_size()
        if previous_size - size < MIN_BYTES_PER_SECOND * READ_SECONDS:
            self.transport.abort()
        else:
            self._start_read_timer(size)

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def attach_handshake(self, handshake: Connection) -> Connections:
        """Stores a handshake and returns the connections that count it; `connection_made` counts this one instead."""
        self._handshake = handshake
        return self._connections


class TlsHandshake(SSLProtocol):
    """TLS of one connection. It is counted, and has a time limit, from the start of the handshake.

    asyncio's own server allows a minute for each handshake and calls the protocol only after it.
    """

    def __init__(self, inner: BoundedProtocol, context: ssl.SSLContext) -> None:
        loop = asyncio.get_running_loop()
        seconds = math.ceil(HEAD_SECONDS)
        # None: no future waits for the handshake.
        super().__init__(loop, inner, context, None, server_side=True, ssl_handshake_timeout=seconds)  # type: ignore[arg-type]
        self._connections = inner.attach_handshake(self)
        self._raw: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # always a Transport
        """Starts the handshake unless there are too many connections."""
        self._raw = transport
        if self._connections.admit(self):
            super().connection_made(transport)
        else:
            transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Removes it from the count."""
        self._connections.remove(self)
        super().connection_lost(exc)

    def evict(self) -> None:
        """Closes the connection immediately."""
        if self._raw is not None:
            self._raw.abort()


def wrap_tls(make_protocol: Callable[..., BoundedProtocol], context: ssl.SSLContext) -> Callable[..., TlsHandshake]:
    """Wraps a protocol factory in TLS, for a server that itself listens without TLS."""
    return lambda **settings: TlsHandshake(make_protocol(**settings), context)
