"""How many connections a service holds: fewer than it may open files, the longest idle ones closed for new ones."""

import resource
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

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
