"""The interface of the platform clients: submit a run, get its state and logs, and cancel it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

State = Literal["waiting", "running", "done", "cached", "failed", "skipped", "cancelled"]
FINAL_STATES = ("done", "failed", "cancelled")


@dataclass(frozen=True, kw_only=True)
class TaskState:
    """The state of one task of a run; `seconds` is its duration, `error` the platform's message."""

    step: str
    state: State
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The state of a run; `url` is its page, or the log file of a local run."""

    run: str
    state: State
    url: str
    tasks: tuple[TaskState, ...] = ()
    error: str = ""
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def is_final(self) -> bool:
        """Whether the run has ended, so that its state no longer changes."""
        return self.state in FINAL_STATES


class PlatformClient(Protocol):
    """A platform that runs pipelines."""

    def submit(self, package: Path, arguments: Mapping[str, object], name: str) -> RunState:
        """Submits a compiled pipeline with its arguments; raises ConfigError if the platform refuses them."""
        ...

    def get_state(self, run: str) -> RunState:
        """The state of a run and of its tasks."""
        ...

    def logs(self, run: str, step: str) -> Iterator[tuple[str, str]]:
        """Yields (source, line) pairs of what a step, or every step if `step` is empty, has logged so far.

        Each line starts with the name of its step. A source is a pod, a job or a log; its lines are in order.
        """
        ...

    def cancel(self, run: str) -> None:
        """Cancels a run."""
        ...


def step_name(task: str) -> str:
    """The name of a task's step: the task's name without the suffix that kfp adds (-2, -driver, -executor)."""
    return re.sub(r"-(\d+|driver|executor)$", "", task)
