"""What a person sees of a local run: a line per step, alive on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from cappy.progress import describe, duration
from pipelines.states import StepState

PLAIN_SECONDS = 10.0
MARKS = {"waiting": " ", "running": "▸", "cached": "✓", "done": "✓", "failed": "✗", "skipped": "-"}
WORDS = {"cached": "from the cache", "skipped": "not called for"}


class Board:
    """Shows the states of a run on stderr while its block lasts; shows nothing if `show` is false."""

    def __init__(self, title: str, log: Path, *, show: bool) -> None:
        self._title = title
        self._log = log
        self._show = show
        self._live: Any = None
        self._said: dict[str, str] = {}
        self._last = time.monotonic()
        self._since: dict[str, float] = {}

    def __enter__(self) -> "Board":
        if not self._show:
            return self
        sys.stderr.write(f"{self._title}: log {self._log}\n")
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), refresh_per_second=8)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, states: Sequence[StepState]) -> None:
        """Shows the present states."""
        for state in states:
            if state.state == "running":
                self._since.setdefault(state.step, time.monotonic())
        if self._live is not None:
            self._live.update(self._table(states))
        elif self._show:
            self._plain(states)

    def _table(self, states: Sequence[StepState]) -> Any:
        from rich.table import Table
        from rich.text import Text

        styles = {"waiting": "dim", "running": "bold", "failed": "bold red", "skipped": "dim"}
        table = Table(box=None, show_header=False, pad_edge=False)
        for _ in range(5):
            table.add_column(no_wrap=True)
        for state in states:
            style = styles.get(state.state, "")
            mark = Text(MARKS[state.state], style="green" if MARKS[state.state] == "✓" else style)
            cells = (state.step, WORDS.get(state.state, state.state), told(state), self._seconds(state))
            table.add_row(mark, *(Text(cell, style=style) for cell in cells))
        return table

    def _plain(self, states: Sequence[StepState]) -> None:
        now = time.monotonic()
        for state in states:
            changed = state.state not in ("waiting", "running") and self._said.get(state.step) != state.state
            due = state.state == "running" and state.progress is not None and now - self._last >= PLAIN_SECONDS
            if changed or due:
                self._said[state.step], self._last = state.state, now
                parts = (told(state), self._seconds(state))
                text = ", ".join(part for part in (WORDS.get(state.state, state.state), *parts) if part)
                sys.stderr.write(f"{self._title}: {state.step}: {text}\n")
                sys.stderr.flush()

    def _seconds(self, state: StepState) -> str:
        """Seconds of a step; of a running one they are counted here, because it tells nothing between two rows."""
        if state.state == "running":
            return duration(time.monotonic() - self._since[state.step])
        return duration(state.seconds) if state.state in ("done", "failed") and state.seconds else ""


def told(state: StepState) -> str:
    """How far a running step is: done of total, rate, time left; of a finished one how much it did."""
    progress = state.progress
    if progress is None or state.state not in ("running", "done"):
        return ""
    if state.state == "done":
        return f"{progress.done:,} {progress.unit}" if progress.done > 1 else ""
    return describe(progress)
