"""One live line on stderr that says how far a step is; now and then a plain line where stderr is no terminal."""

import sys
import time
from types import TracebackType
from typing import Any

from cappy.progress import State, describe

PLAIN_SECONDS = 10.0


class ProgressLine:
    """A Progress that draws itself while its block runs and leaves nothing behind on a terminal."""

    def __init__(self, label: str, *, plain_seconds: float = PLAIN_SECONDS) -> None:
        self._label = label
        self._plain_seconds = plain_seconds
        self._started = self._last_plain = time.time()
        self._status: Any = None

    def __enter__(self) -> "ProgressLine":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.markup import escape

            self._status = Console(stderr=True).status(escape(f"{self._label}: starting"))
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def __call__(
        self, done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = ""
    ) -> None:
        now = time.time()
        state = State(done=done, total=total, unit=unit, resumed=resumed, started=self._started, updated=now, note=note)
        self.show(describe(state))

    def show(self, text: str) -> None:
        """Draws a text, at once on a terminal and else at most every `plain_seconds`."""
        if self._status is not None:
            from rich.markup import escape

            self._status.update(escape(f"{self._label}: {text}"))
        elif time.time() - self._last_plain >= self._plain_seconds:
            self._last_plain = time.time()
            sys.stderr.write(f"{self._label}: {text}\n")
            sys.stderr.flush()
