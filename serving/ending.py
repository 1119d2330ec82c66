"""How both services end: notice is given before the door is closed, so that a balancer can look elsewhere."""

import asyncio
import signal
import socket
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

import uvicorn

from serving.connections import BACKLOG
from serving.protocol import with_tls

ENDING = "the service was told to end"


class Closes(Protocol):
    """What is told that the end has begun."""

    closing: bool


@dataclass
class Door:
    """Whether the service has been told to end."""

    closing: bool = False


class NoticeServer(uvicorn.Server):
    """Answers for `notice_seconds` after SIGTERM, while `door.closing` is true, and closes the door then."""

    def __init__(self, config: uvicorn.Config, door: Closes, notice_seconds: float) -> None:
        super().__init__(config)
        self._door = door
        self._notice_seconds = notice_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first SIGTERM: not ready, and closed a little later; any other signal at once."""
        if sig != signal.SIGTERM or self._door.closing or not self.started:
            super().handle_exit(sig, frame)
            return
        self._door.closing = True
        self._captured_signals.append(sig)
        self._loop.call_soon_threadsafe(self._loop.call_later, self._notice_seconds, self._close)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves until told to end."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens; asyncio takes few connections in a turn, and the system keeps many waiting."""
        if self.config.ssl is not None:
            protocol, context = self.config.http_protocol_class, self.config.ssl
            self.config.http_protocol_class, self.config.ssl = with_tls(protocol, context), None  # type: ignore[assignment, arg-type]
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)

    def _close(self) -> None:
        self.should_exit = True
