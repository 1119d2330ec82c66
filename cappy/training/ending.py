"""When a checkpoint is due, and when the machine wants the process to end."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

CONTINUES = "run the same command again to continue"
"""What the error of a run says that lost nothing and has nothing to mend."""


class Ending:
    """Knows, while its block runs, whether SIGTERM asked this process to end; outside, SIGTERM ends it at once.

    Only a process's main thread can listen; elsewhere nothing is ever asked.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None
        self._listens = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Ending":
        if self._listens:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._before)

    def asked(self) -> bool:
        """Whether SIGTERM came."""
        return self._asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True


class Clock:
    """Says when a checkpoint is due: so many seconds, or so many updates, after the last one."""

    def __init__(self, seconds: float, updates: int | None) -> None:
        self._seconds, self._updates = seconds, updates
        self._last = time.monotonic()

    def due(self, update: int) -> bool:
        """Whether one is due after this update (1-based); asking for one begins the seconds anew."""
        by_update = self._updates is not None and update % self._updates == 0
        due = by_update or time.monotonic() - self._last >= self._seconds
        if due:
            self._last = time.monotonic()
        return due
