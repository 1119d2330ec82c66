"""Reads the state of each step of a local run from the files that the steps write, and shows it on a terminal."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from cappy.progress import (
    FIRST_PLAIN_SECONDS,
    PLAIN_SECONDS,
    ProgressRow,
    ProgressState,
    ProgressTable,
    describe,
    duration,
    read_state,
    write_line,
)
from cappy.runs import StepRecord, progress_path, read_record
from cappy.steps import STEP_SPECS

STATE_TEXTS = {"cached": "from the cache", "skipped": "skipped: not promoted"}
"""State -> the text that is shown for it, if that is not its name."""
StateName = Literal["waiting", "running", "cached", "done", "failed", "skipped"]

_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_START = re.compile(r"Executing task '([a-z-]+)'")


@dataclass(frozen=True, kw_only=True)
class StepState:
    """One step of a run, or a shard of one ("sampling 0/4").

    `seconds` is its duration so far, `target` its output folder if it is finished.
    """

    step: str
    state: StateName
    progress: ProgressState | None = None
    seconds: float = 0.0
    target: Path | None = None
    error: str = ""


def read_states(
    fingerprints: Mapping[str, str], *, work: Path, progress: Path, run: str, alive: bool, succeeded: bool
) -> list[StepState]:
    """The state of every step and shard, in order.

    `alive` says whether the run's process is running, `succeeded` whether it ended with status 0.

    A step that this run finished has a record with the run's id, and a running step has a progress file. A step
    that has neither was taken from the cache if a later step has one of them. Shards wait for earlier steps, not for
    each other.
    """
    records = {step: read_record(work, fingerprint) for step, fingerprint in fingerprints.items()}
    reported = {
        step: read_state(progress_path(progress, step.partition(" ")[0], fingerprint))
        for step, fingerprint in fingerprints.items()
    }
    finished = {step: record for step, record in records.items() if record is not None and record.run == run}
    reached = [step for step in fingerprints if step in finished or reported[step]]
    states: dict[str, StepState] = {}
    for step in fingerprints:
        was_passed = any(_follows(later, step, list(fingerprints)) for later in reached)
        state = _state_name(finished.get(step), reported[step], was_passed=was_passed)
        earlier = [states[other].state for other in states if _follows(step, other, list(fingerprints))]
        if state == "waiting" and alive and all(name in ("done", "cached") for name in earlier):
            state = "running"
        if state == "waiting" and succeeded:
            state = "cached" if STEP_SPECS[step.partition(" ")[0]].cached else "skipped"
        if state == "running" and not alive:
            state = "failed"
        states[step] = _step_state(step, state, records[step], reported[step])
    return list(states.values())


def _follows(later: str, step: str, steps: list[str]) -> bool:
    """Whether `later` starts only when `step` is done: it comes after `step` and belongs to no other shard."""
    shards = {name.partition(" ")[2] for name in (later, step)} - {""}
    return steps.index(later) > steps.index(step) and len(shards) < 2


def log_section(log: Path, step: str, *, whole: bool = True) -> list[str]:
    """The lines that a step wrote to the run's log; if it never started, all lines if `whole`, otherwise none."""
    lines = [_COLOR.sub("", line) for line in log.read_text(errors="replace").splitlines()]
    starts = [(index, match[1]) for index, line in enumerate(lines) if (match := _START.search(line))]
    section: list[str] = []
    for (start, name), (end, _) in zip(starts, [*starts[1:], (len(lines), "")], strict=True):
        if name == step:
            section += [line.removeprefix("    ") for line in lines[start:end]]
    return section or (lines if whole else [])


def _state_name(record: StepRecord | None, progress: ProgressState | None, *, was_passed: bool) -> StateName:
    if record is not None:
        return "failed" if record.status == "failed" else "done"
    if progress is not None:
        return "running"
    return "cached" if was_passed else "waiting"


def _step_state(step: str, state: StateName, record: StepRecord | None, progress: ProgressState | None) -> StepState:
    if state == "running":
        seconds = progress.updated - progress.started if progress else 0.0
        return StepState(step=step, state=state, progress=progress, seconds=seconds)
    if record is None or state in ("waiting", "skipped"):
        return StepState(step=step, state=state)
    target = Path(record.target) if state in ("done", "cached") else None
    error = record.error if state == "failed" else ""
    seconds = 0.0 if state == "cached" else record.seconds
    return StepState(step=step, state=state, progress=progress, seconds=seconds, target=target, error=error)


class StepTable:
    """Context manager that shows the states of a run on stderr: a table on a terminal, otherwise a line per change."""

    def __init__(self, title: str, log: Path, *, show: bool) -> None:
        self._title, self._log, self._show = title, log, show
        self._table = ProgressTable()
        self._written_states: dict[str, str] = {}
        self._last_written = time.monotonic()
        self._start_times: dict[str, float] = {}

    def __enter__(self) -> "StepTable":
        if self._show:
            write_line(f"{self._title}: log {self._log}")
            self._table.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._table.__exit__(kind, error, traceback)

    def update(self, states: Sequence[StepState]) -> None:
        """Shows the given states."""
        for state in states:
            if state.state == "running":
                self._start_times.setdefault(state.step, time.monotonic())
        if self._table.live:
            self._table.update([self._row(state) for state in states])
        elif self._show:
            self._write_changes(states)

    def _row(self, state: StepState) -> ProgressRow:
        cells = (STATE_TEXTS.get(state.state, state.state), describe_progress(state), self._duration(state))
        return ProgressRow(name=state.step, state=state.state, cells=cells)

    def _write_changes(self, states: Sequence[StepState]) -> None:
        now = time.monotonic()
        for state in states:
            changed = state.state not in ("waiting", "running") and self._written_states.get(state.step) != state.state
            if changed or self._is_due(state, now):
                self._written_states[state.step], self._last_written = state.state, now
                write_line(f"{self._title}: {state.step}: {', '.join(filter(None, self._row(state).cells))}")

    def _is_due(self, state: StepState, now: float) -> bool:
        """Whether a line about the progress of a running step is due; the first one of a step is due sooner."""
        if state.state != "running" or state.progress is None:
            return False
        if state.step not in self._written_states:
            return now - self._start_times[state.step] >= FIRST_PLAIN_SECONDS
        return now - self._last_written >= PLAIN_SECONDS

    def _duration(self, state: StepState) -> str:
        """The duration of a step.

        That of a running step is measured here, because its progress file changes only after each row it processes.
        """
        if state.state == "running":
            return duration(time.monotonic() - self._start_times[state.step])
        return duration(state.seconds) if state.state in ("done", "failed") and state.seconds else ""


def describe_progress(state: StepState) -> str:
    """The progress of a running step (done of total, rate, time left), or the count of a finished step."""
    progress = state.progress
    if progress is None or state.state not in ("running", "done"):
        return ""
    if state.state == "done":
        return f"{progress.done:,} {progress.unit}" if progress.done > 1 else ""
    return describe(progress)
