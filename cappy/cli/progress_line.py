"""One live line on stderr that says how far a step is; now and then a plain line where stderr is no terminal."""

import sys
import time
from types import TracebackType
from typing import Any

from cappy.progress import State

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

    def __call__(self, done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0) -> None:
        now = time.time()
        state = State(done=done, total=total, unit=unit, resumed=resumed, started=self._started, updated=now)
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


def describe(state: State) -> str:
    """How far a step is, for a person: done of total, what was resumed, rate, time left."""
    parts = [f"{state.done:,}" + ("" if state.total is None else f" of {state.total:,}") + f" {state.unit}"]
    if state.resumed:
        parts.append(f"{state.resumed:,} of them from an earlier start")
    if state.per_second > 0:
        rate = f"{state.per_second:,.0f}" if state.per_second >= 10 else f"{state.per_second:.2g}"
        parts.append(f"{rate} {state.unit}/s")
    if state.seconds_left:
        parts.append(f"{duration(state.seconds_left)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
