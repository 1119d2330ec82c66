"""How far a step is: told by the step, shown by whoever started it."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from cappy.files import replacing


class Progress(Protocol):
    """Told by a step after each piece of work."""

    def __call__(
        self, done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = ""
    ) -> None:
        """`done` of `total` units are finished, `resumed` of them before this start; `note` says more to a person."""


def silent(done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = "") -> None:
    """Progress that nobody looks at."""


@dataclass(frozen=True, kw_only=True)
class State:
    """What `FileProgress` writes: rates count only what this start did."""

    done: int
    total: int | None
    unit: str
    resumed: int
    started: float
    updated: float
    note: str = ""

    @property
    def per_second(self) -> float:
        """Units per second since the start, resumed ones not counted."""
        seconds = self.updated - self.started
        return (self.done - self.resumed) / seconds if seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Estimated from the mean rate; None where the total or the rate is unknown."""
        if self.total is None or self.per_second <= 0:
            return None
        return max(0.0, (self.total - self.done) / self.per_second)


def describe(state: State) -> str:
    """How far a step is, for a person: done of total, what was resumed, rate, time left, the note."""
    total = "" if state.total is None else f" of {state.total:,}"
    resumed = f" ({state.resumed:,} resumed)" if state.resumed else ""
    parts = [f"{state.done:,}{total} {state.unit}{resumed}"]
    if state.per_second > 0:
        rate = f"{state.per_second:,.0f}" if state.per_second >= 10 else f"{state.per_second:.2g}"
        parts.append(f"{rate} {state.unit}/s")
    if state.seconds_left:
        parts.append(f"{duration(state.seconds_left)} left")
    if state.note:
        parts.append(state.note)
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 4.2 s, 42 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class FileProgress:
    """Writes the state to a file, at most five times a second, for another process to show."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._started = time.time()
        self._updated = 0.0

    def __call__(
        self, done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = ""
    ) -> None:
        now = time.time()
        if now - self._updated < 0.2 and done != total:
            return
        self._updated = now
        state = State(done=done, total=total, unit=unit, resumed=resumed, started=self._started, updated=now, note=note)
        with replacing(self._path) as file:
            file.write(json.dumps(asdict(state)).encode())


class LineProgress:
    """Says the state in a line of its own, now and then and at the end: for logs that a person reads later."""

    def __init__(self, say: Callable[[str], object], seconds: float = 30.0) -> None:
        self._say, self._seconds = say, seconds
        self._started = time.time()
        self._told = float("-inf")

    def __call__(
        self, done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = ""
    ) -> None:
        now = time.time()
        if now - self._told < self._seconds and done != total:
            return
        self._told = now
        self._say(
            describe(
                State(done=done, total=total, unit=unit, resumed=resumed, started=self._started, updated=now, note=note)
            )
        )


def read_state(path: Path) -> State | None:
    """The state last written, or None if there is none yet."""
    try:
        return State(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
