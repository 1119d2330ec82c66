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
PRESSED_SECONDS = 5
"""The same where more than half of the allowed connections are open."""
MAX_CONNECTIONS = 8192
"""Whatever the limit on files: an idle connection takes about 20 KB."""
MAX_FILES = 65_536
"""The limit on files is not raised further: some programs loop over all numbers below it."""
FEWEST = 8
RESERVED_FILES = 96
"""For what is accepted and not counted yet (three turns of the event loop), and for models, logs and look-ups."""
ACCEPTS = 16
"""Connections that are accepted in one turn of the event loop."""
BACKLOG = 2048
"""Connections that the system keeps waiting meanwhile."""
HEAD_SECONDS = 10.0
"""Within which a head must arrive, and the rest of a body whose request has been answered already."""
READ_SECONDS = 30.0
SLOWEST = 1000
"""Bytes of an answer that a client must take in a second, looked at every `READ_SECONDS`."""
MAX_HEADERS = 100
SMALL = 64
MAX_SMALL_PARTS = 16_384
"""Parts of a body with fewer than `SMALL` bytes; each costs as much work as one of 64 KB."""
AT_ONCE = 16_384
"""Bytes that are parsed together, so that a head is not read to its end before its length is looked at."""
_FULL_BODY = b'{"error": "the service has no room for another connection; ask again later"}'
FULL = (
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

    most: int = MAX_CONNECTIONS
    _open: set[Connection] = field(default_factory=set)
    _idle: dict[Connection, None] = field(default_factory=dict)

    def admit(self, connection: Connection) -> bool:
        """Counts a new connection; where there are too many the longest idle one goes, and False if none is idle."""
        if len(self._open) >= self.most:
            longest = next(iter(self._idle), None)
            if longest is None:
                return False
            self.remove(longest)
            longest.evict()
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
        return PRESSED_SECONDS if 2 * len(self._open) > self.most else KEEP_ALIVE_SECONDS


def raise_file_limit() -> None:
    """Lets this process open as many files as its user may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def connections_for_clients(*, upstream: bool = False) -> int:
    """How many connections of clients fit below the limit on files, of those that are open now.

    With `upstream` half of them is left to connections that the service opens itself, see `connections_upstream`.
    """
    spare = _spare_files() // 2 if upstream else _spare_files()
    return max(FEWEST, min(spare, MAX_CONNECTIONS))


def connections_upstream() -> int:
    """How many connections a gateway may open to LLMs and the scorer's service, all of them together."""
    return max(FEWEST, min(_spare_files() // 2, MAX_CONNECTIONS))


def _spare_files() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_FILES
    folder = next((path for path in (Path("/proc/self/fd"), Path("/dev/fd")) if path.exists()), None)
    opened = sum(1 for _ in folder.iterdir()) if folder else 32
    return soft - opened - RESERVED_FILES


class _BoundedParser(h11.Connection):
    """Refuses heads of many headers and bodies in very many very small parts."""

    _small = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA | h11.PAUSED]:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._small = 0
            if {b"content-length", b"transfer-encoding"} <= {name for name, _ in event.headers}:
                # RFC 9112, section 6.3: a proxy in front may have read another end of the body.
                raise h11.RemoteProtocolError("both Content-Length and Transfer-Encoding")
            if len(event.headers) > MAX_HEADERS:
                raise h11.RemoteProtocolError("too many headers", error_status_hint=431)
        elif isinstance(event, h11.Data) and len(event.data) < SMALL:
            self._small += 1
            if self._small > MAX_SMALL_PARTS:
                raise h11.RemoteProtocolError("too many small parts", error_status_hint=413)
        return event


class PunctualProtocol(H11Protocol):
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
        self.conn = _BoundedParser(h11.SERVER, self.config.h11_max_incomplete_event_size or AT_ONCE)
        self._counted = connections or Connections()
        self._handshake: Connection | None = None
        self._overdue: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # sockets have no other
        """Begins to wait for the first head, or says that there is no room."""
        super().connection_made(transport)
        if self._handshake is not None:
            self._counted.remove(self._handshake)
        if self._counted.admit(self):
            self._wait()
        else:
            transport.write(FULL)
            transport.close()

    def data_received(self, data: bytes) -> None:
        """Stops waiting once a request has begun; waits for the rest of one that has not."""
        for start in range(0, len(data), AT_ONCE):
            if self.transport.is_closing():
                return
            super().data_received(data[start : start + AT_ONCE])
        served = self._is_answering()
        self._counted.mark(self, idle=not served)
        if served or not (self.conn.trailing_data[0] or self.conn.their_state is h11.SEND_BODY):
            self._stop()
        elif self._overdue is None:
            self._wait()

    def on_response_complete(self) -> None:
        """Lets the connection be idle for as long as there is room for it."""
        self.timeout_keep_alive = self._counted.keep_alive
        super().on_response_complete()
        if not self._is_answering():
            self._counted.renew(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits no longer."""
        self._counted.remove(self)
        self._stop()
        self._stop_reading()
        super().connection_lost(exc)

    def evict(self) -> None:
        """Closes it at once."""
        self.transport.abort()

    def pause_writing(self) -> None:
        """Begins to look whether the client reads its answer."""
        super().pause_writing()
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """The client has read enough of it."""
        self._stop_reading()
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

    def _wait(self) -> None:
        self._overdue = self.loop.call_later(HEAD_SECONDS, self._end)

    def _stop(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None

    def _end(self) -> None:
        self._overdue = None
        if not self._is_answering() and not self.transport.is_closing():
            self.transport.close()

    def _watch(self, size: int) -> None:
        self._stop_reading()
        self._unread = self.loop.call_later(READ_SECONDS, self._look, size)

    def _look(self, before: int) -> None:
        """Ends a connection whose client has taken less than `SLOWEST` bytes a second since the last look."""
        left = self.transport.get_write_buffer_size()
        if before - left < SLOWEST * READ_SECONDS:
            self.transport.abort()
        else:
            self._watch(left)

    def _stop_reading(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def behind(self, handshake: Connection) -> Connections:
        """Takes the place of a TLS handshake once that is done; where both are counted."""
        self._handshake = handshake
        return self._counted


class TlsHandshake(SSLProtocol):
    """The TLS of one connection, counted and timed from its first byte on.

    asyncio's own server allows a minute for each handshake, and calls no protocol until it is done.
    """

    def __init__(self, inner: PunctualProtocol, context: ssl.SSLContext) -> None:
        loop = asyncio.get_running_loop()
        seconds = math.ceil(HEAD_SECONDS)
        # None: no future waits for the handshake.
        super().__init__(loop, inner, context, None, server_side=True, ssl_handshake_timeout=seconds)  # type: ignore[arg-type]
        self._counted = inner.behind(self)
        self._raw: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # sockets have no other
        """Begins the handshake if there is room."""
        self._raw = transport
        if self._counted.admit(self):
            super().connection_made(transport)
        else:
            transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Counts it no more."""
        self._counted.remove(self)
        super().connection_lost(exc)

    def evict(self) -> None:
        """Closes it at once."""
        if self._raw is not None:
            self._raw.abort()


def with_tls(make: Callable[..., PunctualProtocol], context: ssl.SSLContext) -> Callable[..., TlsHandshake]:
    """What makes the protocol of a connection over TLS, for a server that listens without."""
    return lambda **settings: TlsHandshake(make(**settings), context)
