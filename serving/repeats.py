"""A log that does not grow without end: of the same line a few are written, then how many were left out."""

import logging
import sys
import threading
import time
from dataclasses import dataclass

WRITTEN = 5
SECONDS = 10.0
KNOWN = 1000
"""Different lines that are remembered at once."""
ACCESS = "serving.access"
LOGGER = logging.getLogger("serving.repeats")

Key = tuple[str, int, str]
"""Logger, level, first line of the message before its values are put in."""


@dataclass
class _Line:
    until: float
    count: int = 0


class RepeatFilter(logging.Filter):
    """Lets `WRITTEN` records of the same logger, level and first line of a message through in `SECONDS`.

    Records of the access log pass: they are one a request. What was left out is counted in a line of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lines: dict[Key, _Line] = {}
        self._next = 0.0
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written."""
        if record.name == LOGGER.name:
            return True
        with self._lock:
            left_out = self._forget(time.monotonic())
            written = record.name == ACCESS or self._count(record) <= WRITTEN
        for (name, level, text), line in left_out:
            LOGGER.log(level, "%s: %d more like this were left out: %s", name, line.count - WRITTEN, text)
        return written

    def _count(self, record: logging.LogRecord) -> int:
        """How many of the record's line there were in its time, this one included."""
        key = (record.name, record.levelno, str(record.msg).partition("\n")[0][:200])
        if key not in self._lines and len(self._lines) >= KNOWN:
            key = (record.name, record.levelno, "lines of many kinds")
        line = self._lines.setdefault(key, _Line(time.monotonic() + SECONDS))
        line.count += 1
        return line.count

    def _forget(self, now: float) -> list[tuple[Key, _Line]]:
        """Forgets lines whose time is over, and gives those of which some were left out; looks once a second."""
        if now < self._next:
            return []
        self._next = now + 1.0
        over = [(key, line) for key, line in self._lines.items() if line.until <= now]
        for key, _ in over:
            del self._lines[key]
        return [(key, line) for key, line in over if line.count > WRITTEN]


def log_to_stderr() -> None:
    """The log of a service: plain lines on stderr, repeated ones counted."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    for handler in logging.getLogger().handlers:
        if not any(isinstance(one, RepeatFilter) for one in handler.filters):
            handler.addFilter(RepeatFilter())
