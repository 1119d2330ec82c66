"""Progress on a terminal by rich, and as plain lines now and then where stderr is no terminal."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from cappy.progress import State, describe

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PLAIN_SECONDS = 10.0
MARKS = {"running": "▸", "cached": "✓", "done": "✓", "failed": "✗", "skipped": "-"}
STYLES = {"waiting": "dim", "running": "bold", "failed": "bold red", "skipped": "dim"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table of work: its name, its state, and what else to say of it, from left to right."""

    name: str
    state: str
    cells: tuple[str, ...] = ()


class ProgressTable:
    """A table of rows on stderr that lives while its block lasts; nothing is left behind where `keep` is false."""

    def __init__(self, *, keep: bool = True) -> None:
        self._keep = keep
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    @property
    def live(self) -> bool:
        """Whether the table is drawn: stderr is a terminal."""
        return self._progress is not None

    def __enter__(self) -> "ProgressTable":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress, SpinnerColumn, TextColumn

            texts = [TextColumn("{task.fields[" + name + "]}") for name in ("mark", "name", "cells")]
            spinner = [] if self._keep else [SpinnerColumn()]
            self._progress = Progress(*spinner, *texts, console=Console(stderr=True), transient=not self._keep)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, rows: Sequence[Row]) -> None:
        """Draws the rows as they are now; nothing where stderr is no terminal."""
        if self._progress is None:
            return
        for row in rows:
            mark, name, cells = _styled(row)
            if row.name not in self._tasks:
                self._tasks[row.name] = self._progress.add_task("", total=None, mark="", name="", cells="")
            self._progress.update(self._tasks[row.name], mark=mark, name=name, cells=cells)


class ProgressLine:
    """A Progress that draws itself in one line while its block runs and leaves nothing behind on a terminal."""

    def __init__(self, label: str, *, plain_seconds: float = PLAIN_SECONDS) -> None:
        self._label = label
        self._plain_seconds = plain_seconds
        self._started = self._last_plain = time.time()
        self._table = ProgressTable(keep=False)

    def __enter__(self) -> "ProgressLine":
        self._table.__enter__()
        self._table.update([Row(name=self._label, state="", cells=("starting",))])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._table.__exit__(kind, error, traceback)

    def __call__(
        self, done: int, total: int | None = None, *, unit: str = "rows", resumed: int = 0, note: str = ""
    ) -> None:
        now = time.time()
        state = State(done=done, total=total, unit=unit, resumed=resumed, started=self._started, updated=now, note=note)
        self.show(describe(state))

    def show(self, text: str) -> None:
        """Draws a text, at once on a terminal and else at most every `plain_seconds`."""
        self._table.update([Row(name=self._label, state="", cells=(text,))])
        if not self._table.live and time.time() - self._last_plain >= self._plain_seconds:
            self._last_plain = time.time()
            write_line(f"{self._label}: {text}")


def write_line(text: str) -> None:
    """Writes a line to stderr at once."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _styled(row: Row) -> tuple[str, str, str]:
    """Mark, name and cells of a row in rich's markup."""
    from rich.markup import escape

    style, mark = STYLES.get(row.state, ""), MARKS.get(row.state, " ")

    def styled(text: str, style: str) -> str:
        return f"[{style}]{escape(text)}[/]" if style else escape(text)

    cells = "  ".join(filter(None, row.cells))
    return styled(mark, "green" if mark == "✓" else style), styled(row.name, style), styled(cells, style)
