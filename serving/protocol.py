"""HTTP/1.1 for uvicorn, with an end to clients that are slow on purpose: the head of a request must arrive in time."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0


class PunctualProtocol(H11Protocol):
    """Closes a connection that brings no head at all, or a part of one, within `HEAD_SECONDS`.

    uvicorn ends idle connections between requests, but waits for ever for a first head and for the rest of any.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._overdue: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begins to wait for the first head."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Stops waiting once a request has begun; waits for the rest of one that has not."""
        super().data_received(data)
        if self._served() or not self.conn.trailing_data[0]:
            self._stop()
        elif self._overdue is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits no longer."""
        self._stop()
        super().connection_lost(exc)

    def _served(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        self._overdue = self.loop.call_later(HEAD_SECONDS, self._end)

    def _stop(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None

    def _end(self) -> None:
        self._overdue = None
        if not self._served() and not self.transport.is_closing():
            self.transport.close()
