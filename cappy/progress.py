"""Progress of a step, written to files and logs or shown on a terminal."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from cappy.files import atomic_write

if TYPE_CHECKING:
    from rich import progress as rich_progress


class Progress(Protocol):
    """Called by a step after each piece of work."""

    def __call__(
        self, done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = ""
    ) -> None:
        """Reports that `done` of `total` units are finished, `resumed` of them by an earlier process.

        `note` is further text to show.
        """


def silent(done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = "") -> None:
    """A Progress that does nothing."""


@dataclass(frozen=True, kw_only=True)
class ProgressState:
    """The progress of a step at one moment, as `FileProgress` writes it.

    `started` and `updated` are in seconds of `time.time`. Rates count only the work of this process.
    """

    done: int
    total: int | None
    unit: str
    resumed: int
    started: float
    updated: float
    note: str = ""

    @property
    def per_second(self) -> float:
        """Mean units per second since the start, without resumed units."""
        seconds = self.updated - self.started
        return (self.done - self.resumed) / seconds if seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Remaining seconds, estimated from the mean rate; None if the total or the rate is unknown."""
        if self.total is None or self.per_second <= 0:
            return None
        return max(0.0, (self.total - self.done) / self.per_second)


def describe(state: ProgressState) -> str:
    """The state as text: done of total, resumed units, rate, time left, the note."""
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
    """A duration as text: 4.2 s, 42 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class FileProgress:
    """Writes the state to a file, at most five times a second, so that another process can show it."""

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
        state = ProgressState(
            done=done, total=total, unit=unit, resumed=resumed, started=self._started, updated=now, note=note
        )
        with atomic_write(self._path) as file:
            file.write(json.dumps(asdict(state)).encode())


class LogProgress:
    """Calls `write` with the state as one line every `seconds`, and at the end."""

    def __init__(self, write: Callable[[str], object], seconds: float = 30.0) -> None:
        self._write, self._seconds = write, seconds
        self._started = time.time()
        self._last_shown = float("-inf")

    def __call__(
        self, done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = ""
    ) -> None:
        now = time.time()
        if now - self._last_shown < self._seconds and done != total:
            return
        self._last_shown = now
        self._write(
            describe(
                ProgressState(
                    done=done, total=total, unit=unit, resumed=resumed, started=self._started, updated=now, note=note
                )
            )
        )


def read_state(path: Path) -> ProgressState | None:
    """The last written state, or None if there is none yet."""
    try:
        return ProgressState(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None


PLAIN_SECONDS = 10.0
"""Time between two lines if stderr is not a terminal."""
FIRST_PLAIN_SECONDS = 3.0
"""Time until the first of these lines, so that an error that delays a step is seen soon."""
MARKS = {"running": "▸", "cached": "✓", "done": "✓", "failed": "✗", "skipped": "-"}
STYLES = {"waiting": "dim", "running": "bold", "failed": "bold red", "skipped": "dim"}


@dataclass(frozen=True, kw_only=True)
class ProgressRow:
    """One row of a progress table: its name, its state, and further cells from left to right."""

    name: str
    state: str
    cells: tuple[str, ...] = ()


class ProgressTable:
    """A live table on stderr for the duration of a block; without `keep` it is erased at the end."""

    def __init__(self, *, keep: bool = True) -> None:
        self._keep = keep
        self._progress: rich_progress.Progress | None = None
        self._tasks: dict[str, rich_progress.TaskID] = {}

    @property
    def live(self) -> bool:
        """Whether the table is drawn, that is, whether stderr is a terminal."""
        return self._progress is not None

    def __enter__(self) -> "ProgressTable":
        if sys.stderr.isatty():
            from rich import progress as rich_progress
            from rich.console import Console

            texts = [rich_progress.TextColumn("{task.fields[" + name + "]}") for name in ("mark", "name", "cells")]
            spinner = [] if self._keep else [rich_progress.SpinnerColumn()]
            self._progress = rich_progress.Progress(
                *spinner, *texts, console=Console(stderr=True), transient=not self._keep
            )
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, rows: Sequence[ProgressRow]) -> None:
        """Draws the rows, if stderr is a terminal."""
        if self._progress is None:
            return
        for row in rows:
            mark, name, cells = _style_row(row)
            if row.name not in self._tasks:
                self._tasks[row.name] = self._progress.add_task("", total=None, mark="", name="", cells="")
            self._progress.update(self._tasks[row.name], mark=mark, name=name, cells=cells)


class ProgressLine:
    """A Progress shown as one line on stderr for the duration of a block; a terminal line is erased at the end."""

    def __init__(self, label: str, *, plain_seconds: float = PLAIN_SECONDS) -> None:
        self._label = label
        self._plain_seconds = plain_seconds
        self._started = time.time()
        self._next_plain = self._started + min(FIRST_PLAIN_SECONDS, plain_seconds)
        self._table = ProgressTable(keep=False)

    def __enter__(self) -> "ProgressLine":
        self._table.__enter__()
        self._table.update([ProgressRow(name=self._label, state="", cells=("starting",))])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._table.__exit__(kind, error, traceback)

    def __call__(
        self, done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = ""
    ) -> None:
        now = time.time()
        state = ProgressState(
            done=done, total=total, unit=unit, resumed=resumed, started=self._started, updated=now, note=note
        )
        self.show(describe(state))

    def show(self, text: str) -> None:
        """Shows a text: at once on a terminal, else as a line at most every `plain_seconds`, the first one sooner."""
        self._table.update([ProgressRow(name=self._label, state="", cells=(text,))])
        if not self._table.live and time.time() >= self._next_plain:
            self._next_plain = time.time() + self._plain_seconds
            write_line(f"{self._label}: {text}")


def write_line(text: str) -> None:
    """Writes a line to stderr at once."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _style_row(row: ProgressRow) -> tuple[str, str, str]:
    """Mark, name and cells of a row in rich markup."""
    from rich.markup import escape

    style, mark = STYLES.get(row.state, ""), MARKS.get(row.state, " ")

    def style_text(text: str, style: str) -> str:
        return f"[{style}]{escape(text)}[/]" if style else escape(text)

    cells = "  ".join(filter(None, row.cells))
    return style_text(mark, "green" if mark == "✓" else style), style_text(row.name, style), style_text(cells, style)
