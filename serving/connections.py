"""The connections of a service: how many there are, and HTTP/1.1 with limits on slow, numerous and wasteful clients.

There are fewer than the files that the process may open; the longest idle one is closed for a new one. uvicorn ends
idle connections between requests, but waits for ever for a first head, for the rest of any, for a client that does not
read its answer, and takes as many connections as come.
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
"""Longer than clients and balancers keep a connection (httpx 5 s, Google's balancers 600 s): were it closed on our
side, a request that they just sent on it would fail."""
BUSY_KEEP_ALIVE_SECONDS = 5
"""The same where more than half of the allowed connections are open."""
MAX_CONNECTIONS = 8192
"""Whatever the limit on files: an idle connection takes about 20 KB."""
MAX_FILES = 65_536
"""The limit on files is not raised further: some programs loop over all numbers below it."""
MIN_CONNECTIONS = 8
RESERVED_FILES = 96
"""For what is accepted and not counted yet (three turns of the event loop), and for models, logs and look-ups."""
ACCEPTS_PER_TURN = 16
"""Connections that are accepted in one turn of the event loop."""
BACKLOG = 2048
"""Connections that the system keeps waiting meanwhile."""
HEAD_SECONDS = 10.0
"""Within which a head must arrive, and the rest of a body whose request has been answered already."""
READ_SECONDS = 30.0
MIN_BYTES_PER_SECOND = 1000
"""Bytes of an answer that a client must take in a second, looked at every `READ_SECONDS`."""
MAX_HEADERS = 100
SMALL_PART_BYTES = 64
MAX_SMALL_PARTS = 16_384
"""Parts of a body with fewer than `SMALL` bytes; each costs as much work as one of 64 KB."""
PARSE_BYTES = 16_384
"""Bytes that are parsed together, so that a head is not read to its end before its length is looked at."""
_FULL_BODY = b'{"error": "the service has no room for another connection; ask again later"}'
FULL_RESPONSE = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_FULL_BODY), _FULL_BODY)
)


class Connection(Protocol):
    """What is counted."""

    def evict(self) -> None:
        """Closes it at once."""


@dataclass(eq=False)
class Connections:
    """Which connections are open, and which of them are idle: without a request, the longest idle one first."""

    max_connections: int = MAX_CONNECTIONS
    _open: set[Connection] = field(default_factory=set)
    _idle: dict[Connection, None] = field(default_factory=dict)

    def admit(self, connection: Connection) -> bool:
        """Counts a new connection; where there are too many the longest idle one goes, and False if none is idle."""
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
        """Says whether a connection has a request; one that is idle already keeps its place."""
        if connection not in self._open:
            return
        if not idle:
            self._idle.pop(connection, None)
        elif connection not in self._idle:
            self._idle[connection] = None

    def renew(self, connection: Connection) -> None:
        """Counts a connection as idle from now on."""
        self._idle.pop(connection, None)
        self.mark(connection, idle=True)

    def remove(self, connection: Connection) -> None:
        """Counts it no more."""
        self._open.discard(connection)
        self._idle.pop(connection, None)

    @property
    def keep_alive(self) -> int:
        """Seconds that a connection may be idle from now on."""
        return BUSY_KEEP_ALIVE_SECONDS if 2 * len(self._open) > self.max_connections else KEEP_ALIVE_SECONDS


def raise_file_limit() -> None:
    """Lets this process open as many files as its user may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    new_limit = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < new_limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (new_limit, hard))


def max_client_connections(*, upstream: bool = False) -> int:
    """How many connections of clients fit below the limit on files, of those that are open now.

    With `upstream` half of them is left to connections that the service opens itself, see `connections_upstream`.
    """
    spare = _spare_files() // 2 if upstream else _spare_files()
    return max(MIN_CONNECTIONS, min(spare, MAX_CONNECTIONS))


def max_upstream_connections() -> int:
    """How many connections a gateway may open to LLMs and the scorer's service, all of them together."""
    return max(MIN_CONNECTIONS, min(_spare_files() // 2, MAX_CONNECTIONS))


def _spare_files() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_FILES
    folder = next((path for path in (Path("/proc/self/fd"), Path("/dev/fd")) if path.exists()), None)
    num_open = sum(1 for _ in folder.iterdir()) if folder else 32
    return soft - num_open - RESERVED_FILES


class _BoundedParser(h11.Connection):
    """Refuses heads of many headers and bodies in very many very small parts."""

    _num_small_parts = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA | h11.PAUSED]:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._num_small_parts = 0
            if {b"content-length", b"transfer-encoding"} <= {name for name, _ in event.headers}:
                # RFC 9112, section 6.3: a proxy in front may have read another end of the body.
                raise h11.RemoteProtocolError("both Content-Length and Transfer-Encoding")
            if len(event.headers) > MAX_HEADERS:
                raise h11.RemoteProtocolError("too many headers", error_status_hint=431)
        elif isinstance(event, h11.Data) and len(event.data) < SMALL_PART_BYTES:
            self._num_small_parts += 1
            if self._num_small_parts > MAX_SMALL_PARTS:
                raise h11.RemoteProtocolError("too many small parts", error_status_hint=413)
        return event


class BoundedProtocol(H11Protocol):
    """Closes a connection that brings no head, or a part of one, within `HEAD_SECONDS`, or does not read its answer.

    It is counted in `connections`, which close it while it is idle where room is needed.
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

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # sockets have no other
        """Begins to wait for the first head, or says that there is no room."""
        super().connection_made(transport)
        if self._handshake is not None:
            self._connections.remove(self._handshake)
        if self._connections.admit(self):
            self._start_head_timer()
        else:
            transport.write(FULL_RESPONSE)
            transport.close()

    def data_received(self, data: bytes) -> None:
        """Stops waiting once a request has begun; waits for the rest of one that has not."""
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
        """Lets the connection be idle for as long as there is room for it."""
        self.timeout_keep_alive = self._connections.keep_alive
        super().on_response_complete()
        if not self._is_answering():
            self._connections.renew(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits no longer."""
        self._connections.remove(self)
        self._stop_head_timer()
        self._stop_read_timer()
        super().connection_lost(exc)

    def evict(self) -> None:
        """Closes it at once."""
        self.transport.abort()

    def pause_writing(self) -> None:
        """Begins to look whether the client reads its answer."""
        super().pause_writing()
        self._start_read_timer(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """The client has read enough of it."""
        self._stop_read_timer()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Closes an idle connection, at once if the client has not read its last answer."""
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answers invalid HTTP, unless another answer is being sent."""
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
        """Ends a connection whose client has taken less than `SLOWEST` bytes a second since the last look."""
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
        """Takes the place of a TLS handshake once that is done; where both are counted."""
        self._handshake = handshake
        return self._connections


class TlsHandshake(SSLProtocol):
    """The TLS of one connection, counted and timed from its first byte on.

    asyncio's own server allows a minute for each handshake, and calls no protocol until it is done.
    """

    def __init__(self, inner: BoundedProtocol, context: ssl.SSLContext) -> None:
        loop = asyncio.get_running_loop()
        seconds = math.ceil(HEAD_SECONDS)
        # None: no future waits for the handshake.
        super().__init__(loop, inner, context, None, server_side=True, ssl_handshake_timeout=seconds)  # type: ignore[arg-type]
        self._connections = inner.attach_handshake(self)
        self._raw: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # sockets have no other
        """Begins the handshake if there is room."""
        self._raw = transport
        if self._connections.admit(self):
            super().connection_made(transport)
        else:
            transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Counts it no more."""
        self._connections.remove(self)
        super().connection_lost(exc)

    def evict(self) -> None:
        """Closes it at once."""
        if self._raw is not None:
            self._raw.abort()


def wrap_tls(make_protocol: Callable[..., BoundedProtocol], context: ssl.SSLContext) -> Callable[..., TlsHandshake]:
    """What makes the protocol of a connection over TLS, for a server that listens without."""
    return lambda **settings: TlsHandshake(make_protocol(**settings), context)
