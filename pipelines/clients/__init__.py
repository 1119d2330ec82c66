"""What every client of a platform is: runs are sent, followed and cancelled by one interface."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

State = Literal["waiting", "running", "done", "cached", "failed", "skipped", "cancelled"]
OVER = ("done", "failed", "cancelled")


@dataclass(frozen=True, kw_only=True)
class TaskState:
    """One task of a remote run: `seconds` that it took, `error` in the platform's words."""

    step: str
    state: State
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A remote run: `url` is where a person looks at it."""

    run: str
    state: State
    url: str
    tasks: tuple[TaskState, ...] = ()
    error: str = ""
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        """Whether nothing changes any more."""
        return self.state in OVER


class Client(Protocol):
    """A platform that takes runs."""

    def submit(self, package: Path, arguments: Mapping[str, object], name: str) -> RunState:
        """Sends a compiled pipeline with its arguments; ConfigError with the platform's words where it refuses."""
        ...

    def look(self, run: str) -> RunState:
        """How far a run is."""
        ...

    def logs(self, run: str, step: str) -> Iterator[tuple[str, str]]:
        """(source, line) of all that a step wrote so far, of all steps for an empty name; a line begins with its step.

        A source is what writes lines in an order of its own: a pod, a job, a log.
        """
        ...

    def cancel(self, run: str) -> None:
        """Ends a run."""
        ...


def step_name(task: str) -> str:
    """The step of a task's name: kfp numbers the second of a kind, and puts what it adds itself behind a dash."""
    return re.sub(r"-(\d+|driver|executor)$", "", task)
